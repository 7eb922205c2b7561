"""The noisy convolutions against their definition in fp64, over their samples, on every back end that can run here."""

from __future__ import annotations

import conv_truth
import pytest
import test_ops
import torch
import torch.nn.functional as F
import truth
from samples import Sample, values
from test_ops import clone, pick, poison, samples  # noqa: F401

import ulr_kernels as ulr
from ulr_kernels.ops import noise, noisy_conv2d, noisy_conv2d_grad_, noisy_conv2d_recompute_
from ulr_kernels.ops._op import FLOATS

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
CONV = ("noisy_conv2d", "noisy_conv2d_grad_", "noisy_conv2d_recompute_")


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("op,sample_id", [(op, i) for op in CONV for i in samples(op, good=True)])
def test_conv(op, sample_id, dtype, device) -> None:
    compare_conv(op, pick(op, sample_id, device, dtype))


def compare_conv(op: str, sample: Sample) -> list[torch.Tensor]:
    """Run a sample on the back end in use; its outputs, found to be within rounding of the definition."""
    return test_ops.compare(op, sample, conv_truth, buffers=0 if op == "noisy_conv2d" else 2)


def test_a_slice_makes_its_part_of_the_whole(device) -> None:
    """Batch splits, channel shards and chunks of copies see the noise of the undivided call."""
    x, w = torch.zeros(5, 1, 4, 6, device=device), torch.zeros(40, 1, 2, 3, device=device)
    whole = noisy_conv2d(x, w, None, 1.0, 5, copies=6)
    images = noisy_conv2d(x[2:4], w, None, 1.0, 5, copies=6, row_offset=2 * 3 * 4)
    channels = noisy_conv2d(x, w[9:], None, 1.0, 5, copies=6, col_offset=9)
    draws = noisy_conv2d(x, w, None, 1.0, 5, copies=2, draw=4)
    assert torch.equal(whole[:, 2:4], images) and torch.equal(whole[:, :, 9:], channels)
    assert torch.equal(whole[4:], draws)
    pairs = noisy_conv2d(x, w, None, 1.0, 5, copies=12, antithetic=True)
    assert torch.equal(pairs[:6], whole) and torch.equal(pairs[6:], -whole)


@pytest.mark.parametrize("dist", ["normal", "rademacher"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_noise_is_the_noise_op_whatever_the_memory_format(dist, last, device) -> None:
    """Rows are (image, y, x), columns are channels."""
    x, w = torch.zeros(3, 2, 5, 7, device=device), torch.zeros(150, 2, 2, 2, device=device)
    if last:
        x = x.to(memory_format=torch.channels_last)
    y = noisy_conv2d(x, w, None, 1.0, 77, copies=2, dist=dist)
    assert y[0].is_contiguous(memory_format=torch.channels_last) == last
    for copy in range(2):
        eps = noise((3 * 4 * 6, 150), 77, draw=copy, dist=dist, device=device)
        assert torch.equal(y[copy].permute(0, 2, 3, 1).reshape(-1, 150), eps)


def test_replay_is_forward_and_gradient(device) -> None:
    x, w, b = (
        values(i, *s, device=device, dtype=torch.float32) for i, s in enumerate(((2, 3, 6, 5), (8, 3, 3, 3), (8,)))
    )
    loss, window = values(4, 4, 2, device=device, dtype=torch.float32), {"stride": 2, "padding": 1, "antithetic": True}
    apart, together = [[torch.zeros_like(w), torch.zeros_like(b)] for _ in range(2)]
    y = noisy_conv2d(x, w, b, 0.3, 7, copies=4, **window)
    noisy_conv2d_grad_(*apart, x, loss, 0.3, 7, **window)
    replayed = noisy_conv2d_recompute_(*together, x, w, b, loss, 0.3, 7, **window)
    torch.testing.assert_close(replayed, y, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(together, apart, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_one_dimension_is_height_one(device) -> None:
    x, w = (values(i, *s, device=device, dtype=torch.float32) for i, s in enumerate(((2, 3, 20), (6, 3, 5))))
    y = noisy_conv2d(x[:, :, None], w[:, :, None], None, 0.0, 1, stride=(1, 2), padding=(0, 2), dilation=(1, 3))
    expected = F.conv1d(x, w, stride=2, padding=2, dilation=3)
    torch.testing.assert_close(y[0, :, :, 0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_pathwise_gradients(shared, transposed, device) -> None:
    """Against autograd of the same expression with the noise as a constant."""
    window = {"stride": 2, "output_padding": 1, "transposed": True} if transposed else {"padding": "same", "groups": 2}
    shapes = (2, 4, 5, 6) if shared else (4, 2, 4, 5, 6), (4, 6, 3, 2) if transposed else (6, 2, 3, 2), (6,), (6,)
    leaves = [values(i, *s, device=device, dtype=torch.float32) for i, s in enumerate(shapes)]
    leaves[3] = leaves[3].abs() + 0.1
    leaves = [t.requires_grad_() for t in leaves]
    y = noisy_conv2d(*leaves, 11, copies=4, antithetic=True, **window)
    grads = torch.autograd.grad(y.square().sum(), leaves)
    x, w, b, s = twins = [t.detach().clone().requires_grad_() for t in leaves]
    rows = y.shape[1] * y.shape[3] * y.shape[4]
    half = torch.stack([ulr.noise((rows, 6), 11, draw=c, device=device) for c in range(2)])
    eps = conv_truth.by_channel(torch.cat([half, -half]), y)
    x = x.expand(4, *x.shape) if shared else x
    z = torch.stack([conv_truth.convolve(image, w, **window) for image in x]) + (b + s * eps.movedim(2, -1)).movedim(
        -1, 2
    )
    for ours, theirs in zip(grads, torch.autograd.grad(z.square().sum(), twins), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_outputs_have_the_memory_format_of_torchs(device) -> None:
    x, w = torch.zeros(2, 3, 5, 6, device=device), torch.zeros(4, 3, 3, 3, device=device)
    for images in (x, x.to(memory_format=torch.channels_last)):
        for weight in (w, w.to(memory_format=torch.channels_last)):
            assert noisy_conv2d(images, weight, None, 0.1, 1)[0].stride() == F.conv2d(images, weight).stride()


def test_tolerance_sees_a_wrong_stride(device) -> None:
    """The comparison itself: a gradient whose output pixels are taken at the wrong place is far outside it."""
    sample = pick("noisy_conv2d_grad_", "stride", device, torch.float32)
    expected = conv_truth.noisy_conv2d_grad_(*sample.args, **sample.kwargs)[0]
    wrong = conv_truth.noisy_conv2d_grad_(*sample.args, **{**sample.kwargs, "padding": (0, 2)})[0][0]
    allowed = truth.tolerance(*expected, torch.float32, torch.float32, 400)
    assert ((wrong - expected[0]).abs() > 100 * allowed).float().mean() > 0.9
