"""noisy_conv2d: a convolution with noise on its output, y = conv(x, weight) + b + sigma * eps."""

from __future__ import annotations

import torch
from torch import Tensor

from ulr_kernels.ops import _conv, _linear
from ulr_kernels.ops._conv import WINDOW_SCHEMA, Conv, Pair
from ulr_kernels.ops._op import NOISE_SCHEMA, Check, Cost, Op, Output, key_and_sigma, needs_gradient, register


def noisy_conv2d(
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
    transposed: bool = False,
    output_padding: Pair = 0,
    copies: int = 1,
    antithetic: bool = False,
    dist: str = "normal",
    sampler: str = "iid",
    positions: int | None = None,
    draw: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
    width: int = 0,
) -> Tensor:
    """y[c] = conv(x[c], weight) + b + sigma * eps_c for each copy c: ULR's noised module (arXiv 2305.08960).

    Noise has a row for each (image, y, x) of the output and a column for each channel, whatever the memory format. It
    is added to the product in registers and never stored; copies that share x share one product. A convolution in one
    dimension is one of height 1.

    Args:
        x: `[B, I, H, W]`, shared by the copies, or `[C, B, I, H, W]`; fp32, bf16 or fp16; any strides.
        weight: `[O, I / groups, kh, kw]`, of x's dtype; transposed: `[I, O / groups, kh, kw]`.
        bias: `[O]`, of x's dtype, or None.
        sigma: noise scale in units of y, >= 0: a float, or fp32 `[]` or `[O]`.
        key: of the noise site: an integer in [-2^63, 2^64) or an int64 scalar tensor.
        stride, padding, dilation, groups: as in `F.conv2d`: an integer or (height, width), in pixels; padding may be
            "same" or "valid".
        transposed, output_padding: set for a convolution as in `F.conv_transpose2d`.
        copies: C.
        antithetic: the second half of the copies uses the first half's noise, negated; C must be even.
        dist, sampler, draw, row_offset, col_offset, width: which noise, as in `ulr.noise`; copy c uses draw + c. Image
            b of a larger batch starts at row_offset = b * H' * W'.
        positions: rows per sample, for Sobol's dimensions; None: H' * W', one image.

    Returns:
        `[C, B, O, H', W']` of x's dtype, channels last where x or the weight is. Sums are fp32. Differentiable in x,
        weight, bias and sigma (pathwise).

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above; nothing has been computed.
        NotImplementedError: an input carries a forward-mode tangent.
    """
    rules = Check("noisy_conv2d")
    _conv.check_images(rules, x)
    _conv.check_kernel(rules, "weight", weight, transposed)
    kernel = weight.shape[2:]
    window = _conv.resolve_window(rules, kernel, stride, padding, dilation, groups, transposed, output_padding)
    key, scale = key_and_sigma("noisy_conv2d", key, sigma, x.device, zero=True)
    positions = _conv.resolve_positions(window, x, kernel, positions)
    which = (copies, antithetic, dist, sampler, positions, draw, row_offset, col_offset, width)
    if needs_gradient("noisy_conv2d", "F.conv2d and ulr.noise", x, weight, bias, scale):
        return _linear.Pathwise.apply("noisy_conv2d", window.backward, window, which, x, weight, bias, scale, key)
    return torch.ops.ulr.noisy_conv2d.default(x, weight, bias, scale, key, *window, *which)


def check(a: Conv) -> Output:
    rules = Check("noisy_conv2d")
    draws = rules.copies(a.copies, a.noise.antithetic)
    _conv.check_images(rules, a.x)
    _conv.check_kernel(rules, "weight", a.weight, a.window.transposed)
    _conv.check_window(rules, a.window)
    sizes = _conv.check_sizes(rules, a.x, a.weight.shape, a.window, a.copies, "weight")
    _linear.check_weight(rules, a.x, a.weight, a.bias, sizes.features)
    _linear.check_sigma(rules, "sigma", a.sigma, sizes.features, (torch.float32,))
    rules.device("x", a.x.device, weight=a.weight, bias=a.bias, sigma=a.sigma, key=a.noise.key)
    rules.noise(a.noise, sizes.rows, sizes.features, draws)
    return _conv.output(a.x, a.weight, sizes, a.window)


def cost(a: Conv) -> Cost:
    sizes = a.sizes
    out = sizes.rows * sizes.features
    moved = a.x.element_size() * (a.x.numel() + a.weight.numel() + a.copies * out)
    return Cost(moved, 2 * _conv.products(a.window, sizes), a.noise.draws(a.copies) * out)


SCHEMA = (
    f"(Tensor x, Tensor weight, Tensor? bias, Tensor sigma, Tensor key, {WINDOW_SCHEMA}, int copies=1, "
    f"bool antithetic=False, {NOISE_SCHEMA}) -> Tensor"
)
register(Op(noisy_conv2d, SCHEMA, Conv, check, _conv.forward_reference, cost, autocast=(0, 1, 2)))
