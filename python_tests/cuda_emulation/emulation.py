"""The CUDA library compiled for the host over the emulator, and calls of its launchers with CPU tensors."""

from __future__ import annotations

import concurrent.futures
import ctypes
import os
import pathlib
import subprocess
from collections.abc import Callable

from compile_cache import compile_once, with_includes

from ulr_kernels.backends import _abi, cuda
from ulr_kernels.backends.cuda import mlp

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
FLAGS = (
    "-std=c++17 -ffp-contract=off -fno-strict-aliasing -fPIC -Wall -Wextra -Werror -Wno-unknown-pragmas "
    f"-I{ROOT}/csrc/include -I{HERE}/include"
).split()
PROCESSORS = 3  # of the emulated device, as include/cuda_runtime.h says
PLAIN = ("-O2",)
# Functions and checks are called, not expanded in place: a third of the time to compile at -O1, and the same checks.
SANITIZED = (
    *("-Og", "-fno-inline", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    *("--param", "asan-instrumentation-with-call-threshold=0"),
)


def compile_library(name: str, sources: list[pathlib.Path], mode: tuple[str, ...] = PLAIN) -> pathlib.Path:
    """A shared library of CUDA sources for the host; each file of it is compiled once for each state of its text."""
    sources = [*sources, HERE / "emulator.cpp"]
    folders = [ROOT / "csrc/include", HERE / "include"]

    def compile_source(source: pathlib.Path) -> pathlib.Path:
        command = ["g++", "-x", "c++", *FLAGS, *mode, "-c", str(source), "-o", "OUT"]
        return compile_once(f"{source.stem}.o", command, with_includes(source, folders))[0]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_source, sources))
    return compile_once(f"lib{name}.so", ["g++", "-shared", *mode, *map(str, objects), "-o", "OUT"], objects)[0]


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
            code = _abi.launch(address, call.noise, call.views(), call.numbers)
            if code:
                raise RuntimeError(f"{op}: {self.library.ulr_cuda_error(code).decode()}")

        return run
