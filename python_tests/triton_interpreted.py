"""The tests of the ops and of the contract on the Triton kernels, run by Triton's interpreter on the CPU.

Not collected by itself: `test_triton.py` runs it in a process of its own, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Iterator

import fast_interpreter  # noqa: F401 -- for the time that it saves
import pytest
import test_linear_grads
import test_ops
import test_perturbed
import torch
from test_contract import (  # noqa: F401 -- collected here, with this module's device
    test_fold_in_on_host_and_device,
    test_frozen_vectors,
    test_orthogonal_signs_by_integers,
    test_philox_known_answers,
    test_quantile_noise_by_exact_arithmetic,
    test_signs_by_integers,
)
from test_conv import CONV, compare_conv
from test_noise_add import (
    FAMILY,
    everything,
    run_samples,
    test_memory_format_changes_no_bit_and_is_kept,  # noqa: F401
)
from test_noise_add import test_a_slice_makes_its_part_of_the_whole as test_a_slice_of_any_tensor  # noqa: F401
from test_ops import (  # noqa: F401
    poison,
    test_a_slice_makes_its_part_of_the_whole,
    test_forward_noise_is_the_noise_op,
    test_integer_ops_are_bitwise_the_reference,
    test_noise_is_bitwise_the_contract,
)
from test_parameters import (  # noqa: F401
    compare_bitwise,
    test_memory_format_does_not_enter,
    test_the_order_of_roundings_is_the_written_one,
)

from ulr_kernels import use_backend
from ulr_kernels.backends.triton import tiles
from ulr_kernels.ops import noisy_linear, noisy_linear_grad_
from ulr_kernels.ops._op import FLOATS

# Samples of the ops on lists that together take every way through their kernel.
LISTS = {
    "perturb_": ("normal", "offset-signs", "offset-hadamard", "rank-3", "rank-signs", "stochastic-rank", "mixed"),
    "combine_": (
        "rademacher",
        "none",
        "offsets",
        "rank-2",
        "momentum-strides",
        "adam-late",
        "adam-stochastic",
        "hadamard",
        "adam-hadamard",
    ),
}
# Every sample in fp32; in the half types, whose products alone differ, samples that take other ways in the kernel.
HALF_CONV = ("separate", "transposed", "signs")
HALF = ("separate", "signs", "wide", "strided", "same-dtype", "no-inputs")


@pytest.fixture
def device(one_thread) -> Iterator[str]:
    with use_backend("triton"):
        yield "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", test_ops.LINEAR)
def test_linear(op, dtype, device) -> None:
    for sample_id in test_ops.samples(op, good=True):
        if dtype == torch.float32 or sample_id in HALF:
            test_ops.test_linear(op, sample_id, dtype, device)


def test_gradients_of_several_layers(device) -> None:
    for sample_id in test_ops.samples("foreach_noisy_linear_grad_", good=True):
        test_linear_grads.compare(test_ops.pick("foreach_noisy_linear_grad_", sample_id, "cpu", torch.float32))
    test_linear_grads.compare(test_ops.pick("foreach_noisy_linear_grad_", "same-dtype", "cpu", torch.bfloat16))


@pytest.mark.parametrize("op", CONV)
def test_conv(op, device) -> None:
    for sample_id in test_ops.samples(op, good=True):
        compare_conv(op, test_ops.pick(op, sample_id, "cpu", torch.float32))
        if sample_id in HALF_CONV:
            for dtype in (torch.bfloat16, torch.float16):
                compare_conv(op, test_ops.pick(op, sample_id, "cpu", dtype))


@pytest.mark.parametrize("op", FAMILY)
def test_any_tensor(op, device) -> None:
    run_samples(op, "cpu", torch.float32)
    if op != "noise_score":
        run_samples(op, "cpu", torch.bfloat16)


def test_sums_over_rows_repeat_bitwise(device) -> None:
    first, second = (everything(torch.float32, "normal", (2, 70, 5, 7), 1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_tile_does_not_enter_the_noise(device, monkeypatch) -> None:
    x, weight = torch.zeros(40, 1), torch.zeros(130, 1)
    expected = noisy_linear(x, weight, None, 1.0, 5, copies=4, antithetic=True)
    monkeypatch.setitem(tiles.FORWARD, ("normal", 4), tiles.Tile(16, 128, 16, 4, 1))
    monkeypatch.setattr(tiles, "PROGRAMS", 1)
    assert torch.equal(expected, noisy_linear(x, weight, None, 1.0, 5, copies=4, antithetic=True))


def test_one_log_sigma_over_many_tiles(device) -> None:
    """Programs of several tiles of features add to one number: once each, and in an order that does not vary."""
    x, loss_weight = (test_ops.noise(shape, 3, device="cpu") for shape in ((9, 5), (4, 9)))
    weight = torch.zeros(300, 5)

    def gradient(shape: tuple[int, ...]) -> torch.Tensor:
        by_log_sigma = torch.zeros(shape)
        noisy_linear_grad_(weight, None, x, loss_weight, 0.5, 7, antithetic=True, grad_log_sigma=by_log_sigma)
        return by_log_sigma

    scalar = gradient(())
    assert torch.allclose(scalar, gradient((300,)).sum(), rtol=1e-5)
    assert torch.equal(scalar, gradient(()))


# Each takes another way in the kernels; the first two in all dtypes.
WEIGHT_NOISE = {
    "perturbed_linear": (
        *("pairs", "low-rank-wide", "separate", "signs", "mask-bytes", "offsets-many-rows", "low-rank-shared"),
        *("hadamard", "hadamard-many-rows"),
    ),
    "perturbed_conv2d": ("pairs", "signs", "depthwise", "mask", "channels-last", "strided", "low-rank", "hadamard"),
    "perturbed_embedding": ("pairs", "low-rank", "signs", "wide", "mask", "strided", "low-rank-signs", "hadamard"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("op", WEIGHT_NOISE)
def test_weight_noise(op, device) -> None:
    for place, sample_id in enumerate(WEIGHT_NOISE[op]):
        for dtype in FLOATS if place < 2 else (torch.float32,):
            test_perturbed.compare(op, test_ops.pick(op, sample_id, device, dtype))
    for sample in test_perturbed.large(op, torch.float32) if op == "perturbed_conv2d" else ():
        test_perturbed.compare(op, sample)
    test_perturbed.test_the_perturbed_weight_to_the_bit(op, "normal", device)


@pytest.mark.parametrize("op,sample_id", [(op, sample_id) for op, ids in LISTS.items() for sample_id in ids])
def test_lists_are_bitwise_the_reference(op, sample_id, device) -> None:
    compare_bitwise(op, sample_id, device, torch.bfloat16)
