"""The convolutions of the cpp back end: instruction sets, threads, memory. Their results are in test_conv.py."""

from __future__ import annotations

import pytest
import torch
from test_cpp_backend import ISAS, MEGABYTE, peak_bytes, restore, values  # noqa: F401
from torch import Tensor

import ulr_kernels as ulr
from ulr_kernels.backends import cpp
from ulr_kernels.backends.cpp import conv

pytestmark = pytest.mark.pair("cpp/cpu")


def images(*shape: int, key: int = 1, dtype: torch.dtype = torch.float32, last: bool = False) -> Tensor:
    made = values(*shape, key=key).to(dtype)
    return made.to(memory_format=torch.channels_last) if last else made


def everything(dtype: torch.dtype, dist: str, last: bool, features: int, height: int) -> list[Tensor]:
    """Each output but grad_weight, a product over the pixels, which oneDNN may split by threads. With one input a clean
    output is one multiplication: exact to the bit."""
    x, weight = images(3, 1, height, 7, dtype=dtype, last=last), values(features, 1, 1, 1, key=2).to(dtype)
    own_x = torch.stack([x] * 6)
    noise = {"dist": dist, "col_offset": 2}
    results = [ulr.ops.noisy_conv2d(own_x, weight, None, 0.3, 6, copies=6, antithetic=True, **noise)]
    buffers = [torch.zeros(features, 1, 1, 1), torch.zeros(features)]
    log_sigma = None if dist == "rademacher" else torch.zeros(())
    results.append(
        ulr.ops.noisy_conv2d_recompute_(
            *buffers, x, weight, None, values(6, 3), 0.3, 6, grad_log_sigma=log_sigma, **noise
        )
    )
    return [*results, buffers[1], *([] if log_sigma is None else [log_sigma])]


@pytest.mark.parametrize("dist", ["normal", "laplace", "rademacher"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(("features", "height"), [(150, 3), (5, 40)])
def test_instruction_sets_and_threads_give_the_same_bits(dist: str, last: bool, features: int, height: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_num_threads(1)
        cpp.set_isa("portable")
        expected = everything(dtype, dist, last, features, height)
        for isa in ISAS:
            cpp.set_isa(isa)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                for result, want in zip(everything(dtype, dist, last, features, height), expected, strict=True):
                    assert torch.equal(result, want), (isa, threads)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("own_x", [False, True])
def test_a_forward_allocates_its_output_and_a_chunk(own_x: bool, last: bool) -> None:
    x = images(32, 32, 32, 32, last=last)
    x = x.expand(8, *x.shape) if own_x else x
    weight = values(32, 32, 3, 3)
    output = 8 * 32 * 32 * 32 * 32 * 4
    peak = peak_bytes(lambda: ulr.ops.noisy_conv2d(x, weight, None, 0.1, 3, copies=8, padding=1))
    assert output <= peak <= output + 4 * 4 * conv.CHUNK


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_a_gradient_allocates_chunks(last: bool) -> None:
    x, loss_weight, buffer = images(64, 32, 32, 32, last=last), values(16, 64), torch.zeros(32, 32, 3, 3)

    def call() -> None:
        ulr.ops.noisy_conv2d_grad_(buffer, None, x, loss_weight, 0.1, 3, padding=1, antithetic=True)

    # Stored noise of 16 copies, half of them where antithetic: 64 MiB.
    assert peak_bytes(call) <= 4 * 4 * conv.CHUNK <= 8 * MEGABYTE


def test_samples_of_several_images_and_parts_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks end where samples do, or lie within one."""
    x, weight = values(12, 2, 4, 5), values(3, 2, 1, 1)
    for positions in (4, 8, 20, 60, 240):
        loss_weight = values(2, 240 // positions)

        def gradient(loss_weight: Tensor = loss_weight, positions: int = positions) -> Tensor:
            buffer = torch.zeros_like(weight)
            ulr.ops.noisy_conv2d_grad_(buffer, None, x, loss_weight, 0.1, 3, positions=positions)
            return buffer

        expected = gradient()
        for images_of_chunk in (1, 2, 5):
            monkeypatch.setattr(conv, "CHUNK", 60 * images_of_chunk)
            torch.testing.assert_close(gradient(), expected, rtol=1e-5, atol=1e-5)
        monkeypatch.undo()
