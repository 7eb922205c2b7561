"""noisy_linear_replay_: a second pass with known losses: one noise evaluation gives the output and the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ulr_kernels.ops import _linear
from ulr_kernels.ops._linear import Sizes
from ulr_kernels.ops._op import NOISE_SCHEMA, Check, Cost, Op, Output, key_tensor, register, sigma_tensor
from ulr_kernels.ops.noisy_linear_grad_ import cost as gradient_cost


def noisy_linear_replay_(
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
    grad_log_sigma: Tensor | None = None,
) -> Tensor:
    """`noisy_linear` and `noisy_linear_grad_` in one pass over the noise.

    For training at inference memory: a first pass gives the losses and keeps nothing, a second one goes through the
    layers again, and each layer adds to its gradients and hands on its noised output.

    Args:
        grad_weight, grad_bias, loss_weight, grad_log_sigma: as in `noisy_linear_grad_`.
        x, weight, bias: as in `noisy_linear`; the number of copies is loss_weight's.
        sigma: noise scale, > 0: a float, or fp32 `[]` or `[N]`.
        key, antithetic, dist, sampler, positions, draw, row_offset, col_offset: as in both.

    Returns:
        `[C, R, N]` of x's dtype.

    Raises:
        ValueError: as in both ops; nothing has been written.
    """
    key = key_tensor("noisy_linear_replay_", key, x.device)
    sigma = sigma_tensor("noisy_linear_replay_", sigma, x.device, zero=False)
    return torch.ops.ulr.noisy_linear_replay_.default(
        grad_weight,
        grad_bias,
        grad_log_sigma,
        x,
        weight,
        bias,
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


def check(
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_log_sigma: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
) -> Output:
    rules = Check("noisy_linear_replay_")
    if x.dim() not in (2, 3):
        rules.fail("x", "be [R, K] or [C, R, K]", list(x.shape))
    if weight.dim() != 2:
        rules.fail("weight", "be [N, K]", list(weight.shape))
    _linear.check_loss_weight(rules, loss_weight, x.shape[-2], positions)
    copies = loss_weight.shape[0]
    draws = rules.copies(copies, antithetic)
    _linear.check_x(rules, x, copies, weight)
    _linear.check_weight(rules, x, weight, bias)
    features = _linear.check_gradients(rules, grad_weight, grad_bias, grad_log_sigma, x, dist)
    if features != weight.shape[0]:
        rules.fail("grad_weight", f"have {weight.shape[0]} features (weight is {list(weight.shape)})", features)
    _linear.check_sigma(rules, "sigma", sigma, features, (torch.float32,))
    rules.device(
        "x",
        x.device,
        grad_weight=grad_weight,
        grad_bias=grad_bias,
        grad_log_sigma=grad_log_sigma,
        weight=weight,
        bias=bias,
        loss_weight=loss_weight,
        sigma=sigma,
        key=key,
    )
    rules.noise(key, x.shape[-2], features, draws, dist, sampler, positions, draw, row_offset, col_offset)
    return Output((copies, x.shape[-2], features), x.dtype)


def reference(
    y, grad_weight, grad_bias, grad_log_sigma, x, weight, bias, loss_weight, sigma, key, antithetic, *spec
) -> None:
    sizes = Sizes(loss_weight.shape[0], x.shape[-2], x.shape[-1], weight.shape[0], x.dim() == 2)
    _linear.forward_reference(y, x, weight, bias, sigma, sizes, key, antithetic, *spec)
    _linear.gradient_reference(
        grad_weight, grad_bias, grad_log_sigma, x, loss_weight, sigma, sizes, key, antithetic, *spec
    )


def cost(grad_weight, grad_bias, grad_log_sigma, x, weight, bias, loss_weight, sigma, key, antithetic, *spec) -> Cost:
    gradient = gradient_cost(grad_weight, grad_bias, grad_log_sigma, x, loss_weight, sigma, key, antithetic, *spec)
    out = loss_weight.shape[0] * x.shape[-2] * weight.shape[0]
    return Cost(gradient.bytes + x.element_size() * (weight.numel() + out), 2 * gradient.flops, gradient.noise)


register(
    Op(
        name="noisy_linear_replay_",
        schema="(Tensor(a!)? grad_weight, Tensor(b!)? grad_bias, Tensor(c!)? grad_log_sigma, Tensor x, Tensor weight, "
        f"Tensor? bias, Tensor loss_weight, Tensor sigma, Tensor key, bool antithetic=False, {NOISE_SCHEMA}) -> Tensor",
        function=noisy_linear_replay_,
        check=check,
        reference=reference,
        cost=cost,
        mutates=(0, 1, 2),
        autocast=(3, 4, 5),
    )
)
