"""What the launchers of noise_add, noise_score and noise_dot_ are handed."""

from __future__ import annotations

import torch
from torch import Tensor

from ulr_kernels.backends import _native
from ulr_kernels.backends._native import Arguments
from ulr_kernels.backends.ticket import ticket
from ulr_kernels.ops._grid import images

# Of noise_dot_: kColumns and kSlots of a block (csrc/cuda/noise_dot_.cu), and how many blocks fill any device of today.
COLUMNS, ROWS, BLOCKS = 32, 32, 1024


def noise_add(
    y: Tensor,
    x: Tensor,
    sigma: Tensor,
    key: Tensor,
    feature_dim: int,
    copies: int,
    shared: bool,
    antithetic: bool,
    dist: str,
    sampler: str,
    positions: int,
    *at: int,
) -> Arguments:
    axis = feature_dim % (y.dim() - 1)
    width = at[-1] + y.shape[axis + 1]
    spec = _native.noise_spec(key, dist, sampler, positions, *at, width=width, antithetic=antithetic)
    return Arguments(spec, (*images(axis, y, x[None] if shared else x), sigma))


def noise_score(
    out: Tensor,
    loss_weight: Tensor,
    sigma: Tensor,
    key: Tensor,
    shape: list[int],
    feature_dim: int,
    antithetic: bool,
    dist: str,
    sampler: str,
    positions: int,
    *at: int,
) -> Arguments:
    axis = feature_dim % out.dim()
    width = at[-1] + out.shape[axis]
    spec = _native.noise_spec(key, dist, sampler, positions, *at, width=width, antithetic=antithetic)
    return Arguments(spec, (*images(axis, out[None]), loss_weight, sigma))


def noise_dot_(
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_log_sigma: Tensor | None,
    x: Tensor,
    loss_weight: Tensor,
    sigma: Tensor,
    key: Tensor,
    feature_dim: int,
    shared: bool,
    antithetic: bool,
    dist: str,
    sampler: str,
    positions: int,
    *at: int,
) -> Arguments:
    x = x[None] if shared else x
    axis = feature_dim % (x.dim() - 1)
    cols = x.shape[axis + 1]
    rows = loss_weight.shape[1] * positions
    spec = _native.noise_spec(key, dist, sampler, positions, *at, width=at[-1] + cols, antithetic=antithetic)
    tiles = -(-(at[-1] % 4 + cols) // COLUMNS)
    ranges = max(1, min(BLOCKS // max(tiles, 1), -(-rows // ROWS)))
    partials = torch.empty(ranges, 3, cols, dtype=torch.float32, device=x.device)
    buffers = (grad_weight, grad_bias, grad_log_sigma)
    done = ticket(x.device).view(torch.int64)
    return Arguments(spec, (*buffers, *images(axis, x), loss_weight, sigma, partials, done))
