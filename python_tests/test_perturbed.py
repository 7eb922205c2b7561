"""The ops with weight noise: each against its definition in fp64, W' to the bit, and the weight left as it was."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy
import pytest
import test_ops
import torch
import torch.nn.functional as F
import truth
from samples import Sample, values
from test_ops import poison  # noqa: F401
from torch import Tensor

from ulr_kernels.ops import perturbed_conv2d, perturbed_embedding, perturbed_linear
from ulr_kernels.ops._op import FLOATS, OPS

PERTURBED = ("perturbed_linear", "perturbed_conv2d", "perturbed_embedding")

# --- truth: shared with no implementation but for the noise itself ----------------------------------------------------


def weight_noise(weight, key, copies=1, antithetic=False, rank=None, draw=0, mask=None, **spec) -> Tensor:
    """fp64 `[C, N, K]`: the noise of each copy's weight, of rank r: A B^T / sqrt(r)."""
    rows, cols = weight.shape[0], math.prod(weight.shape[1:])
    half = copies // 2 if antithetic else copies

    def one(copy: int) -> Tensor:
        sign = 1 if copy < half else -1
        return sign * truth.parameter_noise((rows, cols), key, rank, draw=draw + copy % half, **spec)

    eps = torch.stack([one(copy) for copy in range(copies)])
    return eps if mask is None else eps * mask.cpu().reshape(1, rows, cols)


def linear(x, weight, bias, sigma, key, *, copies=1, **how):
    added = sigma * weight_noise(weight, key, copies=copies, **how)
    weight = weight.cpu().double()
    x = truth.per_copy(x, copies)
    bias = torch.zeros(1).double() if bias is None else bias.cpu().double().expand(copies, -1)[:, None]
    y = torch.einsum("prk,pnk->prn", x, weight + added) + bias
    magnitude = torch.einsum("prk,pnk->prn", x.abs(), weight.abs() + added.abs() * math.sqrt(how.get("rank") or 1))
    return y, magnitude + bias.abs()


def conv2d(x, weight, bias, sigma, key, *, stride=1, padding=0, dilation=1, groups=1, copies=1, **how):
    added = (sigma * weight_noise(weight, key, copies=copies, **how)).view(copies, *weight.shape)
    weight = weight.cpu().double()
    x = x.cpu().double() if x.dim() == 5 else x.cpu().double().expand(copies, *x.shape)
    args = (stride, padding, dilation, groups)
    biases = [None] * copies if bias is None else list(bias.cpu().double().expand(copies, -1))
    y = torch.stack([F.conv2d(i, weight + e, b, *args) for i, e, b in zip(x, added, biases, strict=True)])
    magnitude = [
        F.conv2d(i.abs(), weight.abs() + e.abs(), None if b is None else b.abs(), *args)
        for i, e, b in zip(x, added, biases, strict=True)
    ]
    return y, torch.stack(magnitude)


def embedding(indices, weight, sigma, key, *, copies=1, **how):
    added = sigma * weight_noise(weight, key, copies=copies, **how)
    indices = indices.cpu().expand(copies, -1)
    weight = weight.cpu().double()
    chosen = [(weight + e)[i] for e, i in zip(added, indices, strict=True)]
    magnitude = [(weight.abs() + e.abs() * (how.get("rank") or 1))[i] for e, i in zip(added, indices, strict=True)]
    return torch.stack(chosen), torch.stack(magnitude)


TRUTH = {"perturbed_linear": linear, "perturbed_conv2d": conv2d, "perturbed_embedding": embedding}


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("op,sample_id", [(op, i) for op in PERTURBED for i in test_ops.samples(op, good=True)])
def test_perturbed(op, sample_id, dtype, device) -> None:
    compare(op, test_ops.pick(op, sample_id, device, dtype))


def compare(op: str, sample: Sample) -> Tensor:
    """Run a sample; its output, found to be within rounding of the definition, with its inputs as they were."""
    before = [a.clone() if isinstance(a, Tensor) else a for a in sample.args]
    y = OPS[op].function(*sample.args, **sample.kwargs)
    for a, b in zip(sample.args, before, strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b)
    value, magnitude = TRUTH[op](*sample.args, **sample.kwargs)
    assert y.shape == value.shape
    weight = sample.args[1]
    terms = 1 if op == "perturbed_embedding" else math.prod(weight.shape[1:])
    allowed = truth.tolerance(value, magnitude, weight.dtype, weight.dtype, terms + (sample.kwargs.get("rank") or 0))
    error = (y.cpu().double() - value).abs()
    assert not (error.isnan() | (error > allowed)).any(), f"worst {(error / allowed).max():.3g} of the tolerance"
    return y


def large(op: str, dtype: torch.dtype) -> Iterator[Sample]:
    """Calls of several tiles along every axis, which the ops' own samples are too small for."""

    def v(seed: int, *shape: int) -> Tensor:
        return values(seed, *shape, device="cpu", dtype=dtype)

    pairs = {"copies": 2, "antithetic": True}
    if op == "perturbed_conv2d":
        images, filters = v(1, 2, 5, 14, 13), v(2, 70, 5, 3, 3)
        yield Sample("tiles", (images, filters, v(3, 70), 0.1, 11), {**pairs, "padding": 1, "col_offset": 27})
        grouped = {"groups": 2, "dist": "rademacher", "dilation": 2, "padding": "same", "col_offset": 100}
        yield Sample("groups", (v(4, 2, 1, 4, 13, 12), v(5, 140, 2, 3, 4), None, 0.1, 11), {**pairs, **grouped})
        yield Sample("low-rank", (images, filters, None, 0.1, 11), {"rank": 3, "row_offset": 37, "col_offset": 5})
    if op != "perturbed_linear":
        return
    wide = (v(1, 140, 150), v(2, 150, 150), v(3, 150), 0.1, 11)
    yield Sample("tiles", wide, {"copies": 2, "col_offset": 64})
    yield Sample("tiles-signs", wide, {**pairs, "dist": "rademacher", "col_offset": 40})
    yield Sample("pairs", (v(4, 2, 140, 70), v(5, 140, 70), v(6, 2, 140), 0.1, 11), pairs)
    yield Sample("low-rank", wide, {**pairs, "rank": 10, "row_offset": 37, "col_offset": 5})


def exact_weight(weight: Tensor, eps: Tensor, sigma: float) -> Tensor:
    """round_to_dtype(fma(sigma, eps, W)) by 80-bit arithmetic: the product is exact, the sum's 64 bits are rounded to
    fp32 as the exact sum's would but for one case in 2^40."""
    sigma = numpy.float32(sigma)
    total = eps.numpy().astype(numpy.longdouble) * sigma + weight.float().numpy().astype(numpy.longdouble)
    return torch.from_numpy(total.astype(numpy.float32)).to(weight.dtype)


def shown_weight(op: str, weight: Tensor, rows: int, **how) -> Tensor:
    """W' [2, N, K] of a pair, by a product with the identity, `rows` rows of it at a time, or by gathering all rows."""
    if op == "perturbed_embedding":
        return perturbed_embedding(torch.arange(len(weight), device=weight.device), weight, 0.37, 5, **how)
    x = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    parts = x.split(rows)
    if op == "perturbed_linear":
        return torch.cat([perturbed_linear(part, weight, None, 0.37, 5, **how) for part in parts], 1).mT
    filters = weight[:, :, None, None]
    images = [perturbed_conv2d(part[:, :, None, None], filters, None, 0.37, 5, **how) for part in parts]
    return torch.cat(images, 1)[..., 0, 0].mT


@pytest.mark.parametrize("dist", ["normal", "rademacher"])
@pytest.mark.parametrize("op", PERTURBED)
def test_the_perturbed_weight_to_the_bit(op, dist, device) -> None:
    at = {"copies": 2, "antithetic": True, "dist": dist, "draw": 7, "row_offset": 2}
    ways = (8, 40) if op == "perturbed_linear" else (40,)  # few rows, and many
    for dtype, rows, col_offset in itertools.product(FLOATS, ways, (6, 16)):
        weight = values(3, 21, 40, device=device, dtype=dtype)
        found = shown_weight(op, weight, rows, col_offset=col_offset, **at).cpu()
        eps = truth.noise((21, 40), 5, dist=dist, draw=7, row_offset=2, col_offset=col_offset)
        for copy, sign in enumerate((1, -1)):
            assert torch.equal(found[copy], exact_weight(weight.cpu(), sign * eps, 0.37))


@pytest.mark.parametrize("op", PERTURBED)
@pytest.mark.parametrize("rank", [None, 2])
def test_a_minus_probe_is_the_second_of_a_pair(op, rank, device) -> None:
    sample = test_ops.pick(op, "one", device, torch.float32)
    *args, sigma, key = sample.args
    pair = OPS[op].function(*args, sigma, key, copies=2, antithetic=True, rank=rank)
    for copy, scale in enumerate((sigma, -sigma)):
        alone = OPS[op].function(*args, scale, key, rank=rank)[0]
        torch.testing.assert_close(alone, pair[copy], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("rows", [3, 50])
def test_slices_make_their_part_of_the_whole(rows, rank, device) -> None:
    """Shards of a weight, and chunks of a population, see the noise of the undivided call."""
    x, weight = (values(s, *shape, device=device, dtype=torch.float32) for s, shape in ((1, (rows, 40)), (2, (24, 40))))
    whole = perturbed_linear(x, weight, None, 0.5, 5, copies=4, rank=rank)
    close = {"rtol": 1e-4, "atol": 1e-4}
    features = perturbed_linear(x, weight[7:], None, 0.5, 5, copies=4, rank=rank, row_offset=7)
    torch.testing.assert_close(features, whole[..., 7:], **close)
    left = perturbed_linear(x[:, :17], weight[:, :17], None, 0.5, 5, copies=4, rank=rank)
    right = perturbed_linear(x[:, 17:], weight[:, 17:], None, 0.5, 5, copies=4, rank=rank, col_offset=17)
    torch.testing.assert_close(left + right, whole, **close)
    torch.testing.assert_close(
        perturbed_linear(x, weight, None, 0.5, 5, copies=2, rank=rank, draw=2), whole[2:], **close
    )


@pytest.mark.parametrize("op", PERTURBED)
def test_pathwise_gradients(op, device) -> None:
    """Against autograd of the noiseless layer at W + sigma * eps, with the noise as a constant."""
    sample = test_ops.pick(op, "pairs", device, torch.float32)
    *tensors, sigma, key = sample.args
    kwargs = {k: v for k, v in sample.kwargs.items() if k in ("stride", "padding", "dilation", "groups")}
    tensors = [t if t.dtype == torch.int64 else t.clone().requires_grad_() for t in tensors]
    sigma = torch.tensor(sigma, device=device, requires_grad=True)
    leaves = [t for t in (*tensors, sigma) if t.requires_grad]
    ours = torch.autograd.grad(OPS[op].function(*tensors, sigma, key, **sample.kwargs).square().sum(), leaves)
    x, weight, *bias = tensors
    how = {k: v for k, v in sample.kwargs.items() if k not in kwargs}
    eps = weight_noise(weight, key, **how).float().view(-1, *weight.shape).to(device)
    layer = {"perturbed_linear": F.linear, "perturbed_conv2d": F.conv2d, "perturbed_embedding": F.embedding}[op]
    x = x.expand(4, *x.shape) if x.dim() == {"perturbed_linear": 2, "perturbed_conv2d": 4}.get(op, 1) else x
    copies = (layer(x[p], weight + sigma * e, *(b[p] for b in bias), **kwargs) for p, e in enumerate(eps))
    theirs = torch.autograd.grad(torch.stack(list(copies)).square().sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("op", ["perturbed_linear", "perturbed_conv2d"])
def test_pathwise_gradients_under_autocast(op, device) -> None:
    """The input of an inner layer comes in the narrow type, its weight and bias in the wide one."""
    sample = test_ops.pick(op, "pairs", device, torch.float32)
    x, weight, bias, *rest = sample.args
    grads = []
    for narrow in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x.bfloat16() if narrow else x, weight, bias)]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=narrow):
            y = OPS[op].function(*leaves, *rest, **sample.kwargs)
        grads.append(torch.autograd.grad(y.float().sum(), leaves))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.03, atol=0.1)
