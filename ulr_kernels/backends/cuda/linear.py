"""What the launchers of the linear ops (csrc/cuda/noisy_linear*.cu) are handed."""

from __future__ import annotations

import torch
from torch import Tensor

from ulr_kernels.backends import _native
from ulr_kernels.backends._native import Arguments
from ulr_kernels.ops.noisy_linear_grads_ import calls

FEATURES_OF_A_BLOCK = 32  # kGradFeatures in csrc/cuda/gradient_problem.cuh


def noisy_linear(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    key: Tensor,
    copies: int,
    antithetic: bool,
    dist: str,
    sampler: str,
    positions: int,
    *at: int,
) -> Arguments:
    width = at[-1] + y.shape[-1]
    spec = _native.noise_spec(key, dist, sampler, positions, *at, width=width, antithetic=antithetic)
    return Arguments(spec, (y, x, weight, bias, sigma))


def _partials(grad_log_sigma: Tensor | None, features: int) -> Tensor | None:
    """Where blocks leave their parts of a grad_log_sigma that is one number, to be added in a fixed order."""
    if grad_log_sigma is None or grad_log_sigma.dim():
        return None
    blocks = features // FEATURES_OF_A_BLOCK + 2  # offsets may cut the first and the last one
    return torch.empty(blocks, dtype=torch.float32, device=grad_log_sigma.device)


def noisy_linear_grad_(
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
    *at: int,
) -> Arguments:
    buffer = grad_weight if grad_weight is not None else grad_bias
    assert buffer is not None  # the op's check has seen to it
    features = buffer.shape[0]
    spec = _native.noise_spec(key, dist, sampler, positions, *at, width=at[-1] + features, antithetic=antithetic)
    partials = _partials(grad_log_sigma, features)
    return Arguments(spec, (grad_weight, grad_bias, grad_log_sigma, x, loss_weight, sigma, partials))


def noisy_linear_grads_(*args) -> Arguments:
    tensors: list[Tensor | None] = []
    numbers: list[int] = []
    for weight, bias, _, x, loss_weight, sigma, key, *_, positions, _, row, col in calls(*args):
        tensors += [weight, bias, x, loss_weight, sigma, key]
        numbers += [positions, row, col]
    antithetic, dist, sampler, _, draw = args[6:11]
    # The key, the positions and the offsets of each layer take the place of these.
    spec = _native.noise_spec(args[5][0], dist, sampler, 1, draw, 0, 0, width=0, antithetic=antithetic)
    return Arguments(spec, tuple(tensors), tuple(numbers))


def noisy_linear_replay_(
    y: Tensor,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_log_sigma: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss_weight: Tensor,
    *rest,
) -> Arguments:
    gradient = noisy_linear_grad_(grad_weight, grad_bias, grad_log_sigma, x, loss_weight, *rest)
    *buffers, _, _, sigma, partials = gradient.tensors
    return Arguments(gradient.noise, (y, *buffers, x, weight, bias, loss_weight, sigma, partials))
