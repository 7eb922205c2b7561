"""The built wheel and the source archive, away from their sources: a compiler at build time, and none at run time."""

from __future__ import annotations

import ctypes
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

ROOT = pathlib.Path(__file__).parents[1]
TORCH = str(pathlib.Path(torch.__file__).parents[1])  # the folder of this Python's packages
WHEEL_RUN = (ROOT / "python_tests/wheel_run.py", ROOT / "python_tests/vectors/noise_v1.json")
WHERE_IS_TORCH = """
import importlib.util, sysconfig
print(sysconfig.get_path("purelib"), importlib.util.find_spec("torch") is not None)
"""
PROGRAM = """
import sys, torch, ulr_kernels as ulr
assert not ulr.__file__.startswith({root!r}), ulr.__file__
y = ulr.ops.noisy_linear(torch.ones(4, 3), torch.ones(2, 3), None, 0.5, 7, copies=2)
assert y.shape == (2, 4, 2) and torch.isfinite(y).all()
assert torch.equal(ulr.ops.noisy_linear(torch.zeros(4, 3), torch.zeros(2, 3), None, 1.0, 7)[0], ulr.noise((4, 2), 7))
print(ulr.describe())
"""


def run(*command: object, folder: pathlib.Path, environment: dict[str, str]) -> str:
    """The output of a command that succeeds."""
    command = tuple(map(str, command))
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build_wheel(sources: pathlib.Path, folder: pathlib.Path, **environment: str) -> pathlib.Path:
    options = ("--quiet", "--no-deps", "--no-build-isolation", "-w", folder)
    command = (sys.executable, "-m", "pip", "wheel", *options, sources)
    run(*command, folder=folder, environment={**os.environ, **environment})
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A copy of the project: a build must not touch the tree that runs these tests."""
    sources = tmp_path_factory.mktemp("project") / "sources"
    skip = shutil.ignore_patterns(
        ".venv", "lib.*", "wheels", "dist", ".git", "_build_info.py", "__pycache__", "*.egg-info", "runs", ".*_cache"
    )
    shutil.copytree(ROOT, sources, ignore=skip)
    for built in (sources / "ulr_kernels").glob("*.so"):
        built.unlink()  # what ninja made in build/native stays, and is not made again
    return sources


@pytest.fixture(scope="module")
def archive(sources: pathlib.Path) -> pathlib.Path:
    """The source archive, unpacked."""
    folder = sources.parent / "archive"
    command = (sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder)
    run(*command, folder=sources, environment=dict(os.environ))
    (packed,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(packed, folder)
    return folder / packed.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sources: pathlib.Path) -> pathlib.Path:
    return build_wheel(sources, sources.parent, ULR_BUILD="cpp")


def install(wheel: pathlib.Path, folder: pathlib.Path, python: str) -> pathlib.Path:
    """Install a wheel, and nothing else, into a new environment of a Python; the Python of the environment."""
    there = folder / "environment/bin/python"
    run(python, "-m", "venv", "--without-pip", there.parents[1], folder=folder, environment={})
    options = ("--quiet", "--no-deps", "--no-index")
    command = (sys.executable, "-m", "pip", "--python", there, "install", *options, wheel)
    run(*command, folder=folder, environment={"HOME": str(folder)})
    return there


def run_installed(python: pathlib.Path, *arguments: object, packages: str, folder: pathlib.Path) -> str:
    """Run a program with no compiler to be found. `packages` is the folder that has torch, if it is there."""
    environment = {"PYTHONPATH": packages, "PATH": "/nonexistent", "HOME": str(folder)}
    return run(python, *arguments, folder=folder, environment=environment)


@pytest.mark.pair("cpp/cpu")
def test_wheel_with_kernels_runs_without_a_compiler(wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.endswith("libulr_cpu.so") for name in names)
    assert not any(name.startswith(("python_tests", "bench", "csrc")) for name in names)
    python = install(wheel, tmp_path, sys.executable)
    program = PROGRAM.format(root=str(ROOT)) + "import runpy; runpy.run_path(sys.argv[1], run_name='__main__')"
    printed = run_installed(python, "-c", program, *WHEEL_RUN, "train", packages=TORCH, folder=tmp_path)
    assert re.search(r"on cpu:\n  cpp +runs .*noisy_linear,", printed)
    assert str(tmp_path) in printed and "9 answers by pybind11" in printed


def pythons(minor: int) -> list[str]:
    """The commands that may be CPython 3.`minor`."""
    name = f"python3.{minor}"
    root = pathlib.Path(os.environ.get("PYENV_ROOT") or pathlib.Path.home() / ".pyenv")
    return [*filter(None, [shutil.which(name)]), *map(str, root.glob(f"versions/3.{minor}.*/bin/{name}"))]


@pytest.mark.pair("cpp/cpu")
@pytest.mark.parametrize("minor", [n for n in range(10, 16) if n != sys.version_info.minor])
def test_one_wheel_serves_every_python(minor: int, wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """It trains where that Python has torch. Elsewhere it opens the library and calls it, which needs no torch."""
    for command in pythons(minor):
        asked = subprocess.run([command, "-c", WHERE_IS_TORCH], capture_output=True, text=True)
        if asked.returncode == 0:  # pyenv has commands for versions that are not in use
            break
    else:
        pytest.skip(f"there is no Python 3.{minor} here")
    packages, has_torch = asked.stdout.split()
    train = ["train"] if has_torch == "True" else []
    python = install(wheel, tmp_path, command)
    printed = run_installed(python, *WHEEL_RUN, *train, packages=packages, folder=tmp_path)
    assert str(tmp_path) in printed and "9 answers by ctypes" in printed


@pytest.mark.pair("cpp/cpu")
def test_auditwheel_accepts_the_wheel_for_manylinux(wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """No library of the wheel needs a newer glibc or libstdc++ than other machines have (`make wheels`)."""
    tools = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    auditwheel = shutil.which("auditwheel", path=tools)
    if auditwheel is None:
        pytest.skip("auditwheel cannot be found (pip install '.[release]')")
    platform = f"manylinux_2_28_{os.uname().machine}"
    options = ("--only-plat", "--plat", platform, "--wheel-dir", tmp_path)
    run(auditwheel, "repair", *options, wheel, folder=tmp_path, environment={**os.environ, "PATH": tools})
    (repaired,) = tmp_path.glob("*.whl")
    assert repaired.name.endswith(f"-py3-none-{platform}.whl")
    before, after = ({n for n in zipfile.ZipFile(path).namelist() if n[-1] != "/"} for path in (wheel, repaired))
    assert before == after  # no library of this machine was added


def test_nvidias_runtime_in_a_wheel_needs_no_newer_glibc(tmp_path: pathlib.Path) -> None:
    """The copy of older_cudart.py, linked by a small library that calls it."""
    tools = ("nvcc", "c++", "objcopy", "objdump")
    if missing := [tool for tool in tools if shutil.which(tool) is None]:
        pytest.skip(f"{' and '.join(missing)} cannot be found")
    here = {"folder": tmp_path, "environment": dict(os.environ)}
    (tmp_path / "caller.cpp").write_text(
        """extern "C" int cudaGetDeviceCount(int*);
           extern "C" int devices() { int count = 0; cudaGetDeviceCount(&count); return count; }"""
    )
    run(sys.executable, ROOT / "csrc/tools/older_cudart.py", tmp_path / "cudart", **here)
    options = ("-shared", "-fPIC", "-pthread", "-Wl,--no-as-needed", "-L", tmp_path / "cudart")
    run("c++", *options, "caller.cpp", "-lcudart_static", "-o", "libcaller.so", **here)
    versions = re.findall(r"GLIBC_([\d.]+)\)", run("objdump", "-T", "libcaller.so", **here))
    assert versions and max(tuple(map(int, version.split("."))) for version in versions) <= (2, 28)
    library = ctypes.CDLL(str(tmp_path / "libcaller.so"), mode=os.RTLD_NOW)  # every symbol is found
    assert library.devices() >= 0


def test_source_archive_has_all_that_a_build_reads(archive: pathlib.Path, sources: pathlib.Path) -> None:
    packed = {path.relative_to(archive) for path in archive.rglob("*") if path.is_file()}
    read = {*(sources / "csrc").rglob("*.*"), *(sources / "ulr_kernels").rglob("*.py")}
    read |= {sources / name for name in ("setup.py", "pyproject.toml", "README.md")}
    assert packed >= {path.relative_to(sources) for path in read}
    assert not {path for path in packed if path.suffix in (".so", ".o") or path.name == "_build_info.py"}


def test_wheel_built_without_a_compiler_runs_on_torch(archive: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The wheel is built from the source archive."""
    wheel = build_wheel(archive, tmp_path, ULR_BUILD="", PATH=str(tmp_path), CXX="", CC="", CUDA_HOME=str(tmp_path))
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
    python = install(wheel, tmp_path, sys.executable)
    described = run_installed(python, "-c", PROGRAM.format(root=str(ROOT)), packages=TORCH, folder=tmp_path)
    assert re.search(r"on cpu:\n  torch +runs .*noisy_linear,.*\n  cpp +absent: no C\+\+ compiler", described)


def test_a_required_part_that_is_missing_is_an_error(sources: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)ULR_BUILD.*cpp"):
        build_wheel(sources, tmp_path, ULR_BUILD="cpp", PATH=str(tmp_path), CXX="", CC="")
