"""The CUDA library compiled for the host over the emulator, and calls of its launchers with CPU tensors."""

from __future__ import annotations

import ctypes
import hashlib
import os
import pathlib
import subprocess
from collections.abc import Callable

from ulr_kernels.backends import _native, cuda
from ulr_kernels.backends.cuda import mlp

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "cuda_emulation"
FLAGS = (
    "-std=c++17 -ffp-contract=off -fno-strict-aliasing -fPIC -Wall -Wextra -Werror -Wno-unknown-pragmas "
    f"-I{ROOT}/csrc/include -I{HERE}/include"
).split()
PROCESSORS = 3  # of the emulated device, as include/cuda_runtime.h says
PLAIN = ("-O2",)
SANITIZED = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def compile_library(name: str, sources: list[pathlib.Path], mode: tuple[str, ...] = PLAIN) -> pathlib.Path:
    """A shared library of CUDA sources, made once for each state of all sources and flags."""
    headers = [
        *ROOT.glob("csrc/cuda/*.cuh"),
        *ROOT.glob("csrc/include/ulr/*"),
        *HERE.glob("*.h"),
        *HERE.glob("include/*"),
    ]
    sources = [*sources, HERE / "emulator.cpp"]
    state = hashlib.sha256(repr((FLAGS, mode)).encode())
    for path in sorted([*headers, *sources]):
        state.update(path.read_bytes())
    folder = BUILD / f"{name}-{state.hexdigest()[:16]}"
    library = folder / f"lib{name}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    pending = [
        (s, ["g++", "-x", "c++", *FLAGS, *mode, "-c", str(s), "-o", str(folder / f"{s.stem}.o")]) for s in sources
    ]
    running: list[tuple[pathlib.Path, subprocess.Popen]] = []
    while pending or running:
        while pending and len(running) < (os.cpu_count() or 1):
            source, command = pending.pop()
            running.append((source, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
        source, process = running.pop(0)
        _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{source.name} does not compile for the host:\n{errors}")
    objects = [str(folder / f"{s.stem}.o") for s in sources]
    partial = library.with_suffix(f".{os.getpid()}")
    subprocess.run(["g++", "-shared", *mode, *objects, "-o", str(partial)], check=True)
    partial.rename(library)
    return library


def kernels(mode: tuple[str, ...] = PLAIN) -> pathlib.Path:
    return compile_library("ulr_emulated", sorted(ROOT.glob("csrc/cuda/*.cu")), mode)


def sanitizer_environment() -> dict[str, str]:
    """For a process that opens a sanitized library: the address sanitizer must be the first library in it."""
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    # Python keeps memory until it ends, which is no leak of ours.
    return {**os.environ, "LD_PRELOAD": found.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}


class Library:
    """A compiled library; `provider(op)` is what backends/cuda would give on a GPU."""

    def __init__(self, path: pathlib.Path) -> None:
        self.library = ctypes.CDLL(str(path))
        mlp.processors = lambda device: PROCESSORS
        self.library.ulr_cuda_error.restype = ctypes.c_char_p

    def seed(self, seed: int) -> None:
        """Of the order in which blocks and threads run."""
        self.library.ulr_emulate_seed(ctypes.c_uint32(seed))

    def provider(self, op: str) -> Callable[..., None]:
        address = ctypes.cast(getattr(self.library, f"ulr_cuda_{op}"), ctypes.c_void_p).value

        def run(*args) -> None:
            call = cuda.ARGUMENTS[op](*args)
            code = _native._C.launch(address, call.noise, call.views(), call.numbers)
            if code:
                raise RuntimeError(f"{op}: {self.library.ulr_cuda_error(code).decode()}")

        return run
