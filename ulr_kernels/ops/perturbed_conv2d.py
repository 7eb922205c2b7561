"""perturbed_conv2d: a convolution with weight noise, without writing the weight."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ulr_kernels.ops import _conv, _perturbed
from ulr_kernels.ops._conv import Pair, Window
from ulr_kernels.ops._op import Check, Cost, Op, Output, register
from ulr_kernels.ops._parameters import rows_cols
from ulr_kernels.ops._perturbed import COPIES_SCHEMA, WeightNoise

# Part of the schema; padding is (top, bottom, left, right).
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
    copies: int = 1,
    antithetic: bool = False,
    rank: int | None = None,
    dist: str = "normal",
    draw: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
    mask: Tensor | None = None,
    sampler: str = "iid",
    width: int = 0,
) -> Tensor:
    """y[c] = conv2d(x[c], W'_c) + b for each copy c, W'_c = round_to_dtype(fma(sigma, eps_c, W)).

    The weight's noise is that of its view [O, I / groups * kh * kw]; low rank: as in `perturbed_linear`, W' rounded.

    Args:
        x: `[B, I, H, W]`, shared by the copies, or `[C, B, I, H, W]`; fp32, bf16 or fp16; any strides.
        weight: `[O, I / groups, kh, kw]`, of x's dtype; any strides.
        bias: `[O]`, or `[C, O]` with one for each copy, of x's dtype, or None. The caller perturbs it.
        stride, padding, dilation, groups: as in `torch.nn.functional.conv2d`; padding also "same" or "valid".
        sigma, key, copies, antithetic, rank, dist, draw, row_offset, col_offset, sampler, width: as in
            `perturbed_linear`.
        mask: bool or uint8 of weight's shape: noise only where it is set; not with `rank`.

    Returns:
        `[C, B, O, H', W']` of x's dtype, channels last where x or the weight is. Differentiable in x, weight,
        bias and sigma (pathwise).

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above; nothing has been computed.
        NotImplementedError: an input carries a forward-mode tangent.
    """
    rules = Check("perturbed_conv2d")
    _conv.check_kernel(rules, "weight", weight, False)
    window = _conv.resolve_window(rules, weight.shape[2:], stride, padding, dilation, groups, False, 0)
    how = (copies, antithetic, rank, dist, draw, row_offset, col_offset, mask, sampler, width)
    return _perturbed.call("perturbed_conv2d", window.convolve, 4, (x, weight, bias), sigma, key, window[:4], how)


class PerturbedConv(NamedTuple):
    """Arguments of perturbed_conv2d."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    sigma: Tensor
    window: Window
    how: WeightNoise


def check(a: PerturbedConv) -> Output:
    rules, x, weight, copies = Check("perturbed_conv2d"), a.x, a.weight, a.how.copies
    _conv.check_kernel(rules, "weight", weight, False)
    _conv.check_window(rules, a.window)
    _perturbed.check_copies(rules, weight, a.sigma, a.how)
    _conv.check_images(rules, x)
    sizes = _conv.check_sizes(rules, x, weight.shape, a.window, copies, "weight")
    rules.dtype("weight", weight, (x.dtype,))
    _perturbed.check_bias(rules, weight, a.bias, copies)
    rules.device("x", x.device, weight=weight, bias=a.bias, sigma=a.sigma, key=a.how.noise.key, mask=a.how.mask)
    return _conv.output(x, weight, sizes, a.window)


def reference(y: Tensor, a: PerturbedConv) -> None:
    for copy in range(a.how.copies if y.numel() else 0):
        own = _perturbed.copy_weight(a.weight, a.sigma, a.how, copy).float()
        own_bias = _perturbed.of_copy(a.bias, copy, 1)
        own_bias = own_bias if own_bias is None else own_bias.float()
        y[copy] = a.window.convolve(_perturbed.of_copy(a.x, copy, 4).float(), own, own_bias)


def cost(a: PerturbedConv) -> Cost:
    sizes = _conv.sizes_of(a.x, a.weight.shape, a.window, a.how.copies)
    out = sizes.copies * sizes.rows * sizes.features
    rows, cols = rows_cols(a.weight)
    noise = a.how.draws * (rows * cols if a.how.rank is None else a.how.rank * (rows + cols))
    return Cost(a.x.element_size() * (a.x.numel() + a.weight.numel() + out), 2 * out * sizes.inputs, noise)


SCHEMA = (
    f"(Tensor x, Tensor weight, Tensor? bias, Tensor sigma, Tensor key, {WINDOW_SCHEMA}, {COPIES_SCHEMA}) -> Tensor"
)
register(Op(perturbed_conv2d, SCHEMA, PerturbedConv, check, reference, cost, autocast=(0, 1, 2)))
