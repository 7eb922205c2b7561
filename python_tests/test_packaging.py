"""The built wheel, away from its sources: with a compiler at build time, and without any."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys
import types
import zipfile

import pytest
import setup_script

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
import sys, torch, ulr_kernels as ulr
assert not ulr.__file__.startswith({root!r}), ulr.__file__
y = ulr.ops.noisy_linear(torch.ones(4, 3), torch.ones(2, 3), None, 0.5, 7, copies=2)
assert y.shape == (2, 4, 2) and torch.isfinite(y).all()
assert torch.equal(ulr.ops.noisy_linear(torch.zeros(4, 3), torch.zeros(2, 3), None, 1.0, 7)[0], ulr.noise((4, 2), 7))
print(ulr.describe())
"""


def build_wheel(folder: pathlib.Path, **environment: str) -> pathlib.Path:
    sources = folder / "sources"  # a copy: the wheel's build must not touch the tree that runs these tests
    skip = shutil.ignore_patterns(
        ".venv", "lib.*", "dist", ".git", "_build_info.py", "__pycache__", "*.egg-info", "runs", ".*_cache"
    )
    shutil.copytree(ROOT, sources, ignore=skip)
    for built in (sources / "ulr_kernels").glob("*.so"):
        built.unlink()  # what ninja made in build/native stays, and is not made again
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        sources,
    ]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def run_installed(wheel: pathlib.Path, folder: pathlib.Path) -> str:
    """Unpacked before everything else on the path, with no compiler to be found."""
    site = folder / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = {"PYTHONPATH": str(site), "PATH": "/nonexistent", "HOME": str(folder)}
    program = PROGRAM.format(root=str(ROOT))
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.pair("cpp/cpu")
def test_wheel_with_kernels_runs_without_a_compiler(tmp_path: pathlib.Path) -> None:
    wheel = build_wheel(tmp_path, ULR_BUILD="cpp")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("libulr_cpu.so") for name in names)
    assert not any(name.startswith(("python_tests", "bench", "csrc")) for name in names)
    described = run_installed(wheel, tmp_path)
    assert re.search(r"on cpu:\n  cpp +runs .*noisy_linear,", described)


def test_wheel_built_without_a_compiler_runs_on_torch(tmp_path: pathlib.Path) -> None:
    wheel = build_wheel(tmp_path, ULR_BUILD="", PATH=str(tmp_path), CXX="", CC="", CUDA_HOME=str(tmp_path))
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
    described = run_installed(wheel, tmp_path)
    assert re.search(r"on cpu:\n  torch +runs .*noisy_linear,.*\n  cpp +absent: no C\+\+ compiler", described)


def test_a_required_part_that_is_missing_is_an_error(tmp_path: pathlib.Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)ULR_BUILD.*cpp"):
        build_wheel(tmp_path, ULR_BUILD="cpp", PATH=str(tmp_path), CXX="", CC="")


@pytest.fixture
def setup(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = setup_script.load()
    monkeypatch.setattr(module, "BUILD", tmp_path / "native")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return module


@pytest.mark.parametrize("compiler", ["g++-13", "ccache g++-13", "ccache g++-13 -m64 -pthread"])
def test_nvcc_is_given_the_compiler_without_its_cache_and_options(compiler: str, setup) -> None:
    setup.write_ninja(compiler, [], "nvcc", ("9.0a",), cpp=False)
    assert "nvcc -ccbin g++-13 -std=c++17" in (setup.BUILD / "build.ninja").read_text()


@pytest.mark.parametrize(
    ("system", "machine", "library", "instruction_sets"),
    [
        ("linux", "x86_64", "libulr_cpu.so", {"portable", "avx2", "avx512"}),
        ("linux", "aarch64", "libulr_cpu.so", {"portable", "neon"}),
        ("linux", "riscv64", "libulr_cpu.so", {"portable"}),
        ("darwin", "arm64", "libulr_cpu.dylib", {"portable", "neon"}),
        ("darwin", "x86_64", "libulr_cpu.dylib", {"portable", "avx2", "avx512"}),
    ],
)
def test_commands_on_each_system(system, machine, library, instruction_sets, setup, monkeypatch) -> None:
    monkeypatch.setattr(setup, "SYSTEM", system)
    monkeypatch.setattr(setup, "MACHINE", machine)
    shim, made = setup.write_ninja("clang++", ["/python"], None, (), cpp=True)
    text = (setup.BUILD / "build.ninja").read_text()
    assert shim.startswith("_C.") and made == library
    assert set(re.findall(r"-DULR_ISA=(\w+)", text)) == instruction_sets
    assert ("-mavx2" in text) == ("avx2" in instruction_sets)
    statements = dict(re.findall(r"^build (\S+): link (.*(?:\n  .*)*)", text, re.MULTILINE))
    assert set(statements) == {shim, library}
    assert ("dynamic_lookup" in statements[shim]) == (system == "darwin") and "dynamic_lookup" not in statements[
        library
    ]
    for isa in instruction_sets:
        assert f"cpu/noisy_linear.{isa}.o" in statements[library]


def tool(folder: pathlib.Path, name: str, prints: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\nprintf '{prints}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "gpus, listed, expected",
    [
        (["9.0", "9.0"], None, ("9.0a",)),
        (["8.6", "12.0"], None, ("8.6", "12.0")),
        (["7.5", "8.0"], None, ("8.0",)),
        (["9.0"], "8.0;8.6", ("8.0", "8.6+PTX")),
        ([], "all", ("8.0", "8.6", "9.0a", "12.0+PTX")),
        ([], None, "no GPU was found when the package was built"),
        (["7.5"], None, "nvcc knows none of 7.5"),
    ],
)
def test_cuda_kernels_are_built_for_the_gpus_that_are_present(gpus, listed, expected, setup, tmp_path, monkeypatch):
    nvcc = tool(tmp_path, "nvcc", "".join(f"compute_{n}\\n" for n in (80, 86, 90, 120)))
    tool(tmp_path, "nvidia-smi", "".join(f"{gpu}\\n" for gpu in gpus) or "No devices were found\\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if listed is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    if isinstance(expected, tuple):
        assert setup.architectures(nvcc) == expected
    else:
        with pytest.raises(setup.Absent, match=expected):
            setup.architectures(nvcc)


def test_one_line_says_what_is_built_and_why_not_more(setup) -> None:
    tools = setup.Tools(compiler="g++ 12", absent={"cuda": "no GPU was found"})
    assert setup.plan_of(tools, {"cpp", "cuda"}) == (
        "ulr_kernels builds cpp kernels (g++ 12); no cuda kernels: no GPU was found"
    )
    tools = setup.Tools(compiler="g++ 12", nvcc="13.0", architectures=("8.6", "9.0a"))
    assert setup.plan_of(tools, {"cpp", "cuda"}).endswith(
        "cpp kernels (g++ 12) and cuda kernels (nvcc 13.0 for 8.6, 9.0a)"
    )
