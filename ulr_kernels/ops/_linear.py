"""The rules of the noisy linear ops, and their reference in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ulr_kernels import noise_contract
from ulr_kernels.ops._op import FLOATS, Check


class Sizes(NamedTuple):
    """copies C, rows R, inputs K, features N, shared: x has no copy axis."""

    copies: int
    rows: int
    inputs: int
    features: int
    shared: bool


def check_x(check: Check, x: Tensor, copies: int, weight: Tensor | None) -> None:
    check.dtype("x", x, FLOATS)
    if x.dim() not in (2, 3):
        check.fail("x", "be [R, K] or [C, R, K]", list(x.shape))
    if weight is not None and x.shape[-1] != weight.shape[1]:
        check.fail("x", f"have {weight.shape[1]} features (weight is {list(weight.shape)})", list(x.shape))
    if x.dim() == 3 and x.shape[0] != copies:
        check.fail("x", f"have {copies} copies on its first axis, or no copy axis", list(x.shape))


def check_weight(check: Check, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check.dtype("weight", weight, (x.dtype,))
    if bias is not None:
        check.dtype("bias", bias, (x.dtype,))
        if bias.shape != weight.shape[:1]:
            check.fail("bias", f"be [{weight.shape[0]}] (weight is {list(weight.shape)})", list(bias.shape))


def check_sigma(check: Check, argument: str, sigma: Tensor, features: int, allowed: tuple[torch.dtype, ...]) -> None:
    check.dtype(argument, sigma, allowed)
    if sigma.dim() and sigma.shape != (features,):
        check.fail(argument, f"be a scalar or [{features}], one per feature", list(sigma.shape))


def check_loss_weight(check: Check, loss_weight: Tensor, rows: int, positions: int) -> None:
    check.dtype("loss_weight", loss_weight, (torch.float32,))
    if rows % max(positions, 1):
        check.fail("positions", f"divide the {rows} rows", positions)
    if loss_weight.dim() != 2 or loss_weight.shape[1] != rows // max(positions, 1):
        check.fail(
            "loss_weight", f"be [copies, {rows // max(positions, 1)}], one per sample of x", list(loss_weight.shape)
        )


def check_gradients(
    check: Check,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_log_sigma: Tensor | None,
    x: Tensor,
    dist: str,
) -> int:
    """The number of features, which the buffers give."""
    features = None
    if grad_weight is not None:
        check.dtype("grad_weight", grad_weight, buffer_dtypes(x))
        if grad_weight.dim() != 2 or grad_weight.shape[1] != x.shape[-1]:
            check.fail("grad_weight", f"be [N, {x.shape[-1]}] (x is {list(x.shape)})", list(grad_weight.shape))
        features = grad_weight.shape[0]
    return check_feature_gradients(check, features, grad_bias, grad_log_sigma, x, dist)


def buffer_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    return (torch.float32,) if x.dtype == torch.float32 else (torch.float32, x.dtype)


def check_feature_gradients(
    check: Check,
    features: int | None,
    grad_bias: Tensor | None,
    grad_log_sigma: Tensor | None,
    x: Tensor,
    dist: str,
) -> int:
    """The number of features, which grad_weight has given, or else grad_bias gives."""
    if grad_bias is not None:
        check.dtype("grad_bias", grad_bias, buffer_dtypes(x))
        if grad_bias.dim() != 1 or features not in (None, grad_bias.shape[0]):
            check.fail("grad_bias", "be [N], one per feature of grad_weight", list(grad_bias.shape))
        features = grad_bias.shape[0]
    if features is None:
        check.fail("grad_weight", "be given where grad_bias is None", None)
    check_density(check, grad_log_sigma, dist)
    if grad_log_sigma is not None:
        check_sigma(check, "grad_log_sigma", grad_log_sigma, features, buffer_dtypes(x))
    return features


def check_density(check: Check, grad_log_sigma: Tensor | None, dist: str) -> None:
    if grad_log_sigma is not None and dist == "rademacher":
        check.fail("grad_log_sigma", "be None where dist is 'rademacher', which has no density", "a tensor")


# --- reference -------------------------------------------------------------------------------------------------------


def copies_of_noise(
    key: Tensor, sizes: Sizes, antithetic: bool, dist: str, sampler: str, positions: int, draw: int, row: int, col: int
) -> Iterator[tuple[int, Tensor]]:
    """Copy by copy: its number and its signed noise, fp32 `[R, N]`."""
    draws, signs = noise_contract.copy_draws(sizes.copies, antithetic, draw, key.device)
    for copy in range(sizes.copies):
        eps = noise_contract.noise_grid(
            sizes.rows,
            sizes.features,
            draws[copy : copy + 1],
            key,
            dist=dist,
            sampler=sampler,
            positions=positions,
            row_offset=row,
            col_offset=col,
        )[0]
        yield copy, eps * signs[copy]


def forward_reference(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, sizes: Sizes, key: Tensor, *spec
) -> None:
    """y[c] = x[c] W^T + b + sigma * eps_c, with fp32 sums."""
    shift = 0.0 if bias is None else bias.float()
    shared = x.float() @ weight.float().T + shift if sizes.shared else None
    for copy, eps in copies_of_noise(key, sizes, *spec):
        clean = shared if shared is not None else x[copy].float() @ weight.float().T + shift
        y[copy].copy_(clean + sigma * eps)


def _outer(scores: Tensor, x: Tensor) -> Tensor:
    return scores.T @ x.float()


def gradient_reference(
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_log_sigma: Tensor | None,
    x: Tensor,
    loss_weight: Tensor,
    sigma: Tensor,
    sizes: Sizes,
    key: Tensor,
    antithetic: bool,
    dist: str,
    sampler: str,
    positions: int,
    *offsets: int,
    product: Callable[[Tensor, Tensor], Tensor] = _outer,
) -> None:
    """dE[L]/dW = E[L score x^T] / sigma and its companions, as raw sums over copies and rows.

    `product`: the layer's own parameter Jacobian, applied to weighted scores `[R, N]` and one copy's input.
    """
    by_weight = None if grad_weight is None else loss_weight.new_zeros(grad_weight.shape)
    by_bias = loss_weight.new_zeros(sizes.features)
    by_log_sigma = loss_weight.new_zeros(sizes.features)
    weights = loss_weight.repeat_interleave(positions, dim=1)
    reduced = loss_weight.new_zeros(sizes.rows, sizes.features)
    for copy, eps in copies_of_noise(key, sizes, antithetic, dist, sampler, positions, *offsets):
        score = noise_contract.score(eps, dist)
        weighted = weights[copy, :, None] * score / sigma
        if sizes.shared:
            reduced += weighted
        elif by_weight is not None:
            by_weight += product(weighted, x[copy])
        by_bias += weighted.sum(0)
        by_log_sigma += (weights[copy, :, None] * (eps * score - 1)).sum(0)
    if sizes.shared and by_weight is not None:
        by_weight += product(reduced, x)
    for buffer, value in ((grad_weight, by_weight), (grad_bias, by_bias)):
        if buffer is not None and value is not None:
            buffer.copy_(buffer.float() + value)
    if grad_log_sigma is not None:
        grad_log_sigma.copy_(grad_log_sigma.float() + (by_log_sigma if grad_log_sigma.dim() else by_log_sigma.sum()))
