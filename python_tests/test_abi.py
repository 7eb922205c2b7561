"""Calls of the native libraries: ctypes makes the same ones as `_C`. Bad libraries: each is refused in one sentence."""

from __future__ import annotations

import ctypes
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from samples import samples_of
from test_ops import clone

import ulr_kernels as ulr
from ulr_kernels import _version, dispatch
from ulr_kernels.backends import _abi, _native, cpp
from ulr_kernels.ops._op import OPS

ROOT = pathlib.Path(__file__).parents[1]
WHEEL_RUN = (str(ROOT / "python_tests/wheel_run.py"), str(ROOT / "python_tests/vectors/noise_v1.json"))

pytestmark = pytest.mark.pair("cpp/cpu")


class Tensor(ctypes.Structure):
    """ulr_tensor, written out once more."""

    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32)]
    _fields_ += [("size", ctypes.c_int64 * 5), ("stride", ctypes.c_int64 * 5)]


class Noise(ctypes.Structure):
    """ulr_noise_spec."""

    _fields_ = [("key", ctypes.c_void_p), ("sobol", ctypes.c_void_p), ("dist", ctypes.c_int32)]
    _fields_ += [("antithetic", ctypes.c_int32), ("draw", ctypes.c_int64), ("row_offset", ctypes.c_int64)]
    _fields_ += [("col_offset", ctypes.c_int64), ("positions", ctypes.c_int64), ("width", ctypes.c_int64)]
    _fields_ += [("hadamard", ctypes.c_int32)]


class Launch(ctypes.Structure):
    """ulr_launch."""

    _fields_ = [("threads", ctypes.c_int32), ("device", ctypes.c_int32), ("stream", ctypes.c_void_p)]
    _fields_ += [("tensors", ctypes.c_int32), ("numbers", ctypes.POINTER(ctypes.c_int64))]


def fields(struct: ctypes.Structure) -> list:
    values = [getattr(struct, name) for name, *_ in struct._fields_]
    return [list(value) if isinstance(value, ctypes.Array) else value for value in values]


def received(launch: Callable[..., int], call: tuple, numbers: int) -> tuple:
    """The result of a call, and the arguments that its launcher sees."""
    seen: list = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Noise), ctypes.POINTER(Tensor), ctypes.POINTER(Launch))
    def launcher(noise, tensors, where) -> int:
        seen.append(fields(noise.contents) if noise else None)
        seen.extend(fields(tensors[i]) for i in range(where.contents.tensors))
        seen.append(fields(where.contents)[:4] + where.contents.numbers[:numbers])
        return 3

    return launch(ctypes.cast(launcher, ctypes.c_void_p).value, *call), seen


VIEWS = [
    (2**47 + 8, 1, (), ()),
    (8, 4, (7,), (-3,)),
    None,
    (16, 3, (2, 3, 4), (0, 2**40, 1)),
    (24, 2, (5, 6, 7, 8), (336, 56, 8, 1)),
    (32, 0, (9, 5, 6, 7, 8), (1, 2, 3, 4, 5)),
]


@pytest.mark.skipif(_abi.CALLS_BY != "pybind11", reason="_C was not built for this Python")
@pytest.mark.parametrize("noise", [None, (2**47, 2**46, 2, True, 2**32 - 1, 5, 2**34, 6, 7, True)], ids=["none", "all"])
@pytest.mark.parametrize("numbers", [(), (-1, 2**62, 3)], ids=str)
def test_ctypes_and_pybind11_make_the_same_call(noise, numbers) -> None:
    call = (noise, tuple(VIEWS), numbers, 3, 1, 2**47 + 16)
    by_ctypes = received(_abi.launch_by_ctypes, call, len(numbers))
    assert by_ctypes == received(_abi.launch, call, len(numbers))
    assert by_ctypes[0] == 3 and by_ctypes[1][-1] == [3, 1, 2**47 + 16, len(VIEWS), *numbers]


def test_every_op_has_the_same_bits_by_ctypes(monkeypatch, one_thread) -> None:
    """Over one sample of each op, and the two with the most tensors."""

    def outputs() -> list[torch.Tensor]:
        found = []
        for op in OPS:
            good = [sample for sample in samples_of(op, "cpu", torch.float32) if sample.error is None]
            for sample in good[:2]:
                args = [clone(value) for value in sample.args]
                result = OPS[op].function(*args, **{name: clone(value) for name, value in sample.kwargs.items()})
                found += [value for value in (result, *args) if isinstance(value, torch.Tensor)]
        return found

    with ulr.use_backend("cpp"):
        expected = outputs()
        calls = []
        monkeypatch.setattr(_abi, "launch", lambda *call: calls.append(call) or _abi.launch_by_ctypes(*call))
        _native.launcher.cache_clear()
        results = outputs()
    _native.launcher.cache_clear()
    assert len(calls) >= len(OPS)
    for result, want in zip(results, expected, strict=True):
        torch.testing.assert_close(result, want, rtol=0, atol=0, equal_nan=True)


def test_its_version_is_that_of_the_header() -> None:
    header = (ROOT / "csrc/include/ulr/api.h").read_text()
    assert re.findall(r"#define ULR_ABI_VERSION (\d+)", header) == [str(_abi.ABI_VERSION)]


# Bad libraries.

LIBRARY = _abi.PACKAGE / _native.FILES["cpp"]


@pytest.fixture
def package(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """An empty folder, in which the back ends look for the libraries."""

    def forget() -> None:
        for cache in (_native.library, _native.launcher, cpp._library):
            cache.cache_clear()
        dispatch._chosen.clear()

    monkeypatch.setattr(_abi, "PACKAGE", tmp_path)
    forget()
    yield tmp_path
    monkeypatch.undo()
    forget()


def runs_on_torch_because(sentence: str) -> None:
    """`ulr.describe()` has the sentence, and ops run on torch."""
    described = ulr.describe()
    assert re.search(rf"on cpu:\n  torch +runs .*noisy_linear.*\n  cpp +absent: {sentence}\n", described), described
    y = ulr.ops.noisy_linear(torch.zeros(4, 3), torch.zeros(2, 3), None, 1.0, 7)
    assert torch.equal(y[0], ulr.noise((4, 2), 7))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"libulr_cpu.so cannot be loaded: .*: file too short"),
        (
            b"version https://git-lfs.github.com/spec/v1\n" * 9,
            r"libulr_cpu.so cannot be loaded: .*: invalid ELF header",
        ),
        (None, r"libulr_cpu.so cannot be loaded: .*No such file or directory.*"),
    ],
    ids=["empty", "text", "missing"],
)
def test_a_file_that_is_no_library(content, sentence, package) -> None:
    if content is not None:
        (package / LIBRARY.name).write_bytes(content)
    runs_on_torch_because(sentence)


@pytest.mark.parametrize("size", [10, 64, 300, 4096, 100_000, 0.5, 0.9])
def test_a_library_that_is_cut_short(size, package) -> None:
    """The loader would map it, and the process would die of SIGBUS."""
    content = LIBRARY.read_bytes()
    size = int(size * len(content)) if isinstance(size, float) else size
    (package / LIBRARY.name).write_bytes(content[:size])
    runs_on_torch_because(rf"libulr_cpu.so is damaged: it has {size} bytes and needs more")


def test_a_whole_library_is_not_called_damaged(package) -> None:
    shutil.copy(LIBRARY, package)
    assert isinstance(_native.library("cpp"), ctypes.CDLL)


def compile_library(package: pathlib.Path, *arguments: str) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile a library")
    command = ["g++", "-shared", "-fPIC", f"-I{ROOT / 'csrc/include'}", "-o", str(package / LIBRARY.name), *arguments]
    subprocess.run(command, check=True)


def test_a_library_of_another_version(package) -> None:
    compile_library(package, "-DULR_VERSION=0.0.9", str(ROOT / "csrc/version.cpp"))
    runs_on_torch_because(
        r"libulr_cpu.so belongs to another version of ulr_kernels: 0.0.9 \(ABI 3\), this package is \S+ \(ABI 3\)"
    )


def test_a_library_of_another_abi(package, monkeypatch) -> None:
    shutil.copy(LIBRARY, package)
    monkeypatch.setattr(_abi, "ABI_VERSION", 4)
    runs_on_torch_because(r"libulr_cpu.so belongs to another version .*: \S+ \(ABI 3\), this package is \S+ \(ABI 4\)")


def test_a_library_of_something_else(package) -> None:
    (package / "other.c").write_text("int other(void) { return 1; }")
    compile_library(package, str(package / "other.c"))
    runs_on_torch_because(r"libulr_cpu.so belongs to another version .*: unknown \(ABI None\), this package is .*")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content[: len(content) // 2], "_C is damaged: its file is cut short"),
        (lambda content: b"", "_C cannot be imported: .*file too short"),
        (None, r"_C was not built for this Python \(\S+\)"),
    ],
    ids=["cut", "empty", "missing"],
)
def test_a_bad_shim_leaves_the_calls_to_ctypes(change, reason, tmp_path) -> None:
    """In a copy of the package: this process has its own `_C` already."""
    copy = tmp_path / "ulr_kernels"
    shutil.copytree(_abi.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "_C.*"))
    for shim in _abi.PACKAGE.glob("_C.*") if change else ():
        (copy / shim.name).write_bytes(change(shim.read_bytes()))
    printed = run_apart(sys.executable, *WHEEL_RUN, path=tmp_path)
    assert re.search(rf"9 answers by ctypes: {reason} on \w+", printed)


def run_apart(*command: str, path: pathlib.Path) -> str:
    """Run a program with the package of a folder; what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(("cpu", "isa"), [("Nehalem", "portable"), ("max", r"avx\w+")])
def test_a_cpu_that_lacks_avx2_runs_portable_code(cpu, isa) -> None:
    """An emulator of such a processor ends a program that uses any other instruction."""
    if os.uname().machine != "x86_64" or shutil.which("qemu-x86_64") is None:
        pytest.skip("qemu-x86_64 cannot be found")
    printed = run_apart("qemu-x86_64", "-cpu", cpu, sys.executable, *WHEEL_RUN, path=ROOT)
    assert re.search(rf"9 answers by .* on {isa}", printed)


# A torch that is too old.


def test_the_oldest_torch_is_that_of_the_package() -> None:
    oldest = ".".join(map(str, _version.OLDEST_TORCH))
    assert f'"torch>={oldest}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("version", "old"),
    [("2.8.0+cu128", True), ("1.13.1", True), ("2.9.1", False), ("2.13.0+cpu", False), ("3.0", False)],
)
def test_an_old_torch_is_named(version, old, monkeypatch) -> None:
    """ops run all the same, as far as that torch has what they need."""
    monkeypatch.setattr(torch, "__version__", version)
    sentence = f"ulr_kernels {ulr.__version__} needs torch 2.9 or newer, this is torch {version}"
    assert (sentence in ulr.describe()) == old


def test_a_torch_without_what_the_package_needs_is_named(tmp_path) -> None:
    (tmp_path / "torch.py").write_text("__version__ = '1.13.1'\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = (sys.executable, "-m", "ulr_kernels", "doctor")
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    *_, last = result.stderr.splitlines()
    assert result.returncode == 1
    assert f"ulr_kernels {ulr.__version__} needs torch 2.9 or newer, this is torch 1.13.1: " in last
