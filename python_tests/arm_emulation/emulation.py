"""The CPU library compiled for 64-bit ARM, and its launches in qemu's emulation of such a processor.

`Library.launcher` stands in for the back end's own. A launch runs on this machine in portable C++ and then, from the
same memory, on NEON. Both have four lanes and add up in the same order, so all bits of all results must agree. The
one function of a C library is the logarithm of `noisy_mlp`, glibc's on either side.
"""

from __future__ import annotations

import bisect
import concurrent.futures
import ctypes
import os
import pathlib
import subprocess
from collections.abc import Callable, Iterable

import setup_script
import torch
from compile_cache import compile_once, with_includes

from ulr_kernels import noise_contract
from ulr_kernels.backends import _native

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
COMPILER, EMULATOR = TOOLS = ("aarch64-linux-gnu-g++", "qemu-aarch64")  # Debian: g++-aarch64-linux-gnu, qemu-user
LEVELS = {"neon": "-O1", "portable": "-O0"}  # the library has the portable set, and no test runs it
DTYPES = {number: dtype for dtype, number in _native.DTYPES.items() if dtype != torch.bool}

Views = tuple[_native.TensorView | None, ...]


def compile_program() -> pathlib.Path:
    """run_launches.cpp with the library that setup.py builds on such a machine, less optimised."""
    setup = setup_script.load()
    include = ROOT / "csrc/include"
    common = [COMPILER, *setup.CXX_FLAGS.split(), "-Werror", f"-I{include}"]

    def compile_object(name: str, source: pathlib.Path, flags: str) -> pathlib.Path:
        level = LEVELS.get(name.rpartition(".")[2], "-O2")
        command = [*common, level, *flags.split(), "-c", str(source), "-o", "OUT"]
        return compile_once(f"arm-{name}.o", command, with_includes(source, [include]))[0]

    objects = [("run_launches", HERE / "run_launches.cpp", ""), *setup.cpu_objects("aarch64")]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(lambda parts: compile_object(*parts), objects))
    return compile_once("arm.program", [COMPILER, "-static", "-pthread", *map(str, made), "-o", "OUT"], made)[0]


class Memory:
    """The memory that a launch may touch, as blocks of bytes that do not overlap: (first, last + 1)."""

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        self.blocks: list[tuple[int, int]] = []
        for first, last in sorted(spans):
            if self.blocks and first < self.blocks[-1][1]:
                first, end = self.blocks.pop()
                last = max(last, end)
            self.blocks.append((first, last))

    def place(self, address: int) -> tuple[int, int]:
        """A pointer's block and its offset there; the block of NULL is -1."""
        if not address:
            return -1, 0
        block = bisect.bisect_right([first for first, _ in self.blocks], address) - 1
        return block, address - self.blocks[block][0]

    def read(self) -> list[bytes]:
        return [ctypes.string_at(first, last - first) for first, last in self.blocks]

    def write(self, contents: list[bytes]) -> None:
        for (first, last), content in zip(self.blocks, contents, strict=True):
            ctypes.memmove(first, content, last - first)


def span(view: _native.TensorView) -> tuple[int, int]:
    """The memory from a tensor's first element to its last one."""
    address, dtype, sizes, strides = view
    elements = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return address, address + (0 if 0 in sizes else elements * DTYPES[dtype].itemsize)


def memory_of(name: str, noise: tuple | None, tensors: Views, numbers: tuple[int, ...]) -> Memory:
    spans = [span(view) for view in tensors if view is not None and view[0]]
    if noise is not None:
        key, sobol = noise[:2]
        if key:
            spans.append((key, key + 8 * (numbers[0] if name == "noisy_mlp" else 1)))  # there one for each noised layer
        if sobol:
            spans.append((sobol, sobol + 4 * noise_contract.sobol_directions(torch.device("cpu")).numel()))
    return Memory(spans)


def words_of(memory: Memory, noise: tuple | None, tensors: Views, numbers: tuple[int, ...]) -> list[int]:
    """The arguments of a launch as run_launches.cpp reads them."""
    words = [len(memory.blocks), *(last - first for first, last in memory.blocks), int(noise is not None)]
    if noise is not None:
        words += [*memory.place(noise[0]), *memory.place(noise[1]), *map(int, noise[2:])]
    words += [len(numbers), *numbers, len(tensors)]
    for view in tensors:
        address, dtype, sizes, strides = view or (0, 0, (), ())
        lead = (5 if len(sizes) > 3 else 3) - len(sizes)  # axes are placed as csrc/bindings.cpp does
        rest = 5 - lead - len(sizes)
        words += [*memory.place(address), dtype]
        words += [*(1,) * lead, *sizes, *(1,) * rest, *(0,) * lead, *strides, *(0,) * rest]
    return words


class Library:
    """A process of the emulator, which runs launches one after another.

    Attributes:
        isas: its instruction sets, the best first. Launches use the best.
        launcher_here: makes the launches of this machine.
        launched: the launchers that have run, with the dtypes of their tensors.
    """

    def __init__(self, program: pathlib.Path) -> None:
        self._process = subprocess.Popen([EMULATOR, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout
        self.launcher_here = _native.launcher
        self.isas = self._from.readline().decode().split()
        self.launched: dict[str, set[torch.dtype]] = {}

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0

    def launcher(self, part: str, name: str) -> Callable[..., None]:
        launch_here = self.launcher_here(part, name)

        def launch(noise: tuple | None, tensors: Views, numbers: tuple[int, ...] = (), *, threads: int = 1) -> None:
            memory = memory_of(name, noise, tensors, numbers)
            before = memory.read()
            launch_here(noise, tensors, numbers, threads=threads)
            here = memory.read()
            there = self._run(name, [threads, *words_of(memory, noise, tensors, numbers)], before)
            memory.write(there)
            different = [block for block, (ours, theirs) in enumerate(zip(here, there, strict=True)) if ours != theirs]
            given = {number: view for number, view in enumerate(tensors) if view is not None}
            at = [number for number, view in given.items() if memory.place(view[0])[0] in different]
            assert not different, f"{name}: tensors {at} differ from those of portable C++"
            self.launched.setdefault(name, set()).update(DTYPES[view[1]] for view in given.values())

        return launch

    def _run(self, name: str, words: list[int], contents: list[bytes]) -> list[bytes]:
        """The contents of the blocks after a launch."""
        self._to.write(b"".join([" ".join([name, *map(str, words)]).encode(), b"\n", *contents]))
        self._to.flush()
        answer = self._from.readline().split()
        assert answer, f"{name} has ended its process"
        code, untouched = map(int, answer)
        after = [self._from.read(len(content)) for content in contents]
        assert code == 0, f"{name}: {_native.ERRORS[code]}"
        assert untouched, f"{name} has written beside its tensors"
        return after
