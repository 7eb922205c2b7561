"""Arguments of the launchers of the linear ops (csrc/cuda/noisy_linear*.cu)."""

from __future__ import annotations

import torch
from torch import Tensor

from ulr_kernels.backends import _native
from ulr_kernels.backends._native import Arguments
from ulr_kernels.backends.cuda import tiles
from ulr_kernels.backends.cuda.walsh import walsh_sums
from ulr_kernels.ops._linear import Linear, LinearGradient
from ulr_kernels.ops._op import NoiseSpec
from ulr_kernels.ops.foreach_noisy_linear_grad_ import LinearGradients


def noisy_linear(y: Tensor, a: Linear) -> Arguments:
    return Arguments(_native.noise_view(a.noise, y.shape[-1]), (y, a.x, a.weight, a.bias, a.sigma))


def _partials(grad_log_sigma: Tensor | None, features: int) -> Tensor | None:
    """A workspace for the blocks' parts of a grad_log_sigma that is one number, to be added in a fixed order."""
    if grad_log_sigma is None or grad_log_sigma.dim():
        return None
    blocks = features // tiles.GRADIENT_FEATURES + 2  # offsets may cut the first and the last one
    return torch.empty(blocks, dtype=torch.float32, device=grad_log_sigma.device)


def noisy_linear_grad_(a: LinearGradient) -> Arguments:
    features = a.sizes.features
    sums = walsh_sums(a.noise, a.loss_weight, a.sizes.shared)
    tensors = (*a.buffers, a.x, a.loss_weight, a.sigma, _partials(a.grad_log_sigma, features), sums)
    return Arguments(_native.noise_view(a.noise, features), tensors)


def foreach_noisy_linear_grad_(a: LinearGradients) -> Arguments:
    tensors: list[Tensor | None] = []
    numbers: list[int] = []
    for layer in a.layers():
        noise = layer.noise
        sums = walsh_sums(noise, layer.loss_weight, layer.sizes.shared)
        tensors += [layer.grad_weight, layer.grad_bias, layer.x, layer.loss_weight, layer.sigma, noise.key, sums]
        width = noise.width or noise.col_offset + layer.sizes.features
        numbers += [noise.positions, noise.row_offset, noise.col_offset, width]
    # The launcher takes the key, the positions, the offsets and the width of each layer from the two lists.
    shared = NoiseSpec(a.keys[0], a.antithetic, a.dist, a.sampler, draw=a.draw)
    return Arguments(_native.noise_view(shared), tuple(tensors), tuple(numbers))


def noisy_linear_recompute_(y: Tensor, a: LinearGradient) -> Arguments:
    features = y.shape[-1]
    tensors = (y, *a.buffers, a.x, a.weight, a.bias, a.loss_weight, a.sigma, _partials(a.grad_log_sigma, features))
    return Arguments(_native.noise_view(a.noise, features), tensors)
