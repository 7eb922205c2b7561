"""noisy_conv2d_grad_: the likelihood-ratio gradient of a convolution, from noise that is made again."""

from __future__ import annotations

import torch
from torch import Tensor

from ulr_kernels.ops import _conv, _linear
from ulr_kernels.ops._conv import WINDOW_SCHEMA, ConvGradient, Pair
from ulr_kernels.ops._op import NOISE_SCHEMA, Check, Cost, Op, key_and_sigma, register


def noisy_conv2d_grad_(
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    x: Tensor,
    loss_weight: Tensor,
    sigma: float | Tensor,
    key: int | Tensor,
    *,
    kernel_size: Pair | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: Pair = 0,
    antithetic: bool = False,
    dist: str = "normal",
    sampler: str = "iid",
    positions: int | None = None,
    draw: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
    width: int = 0,
    grad_log_sigma: Tensor | None = None,
) -> None:
    """Add the gradients of ULR (arXiv 2305.08960, Theorem 1, for a convolution) to their buffers, as raw sums.

    With S_c[b, o, y, x] = loss_weight[c, r // positions] * score_c[r, o] / sigma[o], where r = (b * H' + y) * W' + x:

        grad_weight    += sum over c of the weight's gradient of conv(x[c], weight) for the output gradient S_c
        grad_bias      += sum over c, r of  S_c
        grad_log_sigma += sum over c, r of  loss_weight[c, r // positions] * (eps_cr * score_cr - 1)

    The noise is that of `noisy_conv2d` with the same key, draw and offsets; it is made again, never stored. Where the
    copies share x, the sum over copies comes first and one product with x follows.

    Args:
        grad_weight: `[O, I / groups, kh, kw]`, or, transposed, `[I, O / groups, kh, kw]`; fp32 or x's dtype, any
            strides; or None.
        grad_bias: `[O]`, likewise; or None. One of the two must be given.
        x: `[B, I, H, W]`, shared by the copies, or `[C, B, I, H, W]`; fp32, bf16 or fp16; any strides.
        loss_weight: `[C, B]`, fp32: the weight of each copy of each image, (L - baseline) / (C * B) for a mean. With
            positions given: `[C, B * H' * W' // positions]`, one for each sample.
        sigma: noise scale, > 0: a float, or fp32 `[]` or `[O]`.
        key: of the noise site: an integer in [-2^63, 2^64) or an int64 scalar tensor.
        kernel_size: kh and kw, needed where grad_weight is None.
        stride, padding, dilation, groups, transposed, output_padding: the convolution, as in `noisy_conv2d`.
        antithetic, dist, sampler, draw, row_offset, col_offset, width: as in `noisy_conv2d`.
        positions: rows per sample, which must divide B * H' * W'; None: H' * W', one image.
        grad_log_sigma: `[]` or `[O]`, fp32 or x's dtype, or None; an error for Rademacher noise, which has no density.

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above, or a buffer overlaps another
            argument; nothing has been written.
    """
    op = "noisy_conv2d_grad_"
    rules = Check(op)
    _conv.check_images(rules, x)
    kernel = _conv.kernel_of(rules, grad_weight, kernel_size, transposed)
    window = _conv.resolve_window(rules, kernel, stride, padding, dilation, groups, transposed, output_padding)
    key, sigma = key_and_sigma(op, key, sigma, x.device)
    positions = _conv.resolve_positions(window, x, kernel, positions)
    buffers = (grad_weight, grad_bias, grad_log_sigma)
    which = (antithetic, dist, sampler, positions, draw, row_offset, col_offset, width)
    torch.ops.ulr.noisy_conv2d_grad_.default(*buffers, x, loss_weight, sigma, key, kernel, *window, *which)


def check(a: ConvGradient) -> None:
    _conv.check_gradient(Check("noisy_conv2d_grad_"), a)


def cost(a: ConvGradient) -> Cost:
    sizes = a.sizes
    return _linear.gradient_cost(a, sizes, _conv.products(a.window, sizes))


SCHEMA = (
    "(Tensor(a!)? grad_weight, Tensor(b!)? grad_bias, Tensor(c!)? grad_log_sigma, Tensor x, "
    f"Tensor loss_weight, Tensor sigma, Tensor key, int[] kernel, {WINDOW_SCHEMA}, bool antithetic=False, "
    f"{NOISE_SCHEMA}) -> ()"
)
register(Op(noisy_conv2d_grad_, SCHEMA, ConvGradient, check, _conv.gradient_reference, cost, autocast=(3,)))
