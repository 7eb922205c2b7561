"""What the launchers of the ops with weight noise (csrc/cuda/perturbed_*.cu) are handed."""

from __future__ import annotations

from torch import Tensor

from ulr_kernels.backends import _native
from ulr_kernels.backends._native import Arguments
from ulr_kernels.backends.cuda import conv
from ulr_kernels.ops._perturbed import Members
from ulr_kernels.ops.perturbed_conv2d import window_of


def _spec(key: Tensor, how: Members) -> tuple:
    at = (how.draw, how.row_offset, how.col_offset)
    return _native.noise_spec(key, how.dist, "iid", 1, *at, width=0, antithetic=how.antithetic)


def perturbed_linear(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, key: Tensor, *rest
) -> Arguments:
    how = Members(*rest)
    bias = bias if bias is None or bias.dim() == 1 else bias[:, None]
    return Arguments(_spec(key, how), (y, x, weight, bias, sigma, how.mask), (how.rank or 0,))


def perturbed_conv2d(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, key: Tensor, *rest
) -> Arguments:
    window, how = window_of(*rest[:4]), Members(*rest[4:])
    bias = bias if bias is None or bias.dim() == 1 else bias[:, None]
    images = x if x.dim() == 5 else x[None]
    numbers = (*conv.window_numbers(window, weight.shape[2:], weight.shape[1]), how.rank or 0)
    return Arguments(_spec(key, how), (y, images, weight, bias, sigma, how.mask), numbers)


def perturbed_embedding(y: Tensor, indices: Tensor, weight: Tensor, sigma: Tensor, key: Tensor, *rest) -> Arguments:
    how = Members(*rest)
    return Arguments(_spec(key, how), (y, indices, weight, sigma, how.mask), (how.rank or 0,))
