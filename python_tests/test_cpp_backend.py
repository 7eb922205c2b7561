"""Instruction sets, threads and memory of the cpp back end. Its results are tested in test_ops.py."""

from __future__ import annotations

import ctypes
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import ulr_kernels as ulr
from ulr_kernels import dispatch, products
from ulr_kernels.backends import _native, cpp
from ulr_kernels.backends.cpp import linear

pytestmark = pytest.mark.pair("cpp/cpu")
ISAS = () if isinstance(dispatch.find("cpp", "noise", "cpu"), str) else tuple(cpp.available_isas())
MEGABYTE = 2**20


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    threads = torch.get_num_threads()
    with ulr.use_backend("cpp"):
        yield
    torch.set_num_threads(threads)
    cpp.set_isa(None)


def values(*shape: int, key: int = 1) -> Tensor:
    return ulr.noise(shape, key)


def everything(dtype: torch.dtype, dist: str, rows: int, features: int) -> list[Tensor]:
    """Noise, and each output of the linear ops. With one input a product is one multiplication: exact to the bit."""
    x = values(rows, 1).to(dtype)
    weight, bias = values(features, 1, key=2).to(dtype), values(features, key=3).to(dtype)
    loss_weight = values(6, rows, key=4)
    results = [ulr.noise((rows, features), 5, dist=dist, row_offset=3, col_offset=129)]
    results.append(ulr.ops.noisy_linear(x, weight, bias, 0.3, 6, copies=6, antithetic=True, dist=dist, col_offset=2))
    results.append(ulr.ops.noisy_linear(x.expand(6, rows, 1), weight, None, 0.3, 6, copies=6, dist=dist))
    buffers = [torch.zeros(features, 1), torch.zeros(features)]
    log_sigma = None if dist == "rademacher" else torch.zeros(())
    results.append(
        ulr.ops.noisy_linear_recompute_(
            *buffers, x, weight, bias, loss_weight, 0.3, 6, dist=dist, grad_log_sigma=log_sigma
        )
    )
    # grad_weight is left out: it is a product over the rows, which oneDNN may split by threads.
    return [*results, buffers[1], *([] if log_sigma is None else [log_sigma])]


@pytest.mark.parametrize("dist", ["normal", "laplace", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "features"), [(70, 10), (33, 150), (3, 1100)])
def test_instruction_sets_and_threads_give_the_same_bits(
    dist: str, dtype: torch.dtype, rows: int, features: int
) -> None:
    torch.set_num_threads(1)
    cpp.set_isa("portable")
    expected = everything(dtype, dist, rows, features)
    for isa in ISAS:
        cpp.set_isa(isa)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for result, want in zip(everything(dtype, dist, rows, features), expected, strict=True):
                assert torch.equal(result, want), (isa, threads)


def test_plain_threads_replace_a_missing_openmp() -> None:
    torch.set_num_threads(3)
    expected = values(300, 1000)
    library = _native.library("cpp")
    assert isinstance(library, ctypes.CDLL)
    library.ulr_cpu_set_omp_parallel(None)
    try:
        assert torch.equal(values(300, 1000), expected)
    finally:
        library.ulr_cpu_set_omp_parallel(cpp._omp_parallel())


def test_torchs_openmp_is_found() -> None:
    if "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("this torch has no OpenMP")
    assert cpp._omp_parallel() is not None


def test_on_macos_openmp_is_found_through_torchs_dylib(tmp_path, monkeypatch) -> None:
    found = cpp._omp_parallel()
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libtorch_cpu.dylib").symlink_to(pathlib.Path(torch.__file__).parent / "lib/libtorch_cpu.so")
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    assert cpp._omp_parallel() is None  # no libtorch_cpu.so
    monkeypatch.setattr(_native, "SHARED", ".dylib")
    here = cpp._omp_parallel()
    assert (here and here.value) == (found and found.value)


def test_an_instruction_set_that_is_not_here_is_refused() -> None:
    with pytest.raises(ValueError, match="'isa' must be one of .*portable, got 'sse9'"):
        cpp.set_isa("sse9")
    assert cpp.isa() == cpp.available_isas()[0]


def test_the_environment_leaves_out_better_instruction_sets() -> None:
    def isas(most: str) -> subprocess.CompletedProcess:
        program = "from ulr_kernels.backends import cpp; print(cpp.isa(), cpp.available_isas())"
        environment = {**os.environ, "ULR_MAX_CPU_ISA": most}
        return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)

    available = cpp.available_isas()
    for place, name in enumerate(available):
        assert isas(name).stdout.strip() == f"{name} {available[place:]}"
    assert "ULR_MAX_CPU_ISA must be one of" in isas("sse9").stderr


# ---------------------------------------------------------------------------------------------------------------------
# Memory.


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that torch's allocator held during a call beyond what it held before, results included."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        keep = call()
    del keep
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def strided(*shape: int) -> Tensor:
    return values(*(2 * size for size in shape))[tuple(slice(None, None, 2) for _ in shape)]


def test_the_measure_sees_a_copy() -> None:
    x = strided(512, 512)
    assert peak_bytes(lambda: x.contiguous()) >= MEGABYTE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own_x", [False, True])
@pytest.mark.parametrize("antithetic", [False, True])
def test_a_forward_allocates_its_output_and_tiles(dtype: torch.dtype, own_x: bool, antithetic: bool) -> None:
    x = values(8, 2048, 16).to(dtype) if own_x else values(2048, 16).to(dtype)
    weight = values(1024, 16).to(dtype)
    output = 8 * 2048 * 1024 * dtype.itemsize
    peak = peak_bytes(lambda: ulr.ops.noisy_linear(x, weight, None, 0.1, 3, copies=8, antithetic=antithetic))
    assert output <= peak <= output + 2 * 4 * linear.FORWARD_TILE + MEGABYTE


def test_one_copy_becomes_the_output_without_a_second_tensor() -> None:
    x, weight = values(2048, 16), values(2048, 16)
    assert peak_bytes(lambda: ulr.ops.noisy_linear(x, weight, None, 0.1, 3)) <= 4 * 2048 * 2048 + MEGABYTE


@pytest.mark.parametrize("antithetic", [False, True])
def test_a_gradient_allocates_tiles(antithetic: bool) -> None:
    x, loss_weight, buffer = values(128, 784), values(64, 128), torch.zeros(512, 784)

    def call() -> None:
        ulr.ops.noisy_linear_grad_(buffer, None, x, loss_weight, 0.1, 3, antithetic=antithetic)

    # An eager gradient stores the noise of 64 copies: 16 MiB, 8 where antithetic. A twentieth of the latter:
    assert peak_bytes(call) < 8 * MEGABYTE // 10


@pytest.mark.parametrize("forward", [True, False])
def test_strided_operands_are_copied_by_tiles_only(forward: bool) -> None:
    x, weight, buffer = strided(4096, 1024), strided(1024, 1024), strided(1024, 1024)
    loss_weight = strided(2, 4096)
    tile = 4 * (linear.FORWARD_TILE if forward else linear.GRADIENT_TILE)
    output = 2 * 4096 * 1024 * 4 if forward else 0

    def call() -> Tensor | None:
        if forward:
            return ulr.ops.noisy_linear(x, weight, None, 0.1, 3, copies=2)
        ulr.ops.noisy_linear_grad_(buffer, None, x, loss_weight, 0.1, 3)
        return None

    assert peak_bytes(call) <= output + 4 * tile + MEGABYTE


def test_onednn_gets_dense_weights_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other stride takes its reference implementation, thousands of times slower."""
    seen = []
    call = products._call

    def checked(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(weight.is_contiguous() or weight.T.is_contiguous())
        return call(x, weight, bias)

    monkeypatch.setattr(products, "_call", checked)
    monkeypatch.setattr(products, "_adds_by_onednn", lambda: True)
    for weight in (strided(64, 48), values(64, 96)[:, :48], values(48, 64).T, values(48, 128).T[:64]):
        for x in (strided(40, 48), values(48, 40).T):
            ulr.ops.noisy_linear(x, weight, None, 0.1, 3)
            ulr.ops.noisy_linear_recompute_(weight.clone(), None, x, weight, None, values(2, 40), 0.1, 3)
    assert len(seen) >= 16 and all(seen)


@pytest.mark.parametrize("bias", [values(10, key=3)[::2], values(1, key=3).expand(5)], ids=["strided", "expanded"])
def test_a_bias_may_have_any_stride(bias: Tensor) -> None:
    """oneDNN reads as many numbers as there are features from its first one on."""
    x, weight = values(20, 6), values(5, 6, key=2)
    torch.testing.assert_close(products.linear(x, weight, bias), x @ weight.T + bias)


def test_a_product_of_parameters_records_no_graph() -> None:
    weight = values(5, 4).requires_grad_()
    x, buffer = values(3, 4, key=9).requires_grad_(), torch.zeros(5, 4)
    y = torch.ops.ulr.noisy_linear(x, weight, None, torch.tensor(0.1), torch.tensor(3))
    ulr.ops.noisy_linear_grad_(buffer, None, x, values(2, 3), 0.1, 3)
    assert not buffer.requires_grad and y.shape == (1, 3, 5)
