"""noisy_conv2d_recompute_: output and gradient from one evaluation of the noise, in a second pass with known losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ulr_kernels.ops import _conv
from ulr_kernels.ops._conv import WINDOW_SCHEMA, ConvGradient, Pair
from ulr_kernels.ops._op import NOISE_SCHEMA, Check, Op, Output, key_and_sigma, register
from ulr_kernels.ops.noisy_conv2d_grad_ import cost


def noisy_conv2d_recompute_(
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss_weight: Tensor,
    sigma: float | Tensor,
    key: int | Tensor,
    *,
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
) -> Tensor:
    """`noisy_conv2d` and `noisy_conv2d_grad_` in one pass over the noise.

    For training at inference memory: a first pass computes the losses and keeps nothing; in a second pass each layer
    adds to its gradients and computes its noised output again.

    Args:
        grad_weight, grad_bias, loss_weight, positions, grad_log_sigma: as in `noisy_conv2d_grad_`.
        x, weight, bias: as in `noisy_conv2d`; the number of copies is loss_weight's.
        sigma: noise scale, > 0: a float, or fp32 `[]` or `[O]`.
        stride, padding, dilation, groups, transposed, output_padding: the convolution, as in `noisy_conv2d`.
        key, antithetic, dist, sampler, draw, row_offset, col_offset, width: as in both.

    Returns:
        `[C, B, O, H', W']` of x's dtype, channels last where x or the weight is.

    Raises:
        ValueError: as in both ops; nothing has been written.
    """
    op = "noisy_conv2d_recompute_"
    rules = Check(op)
    _conv.check_images(rules, x)
    _conv.check_kernel(rules, "weight", weight, transposed)
    kernel = weight.shape[2:]
    window = _conv.resolve_window(rules, kernel, stride, padding, dilation, groups, transposed, output_padding)
    key, sigma = key_and_sigma(op, key, sigma, x.device)
    positions = _conv.resolve_positions(window, x, kernel, positions)
    buffers = (grad_weight, grad_bias, grad_log_sigma)
    which = (antithetic, dist, sampler, positions, draw, row_offset, col_offset, width)
    return torch.ops.ulr.noisy_conv2d_recompute_.default(
        *buffers, x, weight, bias, loss_weight, sigma, key, *window, *which
    )


def check(a: ConvGradient) -> Output:
    rules = Check("noisy_conv2d_recompute_")
    assert a.weight is not None
    _conv.check_kernel(rules, "weight", a.weight, a.window.transposed)
    return _conv.output(a.x, a.weight, _conv.check_gradient(rules, a), a.window)


def reference(y: Tensor, a: ConvGradient) -> None:
    _conv.forward_reference(y, a)
    _conv.gradient_reference(a)


SCHEMA = (
    "(Tensor(a!)? grad_weight, Tensor(b!)? grad_bias, Tensor(c!)? grad_log_sigma, Tensor x, Tensor weight, "
    f"Tensor? bias, Tensor loss_weight, Tensor sigma, Tensor key, {WINDOW_SCHEMA}, bool antithetic=False, "
    f"{NOISE_SCHEMA}) -> Tensor"
)
register(Op(noisy_conv2d_recompute_, SCHEMA, ConvGradient, check, reference, cost, autocast=(3, 4, 5)))
