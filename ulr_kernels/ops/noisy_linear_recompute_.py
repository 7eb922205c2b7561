"""noisy_linear_recompute_: output and gradient from one evaluation of the noise, in a second pass with known losses."""

from __future__ import annotations

import torch
from torch import Tensor

from ulr_kernels.ops import _linear
from ulr_kernels.ops._linear import LinearGradient
from ulr_kernels.ops._op import NOISE_SCHEMA, Check, Op, Output, key_and_sigma, register
from ulr_kernels.ops.noisy_linear_grad_ import cost


def noisy_linear_recompute_(
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss_weight: Tensor,
    sigma: float | Tensor,
    key: int | Tensor,
    *,
    antithetic: bool = False,
    dist: str = "normal",
    sampler: str = "iid",
    positions: int = 1,
    draw: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
    width: int = 0,
    grad_log_sigma: Tensor | None = None,
) -> Tensor:
    """`noisy_linear` and `noisy_linear_grad_` in one pass over the noise.

    For training at inference memory: a first pass computes the losses and keeps nothing; in a second pass each layer
    adds to its gradients and computes its noised output again.

    Args:
        grad_weight, grad_bias, loss_weight, grad_log_sigma: as in `noisy_linear_grad_`.
        x, weight, bias: as in `noisy_linear`; the number of copies is loss_weight's.
        sigma: noise scale, > 0: a float, or fp32 `[]` or `[N]`.
        key, antithetic, dist, sampler, positions, draw, row_offset, col_offset, width: as in both.

    Returns:
        `[C, R, N]` of x's dtype.

    Raises:
        ValueError: as in both ops; nothing has been written.
    """
    key, sigma = key_and_sigma("noisy_linear_recompute_", key, sigma, x.device)
    buffers = (grad_weight, grad_bias, grad_log_sigma)
    which = (antithetic, dist, sampler, positions, draw, row_offset, col_offset, width)
    return torch.ops.ulr.noisy_linear_recompute_.default(*buffers, x, weight, bias, loss_weight, sigma, key, *which)


def check(a: LinearGradient) -> Output:
    _linear.check_gradient(Check("noisy_linear_recompute_"), a)
    return Output((a.loss_weight.shape[0], a.x.shape[-2], a.sizes.features), a.x.dtype)


def reference(y: Tensor, a: LinearGradient) -> None:
    _linear.forward_reference(y, a)
    _linear.gradient_reference(a)


SCHEMA = (
    "(Tensor(a!)? grad_weight, Tensor(b!)? grad_bias, Tensor(c!)? grad_log_sigma, Tensor x, Tensor weight, "
    f"Tensor? bias, Tensor loss_weight, Tensor sigma, Tensor key, bool antithetic=False, {NOISE_SCHEMA}) -> Tensor"
)
register(Op(noisy_linear_recompute_, SCHEMA, LinearGradient, check, reference, cost, autocast=(3, 4, 5)))
