"""The functions of setup.py: what it builds, and with which commands. test_wheel.py has what comes of it."""

from __future__ import annotations

import os
import pathlib
import re
import types

import pytest
import setup_script
import setuptools

import ulr_kernels


@pytest.fixture
def setup(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = setup_script.load()
    monkeypatch.setattr(module, "BUILD", tmp_path / "native")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return module


@pytest.mark.parametrize("compiler", ["g++-13", "ccache g++-13", "ccache g++-13 -m64 -pthread"])
def test_nvcc_is_given_the_compiler_without_its_cache_and_options(compiler: str, setup) -> None:
    setup.write_ninja(compiler, [], "nvcc", ("9.0a",), cpp=False, machine="x86_64")
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
    monkeypatch.setattr(setup, "MACHINE", setup.processor(machine))
    shim, made = setup.write_ninja("clang++", ["/python"], None, (), cpp=True, machine=setup.processor(machine))
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


def test_a_cross_compiler_builds_for_its_own_processor(setup, tmp_path, monkeypatch) -> None:
    """Without `_C`, for which there is no Python, and beside the objects for this machine."""
    monkeypatch.setattr(setup, "MACHINE", "x86_64")
    monkeypatch.setenv("CXX", f"{tool(tmp_path, 'c++', 'aarch64-linux-gnu')} -O2")
    assert setup.machine_of_wheel() == "aarch64"
    with pytest.raises(setup.Absent, match="there are no headers of a Python for aarch64"):
        setup.find_shim_headers("aarch64")
    assert setup.write_ninja("c++", None, None, (), cpp=True, machine="aarch64") == ["libulr_cpu.so"]
    text = (setup.BUILD.with_name("native-aarch64") / "build.ninja").read_text()
    assert set(re.findall(r"-DULR_ISA=(\w+)", text)) == {"portable", "neon"} and "bindings" not in text


@pytest.mark.parametrize(
    ("compiler", "tag"), [("x86_64-linux-gnu", "linux_x86_64"), ("aarch64-linux-gnu", "linux_aarch64")]
)
def test_a_wheel_is_for_every_python_on_the_compilers_processor(compiler, tag, setup, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(setup, "MACHINE", "x86_64")
    monkeypatch.setenv("CXX", tool(tmp_path, "c++", compiler))
    step = setup.ForEveryPython(setuptools.Distribution({"ext_modules": [setuptools.Extension("m", [])]}))
    step.plat_name = "linux_x86_64"
    step.plat_name_supplied, step.root_is_pure = True, False
    assert step.get_tag() == ("py3", "none", tag)


def test_the_version_is_built_into_the_libraries(setup) -> None:
    setup.write_ninja("c++", [], None, (), cpp=True, machine=setup.MACHINE)
    assert f"-DULR_VERSION={setup.VERSION}\n" in (setup.BUILD / "build.ninja").read_text()
    assert setup.VERSION == ulr_kernels.__version__


def test_the_line_says_that_ctypes_takes_the_place_of_a_missing_shim(setup) -> None:
    tools = setup.Tools(compiler="g++ 12", absent={"_C": "pybind11 was not found when the package was built"})
    assert setup.plan_of(tools, {"cpp"}) == (
        "ulr_kernels builds cpp kernels (g++ 12); no _C, so ctypes calls the libraries: pybind11 was not found when the"
        " package was built"
    )
