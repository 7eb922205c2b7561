"""Arguments of the launchers of noise_add, noise_dot, noise_score and scale_shift_grad_."""

from __future__ import annotations

import torch
from torch import Tensor

from ulr_kernels.backends import _native
from ulr_kernels.backends._native import Arguments
from ulr_kernels.backends.arrival_counter import arrival_counter
from ulr_kernels.backends.cuda import tiles
from ulr_kernels.backends.cuda.walsh import walsh_sums
from ulr_kernels.ops._axes import images
from ulr_kernels.ops.noise_add import NoiseAdd
from ulr_kernels.ops.noise_dot import NoiseDot
from ulr_kernels.ops.noise_score import NoiseScore
from ulr_kernels.ops.scale_shift_grad_ import ScaleShiftGradient

BLOCKS = 1024  # enough for any device of today
WARPS = 4096  # as many as a device of today runs at once
LANES = 32  # of a warp: each keeps the sum of one draw


def noise_add(y: Tensor, a: NoiseAdd) -> Arguments:
    axis = a.feature_dim % (y.dim() - 1)
    grids = images(axis, y, a.x[None] if a.shared else a.x)
    return Arguments(_native.noise_view(a.noise, y.shape[axis + 1]), (*grids, a.sigma))


def noise_dot(out: Tensor, a: NoiseDot) -> Arguments:
    axis = a.feature_dim % a.x.dim()
    features, samples, draws = a.x.shape[axis], max(out.shape[1], 1), a.noise.draws(a.copies)
    columns = 32 if a.noise.dist == "rademacher" else 8  # of a lane at a time
    cells = a.noise.positions * -(-(a.noise.col_offset % columns + features) // columns)
    turns = max(1, -(-cells // LANES))
    # A warp sums a whole sample for as many draws as it has lanes, so that it reads x once, unless that leaves a device
    # idle: then ranges of the samples are shared out, and after them the draws.
    groups = -(-draws // LANES)
    ranges = -(-turns // -(-turns // max(1, WARPS // (samples * groups))))
    groups = min(draws, max(groups, WARPS // (samples * ranges)))
    partials = out.new_empty(ranges, draws, out.shape[1]) if ranges > 1 else None
    tensors = (out, *images(axis, a.x[None]), a.sigma, partials)
    return Arguments(_native.noise_view(a.noise, features), tensors, (-(-draws // groups),))


def noise_score(out: Tensor, a: NoiseScore) -> Arguments:
    axis = a.feature_dim % out.dim()
    sums = walsh_sums(a.noise, a.loss_weight, shared=True)
    tensors = (*images(axis, out[None]), a.loss_weight, a.sigma, sums)
    return Arguments(_native.noise_view(a.noise, out.shape[axis]), tensors)


def scale_shift_grad_(a: ScaleShiftGradient) -> Arguments:
    x = a.x[None] if a.shared else a.x
    axis = a.feature_dim % (x.dim() - 1)
    cols = x.shape[axis + 1]
    rows = a.loss_weight.shape[1] * a.noise.positions
    col_tiles = -(-(a.noise.col_offset % 4 + cols) // tiles.SCALE_SHIFT_COLUMNS)
    ranges = max(1, min(BLOCKS // max(col_tiles, 1), -(-rows // tiles.SCALE_SHIFT_ROWS)))
    partials = torch.empty(ranges, 3, cols, dtype=torch.float32, device=x.device)
    done = arrival_counter(x.device).view(torch.int64)
    sums = walsh_sums(a.noise, a.loss_weight, a.shared or a.grad_weight is None)
    tensors = (*a.buffers.values(), *images(axis, x), a.loss_weight, a.sigma, partials, done, sums)
    return Arguments(_native.noise_view(a.noise, cols), tensors)
