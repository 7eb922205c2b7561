"""The tests of the ops and of the contract on the Triton kernels, run by Triton's interpreter on the CPU.

Not collected by itself: `test_triton.py` runs it in a process of its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_ops
import torch
from test_contract import (  # noqa: F401 -- collected here, with this module's device
    test_fold_in_on_host_and_device,
    test_frozen_vectors,
    test_philox_known_answers,
    test_quantile_noise_by_exact_arithmetic,
    test_signs_by_integers,
)
from test_ops import (  # noqa: F401
    poison,
    test_a_slice_makes_its_part_of_the_whole,
    test_forward_noise_is_the_noise_op,
    test_integer_ops_are_bitwise_the_reference,
    test_noise_is_bitwise_the_contract,
)

from ulr_kernels import use_backend
from ulr_kernels.backends.triton import tiles
from ulr_kernels.ops import noisy_linear

# Every sample in fp32; in the half types, whose products alone differ, the samples that make the kernel take other ways.
HALF = ("separate", "signs", "wide", "strided", "same-dtype", "no-inputs")


@pytest.fixture
def device() -> Iterator[str]:
    with use_backend("triton"):
        yield "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", test_ops.LINEAR)
def test_linear(op, dtype, device) -> None:
    for sample_id in test_ops.samples(op, good=True):
        if dtype == torch.float32 or sample_id in HALF:
            test_ops.test_linear(op, sample_id, dtype, device)


def test_the_tile_does_not_enter_the_noise(device, monkeypatch) -> None:
    x, weight = torch.zeros(40, 1), torch.zeros(130, 1)
    expected = noisy_linear(x, weight, None, 1.0, 5, copies=4, antithetic=True)
    monkeypatch.setitem(tiles.FORWARD, ("normal", 4), tiles.Tile(16, 128, 16, 4, 1))
    monkeypatch.setattr(tiles, "PROGRAMS", 1)
    assert torch.equal(expected, noisy_linear(x, weight, None, 1.0, 5, copies=4, antithetic=True))


def test_gradients_repeat_bitwise(device) -> None:
    sample = test_ops.pick("noisy_linear_grad_", "log-sigma", "cpu", torch.float32)

    def gradients() -> list[torch.Tensor]:
        buffers = [b.clone() for b in sample.args[:2]]
        scalar = sample.kwargs["grad_log_sigma"].clone()
        test_ops.OPS["noisy_linear_grad_"].function(
            *buffers, *sample.args[2:], **{**sample.kwargs, "grad_log_sigma": scalar}
        )
        return [*buffers, scalar]

    for first, second in zip(gradients(), gradients(), strict=True):
        assert torch.equal(first, second)
