# mypy: disable-error-code="assignment"
"""scale_shift_grad_: sums of scores over copies and rows, with and without x, in one launch."""

import torch
import triton
import triton.language as tl

from ulr_kernels.backends.arrival_counter import arrival_counter as counter_of
from ulr_kernels.backends.triton import tiles
from ulr_kernels.backends.triton.grid import grid_arguments, row_offsets
from ulr_kernels.backends.triton.launch import Launch, cdiv, noise_arguments, strides, tiled
from ulr_kernels.backends.triton.noise_contract import (
    RADEMACHER,
    join_parts,
    no_signs,
    noise_parts,
    noise_tile,
    open_source,
    raw_noise,
    score,
    shared_signs,
)
from ulr_kernels.backends.triton.scores import add, no_parts, weigh
from ulr_kernels.ops._axes import images
from ulr_kernels.ops.scale_shift_grad_ import ScaleShiftGradient


@triton.jit
def _finish(buffer, stride, partials, kind: tl.constexpr, ranges, features, SCALAR: tl.constexpr, BC: tl.constexpr):
    """Add the ranges' sums to a buffer, in order: column by column, or all columns to one number."""
    if buffer is not None:
        total = tl.zeros([BC], tl.float32)
        for start in range(0, features, BC):
            col = start + tl.arange(0, BC)
            inside = col < features
            if not SCALAR:
                total = tl.zeros([BC], tl.float32)
            for i in range(ranges):
                at = partials + (tl.cast(i, tl.int64) * 3 + kind) * features + col
                total += tl.load(at, mask=inside, other=0, cache_modifier=".cg")
            if not SCALAR:
                add(buffer + col.to(tl.int64) * stride, total, inside)
        if SCALAR:
            tl.store(buffer, (tl.load(buffer).to(tl.float32) + tl.sum(total, 0)).to(buffer.dtype.element_ty))


@triton.jit(do_not_specialize=["rows", "draws", "draw", "row_offset", "first", "width", "ranges", "tiles_of_range"])
def scale_shift_grad_kernel(
    grad_weight,
    grad_bias,
    grad_log_sigma,
    partials,
    arrival_counter,
    x,
    loss_weight,
    sigma,
    key,
    table,
    directions,
    rows,
    features,
    draws,
    ranges,
    tiles_of_range,
    draw: tl.uint32,
    row_offset: tl.uint32,
    first: tl.uint32,
    shift,
    positions,
    width: tl.int64,
    b_size,
    c_size,
    stride_grad_weight,
    stride_grad_bias,
    stride_grad_log_sigma,
    stride_x_copy,
    stride_x_a,
    stride_x_col,
    stride_x_b,
    stride_x_c,
    stride_loss_copy,
    stride_loss_sample,
    stride_sigma,
    SCALAR_WEIGHT: tl.constexpr,
    SCALAR_BIAS: tl.constexpr,
    SCALAR_LOG_SIGMA: tl.constexpr,
    SHARED: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    DIST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """A program sums a range of rows for some columns; the last one to arrive adds up the ranges, in order."""
    PER_CALL: tl.constexpr = 128 if DIST >= RADEMACHER else 4
    P: tl.constexpr = 16 if DIST >= RADEMACHER else 4
    col_tiles = tl.cdiv(features + shift, BC)
    col_tile = tl.program_id(0) % col_tiles
    this_range = tl.program_id(0) // col_tiles
    col = col_tile.to(tl.int64) * BC - shift + tl.arange(0, BC)
    col_inside = (col >= 0) & (col < features)
    scale = tl.load(sigma + col * stride_sigma, mask=col_inside, other=1)
    source = open_source(key, table)
    calls = tl.cast(first, tl.uint32) + (col_tile * (BC // PER_CALL)).to(tl.uint32)
    mirror_x = tl.cast(draws, tl.int64) * stride_x_copy
    mirror_loss = tl.cast(draws, tl.int64) * stride_loss_copy
    by_weight = tl.zeros([BC], tl.float32)
    by_bias = tl.zeros([BC], tl.float32)
    by_log_sigma = tl.zeros([BC], tl.float32)
    for row_tile in range(this_range * tiles_of_range, (this_range + 1) * tiles_of_range):
        row = tl.cast(row_tile, tl.int64) * BR + tl.arange(0, BR)
        row_inside = row < rows
        inside = row_inside[:, None] & col_inside[None, :]
        if not SHARED:
            x_rows = row_offsets(row, b_size, c_size, stride_x_a, stride_x_b, stride_x_c)
            x_tile = x + x_rows[:, None] + (col * stride_x_col)[None, :]
        losses = loss_weight + row // positions * stride_loss_sample
        rows_of_noise = tl.cast(row_offset, tl.uint32) + row.to(tl.uint32)
        reduced = no_parts(P, BR, BC)
        reduced_log = no_parts(P, BR, BC)
        kept = no_signs(DIST, BR, BC)
        for d in range(draws):
            copy = tl.cast(d, tl.int64)
            this_draw = (tl.cast(draw, tl.int64) + d).to(tl.uint32)
            kept = shared_signs(kept, d == 0, rows_of_noise, calls, this_draw, source, DIST, BR, BC)
            raw = raw_noise(
                rows_of_noise,
                calls,
                this_draw,
                source,
                directions,
                positions,
                tl.cast(width, tl.int32),
                DIST,
                BR,
                BC,
                kept,
            )
            parts = noise_parts(raw, source, DIST)
            plus, minus, reduced, reduced_log = weigh(
                reduced, reduced_log, parts, losses + copy * stride_loss_copy, mirror_loss, row_inside, grad_log_sigma,
                DIST, ANTITHETIC,
            )  # fmt: skip
            if not SHARED and grad_weight is not None:
                slope = score(noise_tile(raw, source, DIST), DIST)
                own = tl.load(x_tile + copy * stride_x_copy, mask=inside, other=0).to(tl.float32)
                by_weight += tl.sum(plus * slope * own, 0)
                if ANTITHETIC:
                    own = tl.load(x_tile + copy * stride_x_copy + mirror_x, mask=inside, other=0).to(tl.float32)
                    by_weight -= tl.sum(minus * slope * own, 0)
        reduced_tile = join_parts(reduced)
        by_bias += tl.sum(reduced_tile, 0)
        if SHARED and grad_weight is not None:  # addresses only now, so that the draws have all registers
            x_rows = row_offsets(row, b_size, c_size, stride_x_a, stride_x_b, stride_x_c)
            x_tile = x + x_rows[:, None] + (col * stride_x_col)[None, :]
            by_weight += tl.sum(reduced_tile * tl.load(x_tile, mask=inside, other=0).to(tl.float32), 0)
        if grad_log_sigma is not None:
            by_log_sigma += tl.sum(join_parts(reduced_log), 0)

    at = partials + tl.cast(this_range, tl.int64) * 3 * features + col
    tl.store(at, by_weight / scale, mask=col_inside)
    tl.store(at + features, by_bias / scale, mask=col_inside)
    tl.store(at + 2 * tl.cast(features, tl.int64), by_log_sigma, mask=col_inside)
    tl.debug_barrier()
    if tl.atomic_add(arrival_counter, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        _finish(grad_weight, stride_grad_weight, partials, 0, ranges, features, SCALAR_WEIGHT, BC)
        _finish(grad_bias, stride_grad_bias, partials, 1, ranges, features, SCALAR_BIAS, BC)
        _finish(grad_log_sigma, stride_grad_log_sigma, partials, 2, ranges, features, SCALAR_LOG_SIGMA, BC)
        tl.store(arrival_counter, 0)


def scale_shift_grad_(a: ScaleShiftGradient) -> None:
    if a.x.numel():
        scale_shift_grad_launch(a).run()


def scale_shift_grad_launch(a: ScaleShiftGradient) -> Launch:
    x = a.x[None] if a.shared else a.x
    (grid,) = images(a.feature_dim % (x.dim() - 1), x)
    features = grid.shape[2]
    rows = grid[0].numel() // features
    tile = tiles.SUMS[a.noise.dist]
    noise = noise_arguments(a.noise, features)
    col_tiles, row_tiles = cdiv(features + noise["shift"], tile.cols), cdiv(rows, tile.rows)
    tiles_of_range = cdiv(row_tiles, max(1, 2 * tiles.PROGRAMS // col_tiles))
    ranges = cdiv(row_tiles, tiles_of_range)
    buffers = a.buffers
    return tiled(
        scale_shift_grad_kernel,
        col_tiles * ranges,
        {
            **buffers,
            **{f"stride_{name}": b.stride(0) if b is not None and b.dim() else 0 for name, b in buffers.items()},
            **{f"SCALAR_{name[5:].upper()}": b is not None and b.dim() == 0 for name, b in buffers.items()},
            "partials": torch.empty(ranges, 3, features, dtype=torch.float32, device=x.device),
            "arrival_counter": counter_of(x.device),
            "x": grid,
            "loss_weight": a.loss_weight,
            "sigma": a.sigma,
            **noise,
            "rows": rows,
            "features": features,
            "draws": a.noise.draws(a.loss_weight.shape[0]),
            "ranges": ranges,
            "tiles_of_range": tiles_of_range,
            **grid_arguments("x", grid),
            **strides("stride_loss_", a.loss_weight, "copy", "sample"),
            **strides("stride_", a.sigma, "sigma"),
            "SHARED": grid.shape[0] == 1,
            "ANTITHETIC": a.noise.antithetic,
        },
        tile,
    )
