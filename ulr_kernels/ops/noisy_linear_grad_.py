"""noisy_linear_grad_: the likelihood-ratio gradient of a linear layer, from noise that is made again."""

from __future__ import annotations

import torch
from torch import Tensor

from ulr_kernels.ops import _linear
from ulr_kernels.ops._linear import LinearGradient
from ulr_kernels.ops._op import NOISE_SCHEMA, Check, Cost, Op, key_and_sigma, register


def noisy_linear_grad_(
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    x: Tensor,
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
) -> None:
    """Add the gradients of ULR (arXiv 2305.08960, Theorem 1, for a linear layer) to their buffers, as raw sums.

        grad_weight    += sum over c, r of  loss_weight[c, r // positions] * score_cr / sigma  (outer)  x[c, r]
        grad_bias      += sum over c, r of  loss_weight[c, r // positions] * score_cr / sigma
        grad_log_sigma += sum over c, r of  loss_weight[c, r // positions] * (eps_cr * score_cr - 1)

    The noise is that of `noisy_linear` with the same key, draw and offsets; it is made again, never stored. Where the
    copies share x, the sum over copies comes first and one product with x follows.

    Args:
        grad_weight: `[N, K]`, fp32 or x's dtype, any strides; or None.
        grad_bias: `[N]`, likewise; or None. One of the two must be given.
        x: `[R, K]`, shared by the copies, or `[C, R, K]`; fp32, bf16 or fp16; any strides.
        loss_weight: `[C, R // positions]`, fp32: the weight of each copy of each sample, (L - baseline) / (C * samples)
            for a mean.
        sigma: noise scale, > 0: a float, or fp32 `[]` or `[N]`.
        key: of the noise site: an integer in [-2^63, 2^64) or an int64 scalar tensor.
        antithetic, dist, sampler, draw, row_offset, col_offset, width: as in `noisy_linear`.
        positions: rows per sample; must divide R. On the CPU a weight for each row, `[C, R]`, is taken too.
        grad_log_sigma: `[]` or `[N]`, fp32 or x's dtype, or None; an error for Rademacher noise, which has no density.

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above, or a buffer overlaps another
            argument; nothing has been written.
    """
    key, sigma = key_and_sigma("noisy_linear_grad_", key, sigma, x.device)
    buffers = (grad_weight, grad_bias, grad_log_sigma)
    which = (antithetic, dist, sampler, positions, draw, row_offset, col_offset, width)
    torch.ops.ulr.noisy_linear_grad_.default(*buffers, x, loss_weight, sigma, key, *which)


def check(a: LinearGradient) -> None:
    _linear.check_gradient(Check("noisy_linear_grad_"), a)


def cost(a: LinearGradient) -> Cost:
    sizes = a.sizes
    products = (1 if sizes.shared else sizes.copies) * sizes.rows * sizes.features * sizes.inputs
    return _linear.gradient_cost(a, sizes, products)


SCHEMA = (
    "(Tensor(a!)? grad_weight, Tensor(b!)? grad_bias, Tensor(c!)? grad_log_sigma, Tensor x, "
    f"Tensor loss_weight, Tensor sigma, Tensor key, bool antithetic=False, {NOISE_SCHEMA}) -> ()"
)
register(Op(noisy_linear_grad_, SCHEMA, LinearGradient, check, _linear.gradient_reference, cost, autocast=(3,)))
