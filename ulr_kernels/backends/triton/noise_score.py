# mypy: disable-error-code="assignment"
"""noise_score: the score, weighted by the losses and summed over copies."""

import triton
import triton.language as tl
from torch import Tensor

from ulr_kernels.backends.triton import tiles
from ulr_kernels.backends.triton.grid import grid_arguments, row_offsets
from ulr_kernels.backends.triton.launch import Launch, cdiv, noise_arguments, strides, tiled
from ulr_kernels.backends.triton.noise_contract import (
    RADEMACHER,
    join_parts,
    no_signs,
    noise_parts,
    open_source,
    raw_noise,
    shared_signs,
)
from ulr_kernels.backends.triton.scores import no_parts, weighted
from ulr_kernels.ops._axes import images
from ulr_kernels.ops.noise_score import NoiseScore


@triton.jit(do_not_specialize=["rows", "draws", "draw", "row_offset", "first", "width"])
def noise_score_kernel(
    out,
    loss_weight,
    sigma,
    key,
    table,
    directions,
    rows,
    features,
    draws,
    draw: tl.uint32,
    row_offset: tl.uint32,
    first: tl.uint32,
    shift,
    positions,
    width: tl.int64,
    b_size,
    c_size,
    stride_out_a,
    stride_out_col,
    stride_out_b,
    stride_out_c,
    stride_loss_copy,
    stride_loss_sample,
    stride_sigma,
    ANTITHETIC: tl.constexpr,
    DIST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """A program makes a tile."""
    PER_CALL: tl.constexpr = 128 if DIST >= RADEMACHER else 4
    P: tl.constexpr = 16 if DIST >= RADEMACHER else 4
    col_tiles = tl.cdiv(features + shift, BC)
    col_tile = tl.program_id(0) % col_tiles
    row = (tl.program_id(0) // col_tiles).to(tl.int64) * BR + tl.arange(0, BR)
    col = col_tile.to(tl.int64) * BC - shift + tl.arange(0, BC)
    row_inside = row < rows
    col_inside = (col >= 0) & (col < features)
    scale = tl.load(sigma + col * stride_sigma, mask=col_inside, other=1)[None, :]
    source = open_source(key, table)
    rows_of_noise = tl.cast(row_offset, tl.uint32) + row.to(tl.uint32)
    calls = tl.cast(first, tl.uint32) + (col_tile * (BC // PER_CALL)).to(tl.uint32)
    losses = loss_weight + row // positions * stride_loss_sample
    total = no_parts(P, BR, BC)
    kept = no_signs(DIST, BR, BC)
    for d in range(draws):
        copy = tl.cast(d, tl.int64)
        this_draw = (tl.cast(draw, tl.int64) + d).to(tl.uint32)
        kept = shared_signs(kept, d == 0, rows_of_noise, calls, this_draw, source, DIST, BR, BC)
        raw = raw_noise(
            rows_of_noise, calls, this_draw, source, directions, positions, tl.cast(width, tl.int32), DIST, BR, BC, kept
        )
        factor = tl.load(losses + copy * stride_loss_copy, mask=row_inside, other=0)[:, None]
        if ANTITHETIC:  # the score is odd
            factor -= tl.load(losses + (copy + draws) * stride_loss_copy, mask=row_inside, other=0)[:, None]
        total = weighted(total, factor, noise_parts(raw, source, DIST), DIST)
    out_rows = row_offsets(row, b_size, c_size, stride_out_a, stride_out_b, stride_out_c)
    out_tile = out + out_rows[:, None] + (col * stride_out_col)[None, :]
    tl.store(out_tile, join_parts(total) / scale, mask=row_inside[:, None] & col_inside[None, :])


def noise_score_launch(out: Tensor, a: NoiseScore) -> Launch:
    (grid,) = images(a.feature_dim % out.dim(), out[None])
    features = grid.shape[2]
    rows = grid.numel() // features
    tile = tiles.SCORES[a.noise.dist]
    noise = noise_arguments(a.noise, features)
    arguments = grid_arguments("out", grid)
    del arguments["stride_out_copy"]  # there is one
    return tiled(
        noise_score_kernel,
        cdiv(rows, tile.rows) * cdiv(features + noise["shift"], tile.cols),
        {
            "out": grid,
            "loss_weight": a.loss_weight,
            "sigma": a.sigma,
            **noise,
            "rows": rows,
            "features": features,
            "draws": a.noise.draws(a.loss_weight.shape[0]),
            **arguments,
            **strides("stride_loss_", a.loss_weight, "copy", "sample"),
            **strides("stride_", a.sigma, "sigma"),
            "ANTITHETIC": a.noise.antithetic,
        },
        tile,
    )
