"""The (back end, device) matrix. A pair that cannot run is skipped with the reason, or fails where it is required."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator

import pytest
import torch
from arm_emulation import emulation

import ulr_kernels as ulr
from ulr_kernels import dispatch

# Pairs that this process runs by choosing a back end, and pairs that tests run in a process or a library of their own.
HERE = ("torch/cpu", "cpp/cpu", "torch/cuda", "cuda/cuda", "triton/cuda")
APART = ("cuda/emulated", "triton/interpreted", "cpp/arm")
OWN_DEVICE = {"torch": "cpu", "cpp": "cpu", "cuda": "cuda", "triton": "cuda"}


def why_absent(pair: str) -> str | None:
    backend, device = pair.split("/")
    if pair == "cuda/emulated":
        return None if shutil.which("g++") else "no g++ to compile the emulation"
    if pair == "triton/interpreted":
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    if pair == "cpp/arm":
        missing = [tool for tool in emulation.TOOLS if shutil.which(tool) is None]
        return f"{' and '.join(missing)} cannot be found" if missing else why_absent("cpp/cpu")
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    provider = dispatch.find(backend, "noise", device)
    return provider if isinstance(provider, str) else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        default="",
        help="comma-separated back ends or pairs (cuda, triton/interpreted) whose absence is a failure, not a skip",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "pair(name): the (back end, device) pair that the test needs")
    required = [name.strip() for name in config.getoption("--require").split(",") if name.strip()]
    pairs = {name if "/" in name else f"{name}/{OWN_DEVICE.get(name, '?')}" for name in required}
    if unknown := sorted(pairs - set(HERE) - set(APART)):
        raise pytest.UsageError(f"--require: unknown {', '.join(unknown)}; known: {', '.join(HERE + APART)}")
    config.stash[_REQUIRED] = pairs
    torch.backends.cudnn.allow_tf32 = False  # the convolutions that ours are held to would keep 10 bits of fp32
    if workers := getattr(config, "workerinput", {}).get("workercount"):  # processes of pytest-xdist share the cores
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


_REQUIRED = pytest.StashKey[set[str]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "pair" in metafunc.fixturenames:
        metafunc.parametrize("pair", [pytest.param(p, marks=pytest.mark.pair(p)) for p in HERE])


def _leave_a_lost_device(config: pytest.Config) -> None:
    """After a kernel's illegal access every call of the process fails: the tests that are left would all be blamed.
    pytest-xdist puts a new process in the place of one that ends; without it the run ends here."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        why = f"an earlier test has ended the device for this process: {error}"
        if hasattr(config, "workerinput"):
            print(why, file=sys.__stderr__, flush=True)
            os._exit(1)
        pytest.exit(why, returncode=1)


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("pair")
    if marker is None:
        return
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        _leave_a_lost_device(item.config)
    reason = why_absent(marker.args[0])
    if reason is None:
        return
    if marker.args[0] in item.config.stash[_REQUIRED]:
        pytest.fail(f"required pair {marker.args[0]} is absent: {reason}", pytrace=False)
    pytest.skip(f"{marker.args[0]}: {reason}")


@pytest.fixture
def device(pair: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The pair's device, with the pair's back end chosen for the length of the test."""
    backend, name = pair.split("/")
    op = request.node.callspec.params.get("op")
    if op is not None and isinstance(reason := dispatch.find(backend, op, name), str):
        pytest.skip(f"{pair}: {reason}")
    with ulr.use_backend(backend):
        yield name


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of small tensors, where waiting for other threads would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def untouched_global_generator() -> Iterator[None]:
    """No code of the library may touch torch's global generator."""
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state()), "torch's global generator was touched"
