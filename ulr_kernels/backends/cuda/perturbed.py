"""What the launchers of the ops with weight noise (csrc/cuda/perturbed_*.cu) are handed."""

from __future__ import annotations

from torch import Tensor

from ulr_kernels.backends import _native
from ulr_kernels.backends._native import Arguments
from ulr_kernels.ops._perturbed import Members


def _spec(key: Tensor, how: Members) -> tuple:
    at = (how.draw, how.row_offset, how.col_offset)
    return _native.noise_spec(key, how.dist, "iid", 1, *at, width=0, antithetic=how.antithetic)


def perturbed_linear(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, key: Tensor, *rest
) -> Arguments:
    how = Members(*rest)
    bias = bias if bias is None or bias.dim() == 1 else bias[:, None]
    return Arguments(_spec(key, how), (y, x, weight, bias, sigma, how.mask), (how.rank or 0,))


def perturbed_embedding(y: Tensor, indices: Tensor, weight: Tensor, sigma: Tensor, key: Tensor, *rest) -> Arguments:
    how = Members(*rest)
    return Arguments(_spec(key, how), (y, indices, weight, sigma, how.mask), (how.rank or 0,))
