"""perturbed_conv2d: a convolution with weight noise, without writing the weight."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ulr_kernels.ops import _conv, _perturbed
from ulr_kernels.ops._conv import Pair, Window
from ulr_kernels.ops._linear import values
from ulr_kernels.ops._op import Check, Cost, Op, Output, Sample, fp32_tensor, key_tensor, register
from ulr_kernels.ops._parameters import grid
from ulr_kernels.ops._perturbed import MEMBERS_SCHEMA, Members

# Of the schema: padding is (top, bottom, left, right).
WINDOW_SCHEMA = "int[2] stride=1, int[4] padding=0, int[2] dilation=1, int groups=1"


def perturbed_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: float | Tensor,
    key: int | Tensor,
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    members: int = 1,
    antithetic: bool = False,
    rank: int | None = None,
    dist: str = "normal",
    draw: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """y[p] = conv2d(x[p], W'_p) + b for each member p, W'_p = round_to_dtype(fma(sigma, eps_p, W)).

    The weight's noise is that of its view [O, I / groups * kh * kw]; low rank: as in `perturbed_linear`, W' rounded.

    Args:
        x: `[B, I, H, W]`, shared by the members, or `[P, B, I, H, W]`; fp32, bf16 or fp16; any strides.
        weight: `[O, I / groups, kh, kw]`, of x's dtype; any strides.
        bias: `[O]`, or `[P, O]` with one for each member, of x's dtype, or None. The caller perturbs it.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`; padding also "same" or "valid".
        sigma, key, members, antithetic, rank, dist, draw, row_offset, col_offset: as in `perturbed_linear`.
        mask: bool or uint8 of weight's shape: noise only where it is set; not with `rank`.

    Returns:
        `[P, B, O, H', W']` of x's dtype, channels last where x or the weight is. Differentiable in x, weight,
        bias and sigma (pathwise).

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above; nothing has been computed.
        NotImplementedError: an input carries a forward-mode tangent.
    """
    _conv.check_kernel(Check("perturbed_conv2d"), "weight", weight, False)
    kernel = weight.shape[2:]
    window = _conv.resolve_window("perturbed_conv2d", kernel, stride, padding, dilation, groups, False, 0)
    key = key_tensor("perturbed_conv2d", key, x.device)
    scale = fp32_tensor("perturbed_conv2d", "sigma", sigma, x.device)
    how = Members(members, antithetic, rank, dist, draw, row_offset, col_offset, mask)
    return _perturbed.call("perturbed_conv2d", window.convolve, 4, (x, weight, bias, scale), key, window[:4], how)


def window_of(stride: list[int], padding: list[int], dilation: list[int], groups: int) -> Window:
    return Window.of(stride, padding, dilation, groups, False)


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    key: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    *rest,
) -> Output:
    rules, how, window = Check("perturbed_conv2d"), Members(*rest), window_of(stride, padding, dilation, groups)
    _conv.check_kernel(rules, "weight", weight, False)
    _conv.check_window(rules, window)
    _perturbed.check_members(rules, weight, sigma, key, how)
    if x.dim() not in (4, 5):
        rules.fail("x", "be [B, I, H, W] or [P, B, I, H, W]", list(x.shape))
    if x.dim() == 5 and x.shape[0] != how.members:
        rules.fail("x", f"have {how.members} members on its first axis, or no such axis", list(x.shape))
    sizes = _conv.check_sizes(rules, x, weight.shape, window, how.members, "weight")
    rules.dtype("weight", weight, (x.dtype,))
    _perturbed.check_bias(rules, weight, bias, how.members)
    rules.device("x", x.device, weight=weight, bias=bias, sigma=sigma, key=key, mask=how.mask)
    return _conv.output(x, weight, sizes, window)


def reference(y, x, weight, bias, sigma, key, stride, padding, dilation, groups, *rest) -> None:
    how, window = Members(*rest), window_of(stride, padding, dilation, groups)
    for member in range(how.members if y.numel() else 0):
        own = _perturbed.member_weight(weight, sigma, key, how, member).float()
        own_bias = _perturbed.of_member(bias, member, 1)
        own_bias = own_bias if own_bias is None else own_bias.float()
        y[member] = window.convolve(_perturbed.of_member(x, member, 4).float(), own, own_bias)


def cost(x, weight, bias, sigma, key, stride, padding, dilation, groups, *rest) -> Cost:
    how, window = Members(*rest), window_of(stride, padding, dilation, groups)
    sizes = _conv.sizes_of(x, weight.shape, window, how.members)
    out = how.members * sizes.rows * sizes.features
    rows, cols = grid(weight)
    noise = how.draws * (rows * cols if how.rank is None else how.rank * (rows + cols))
    return Cost(x.element_size() * (x.numel() + weight.numel() + out), 2 * out * sizes.inputs, noise)


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    def v(seed: int, *shape: int) -> Tensor:
        return values(seed, *shape, device=device, dtype=dtype)

    x, w, b = v(1, 2, 3, 9, 8), v(2, 6, 3, 3, 3), v(3, 6)
    own, pairs = v(4, 4, 2, 3, 9, 8), {"members": 4, "antithetic": True}
    mask = v(5, 6, 3, 3, 3) > 0
    at = {"draw": 9, "row_offset": 1000, "col_offset": 130}
    yield Sample("one", (x, w, b, 0.3, 11))
    yield Sample("minus", (x, w, None, -0.3, 11), {"padding": 1, "stride": (2, 1)})
    yield Sample("pairs", (own, w, v(6, 4, 6), 0.3, -11), {**pairs, "padding": (2, 1), "dilation": 2})
    yield Sample("signs", (x, w, b, 0.3, 11), {"dist": "rademacher", "members": 3, **at})
    yield Sample("depthwise", (x, v(7, 6, 1, 3, 2), b, 0.3, 11), {"groups": 3, "padding": "same", "dist": "laplace"})
    yield Sample("pointwise", (x, v(8, 6, 3, 1, 1), b, 0.3, 11), {"members": 2, "padding": "valid"})
    yield Sample("mask", (x, w, b, 0.3, 11), {"mask": mask, **pairs})
    channels_last = (x.to(memory_format=torch.channels_last), w.to(memory_format=torch.channels_last), b, 0.3, 11)
    yield Sample("channels-last", channels_last, {"members": 2, "mask": mask.to(torch.uint8)})
    yield Sample("strided", (v(9, 4, 3, 9, 16)[::2, :, :, ::2], v(10, 6, 6, 3, 3)[:, ::2], v(11, 12)[::2], 0.3, 11))
    yield Sample("low-rank", (own, w, b, -0.3, 11), {"rank": 2, **pairs, **at})
    yield Sample("no-images", (x[:0], w, b, 0.3, 11), {"members": 2})

    yield Sample("x-channels", (x[:, :2], w, b, 0.3, 1), error="'x' must have 3 channels")
    yield Sample("x-rank", (x[0], w, b, 0.3, 1), error=r"'x' must be \[B, I, H, W\] or \[P, B, I, H, W\]")
    yield Sample("x-members", (own, w, b, 0.3, 1), {"members": 2}, error="'x' must have 2 members")
    yield Sample("x-small", (x[..., :2], w, b, 0.3, 1), error="'x' must have images large enough for a kernel of")
    yield Sample("weight-rank", (x, w[0], b, 0.3, 1), error=r"'weight' must be \[O, I / groups, kh, kw\]")
    yield Sample("no-filters", (x, w[:0], b[:0], 0.3, 1), error="'weight' must be .*, none of them 0")
    yield Sample("bias-shape", (x, w, b[:5], 0.3, 1), error=r"'bias' must be \[6\], or \[1, 6\]")
    yield Sample("groups", (x, w, b, 0.3, 1), {"groups": 4}, error="'groups' must divide the 6 channels of weight")
    yield Sample("stride", (x, w, b, 0.3, 1), {"stride": 0}, error="'stride' must be at least 1")
    yield Sample("padding", (x, w, b, 0.3, 1), {"padding": (1, -1)}, error="'padding' must be at least 0")
    yield Sample("padding-name", (x, w, b, 0.3, 1), {"padding": "full"}, error="'padding' must be an integer, a pair, ")
    same = {"padding": "same", "stride": 2}
    yield Sample("same-stride", (x, w, b, 0.3, 1), same, error="'padding' must be no 'same' where stride is not 1")
    yield Sample("three", (x, w, b, 0.3, 1), {"dilation": (1, 1, 1)}, error="'dilation' must be an integer or a pair")
    yield Sample("mask-shape", (x, w, b, 0.3, 1), {"mask": mask[:5]}, error=r"'mask' must be \[6, 3, 3, 3\]")


register(
    Op(
        name="perturbed_conv2d",
        schema=f"(Tensor x, Tensor weight, Tensor? bias, Tensor sigma, Tensor key, {WINDOW_SCHEMA}, "
        f"{MEMBERS_SCHEMA}) -> Tensor",
        function=perturbed_conv2d,
        check=check,
        reference=reference,
        samples=samples,
        cost=cost,
        autocast=(0, 1, 2),
    )
)
