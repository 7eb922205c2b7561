"""noisy_linear_grad_: the likelihood-ratio gradient of a linear layer, from noise that is made again."""

from __future__ import annotations

import torch
from torch import Tensor

from ulr_kernels.ops import _linear
from ulr_kernels.ops._linear import Sizes
from ulr_kernels.ops._op import NOISE_SCHEMA, Check, Cost, Op, key_tensor, register, sigma_tensor


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
        loss_weight: `[C, R // positions]`, fp32: what each copy of each sample counts, (L - baseline) / (C * samples)
            for a mean.
        sigma: noise scale, > 0: a float, or fp32 `[]` or `[N]`.
        key: of the noise site: an integer in [-2^63, 2^64) or an int64 scalar tensor.
        antithetic, dist, sampler, draw, row_offset, col_offset: as in `noisy_linear`.
        positions: rows per sample; must divide R.
        grad_log_sigma: `[]` or `[N]`, fp32 or x's dtype, or None; an error for Rademacher noise, which has no density.

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above, or a buffer overlaps another
            argument; nothing has been written.
    """
    key = key_tensor("noisy_linear_grad_", key, x.device)
    sigma = sigma_tensor("noisy_linear_grad_", sigma, x.device, zero=False)
    torch.ops.ulr.noisy_linear_grad_.default(
        grad_weight,
        grad_bias,
        grad_log_sigma,
        x,
        loss_weight,
        sigma,
        key,
        antithetic,
        dist,
        sampler,
        positions,
        draw,
        row_offset,
        col_offset,
    )


def check(*args) -> None:
    check_gradient(Check("noisy_linear_grad_"), *args)


def check_gradient(
    rules: Check,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_log_sigma: Tensor | None,
    x: Tensor,
    loss_weight: Tensor,
    sigma: Tensor,
    key: Tensor,
    antithetic: bool,
    dist: str,
    sampler: str,
    positions: int,
    draw: int,
    row_offset: int,
    col_offset: int,
) -> None:
    if x.dim() not in (2, 3):
        rules.fail("x", "be [R, K] or [C, R, K]", list(x.shape))
    _linear.check_loss_weight(rules, loss_weight, x.shape[-2], positions)
    copies = loss_weight.shape[0]
    draws = rules.copies(copies, antithetic)
    _linear.check_x(rules, x, copies, None)
    features = _linear.check_gradients(rules, grad_weight, grad_bias, grad_log_sigma, x, dist)
    _linear.check_sigma(rules, "sigma", sigma, features, (torch.float32,))
    rules.device(
        "x",
        x.device,
        grad_weight=grad_weight,
        grad_bias=grad_bias,
        grad_log_sigma=grad_log_sigma,
        loss_weight=loss_weight,
        sigma=sigma,
        key=key,
    )
    rules.noise(key, x.shape[-2], features, draws, dist, sampler, positions, draw, row_offset, col_offset)


def sizes_of(grad_weight: Tensor | None, grad_bias: Tensor | None, x: Tensor, loss_weight: Tensor) -> Sizes:
    buffer = grad_weight if grad_weight is not None else grad_bias
    assert buffer is not None  # the check has seen to it
    return Sizes(loss_weight.shape[0], x.shape[-2], x.shape[-1], buffer.shape[0], x.dim() == 2)


def reference(grad_weight, grad_bias, grad_log_sigma, x, loss_weight, sigma, key, *spec) -> None:
    sizes = sizes_of(grad_weight, grad_bias, x, loss_weight)
    _linear.gradient_reference(grad_weight, grad_bias, grad_log_sigma, x, loss_weight, sigma, sizes, key, *spec)


def cost(grad_weight, grad_bias, grad_log_sigma, x, loss_weight, sigma, key, antithetic, *spec) -> Cost:
    sizes = sizes_of(grad_weight, grad_bias, x, loss_weight)
    buffers = [b for b in (grad_weight, grad_bias, grad_log_sigma) if b is not None]
    products = (1 if sizes.shared else sizes.copies) * sizes.rows * sizes.features * sizes.inputs
    draws = sizes.copies // 2 if antithetic else sizes.copies
    return Cost(
        x.element_size() * x.numel() + 2 * sum(b.numel() * b.element_size() for b in buffers),
        2 * products,
        draws * sizes.rows * sizes.features,
    )


register(
    Op(
        name="noisy_linear_grad_",
        schema="(Tensor(a!)? grad_weight, Tensor(b!)? grad_bias, Tensor(c!)? grad_log_sigma, Tensor x, "
        f"Tensor loss_weight, Tensor sigma, Tensor key, bool antithetic=False, {NOISE_SCHEMA}) -> ()",
        function=noisy_linear_grad_,
        check=check,
        reference=reference,
        cost=cost,
        mutates=(0, 1, 2),
        autocast=(3,),
    )
)
