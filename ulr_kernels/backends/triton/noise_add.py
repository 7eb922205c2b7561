# mypy: disable-error-code="assignment"
"""noise_add: noise on a tile of any tensor."""

import triton
import triton.language as tl
from torch import Tensor

from ulr_kernels.backends.triton import tiles
from ulr_kernels.backends.triton.grid import grid_arguments, row_offsets
from ulr_kernels.backends.triton.launch import Launch, cdiv, noise_arguments, strides, tiled
from ulr_kernels.backends.triton.noise_contract import (
    RADEMACHER,
    no_signs,
    noise_tile,
    open_source,
    raw_noise,
    shared_signs,
)
from ulr_kernels.ops._axes import images
from ulr_kernels.ops.noise_add import NoiseAdd


@triton.jit(do_not_specialize=["rows", "draws", "draw", "row_offset", "first", "width"])
def noise_add_kernel(
    y,
    x,
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
    stride_y_copy,
    stride_y_a,
    stride_y_col,
    stride_y_b,
    stride_y_c,
    stride_x_copy,
    stride_x_a,
    stride_x_col,
    stride_x_b,
    stride_x_c,
    stride_sigma,
    SHARED: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    DIST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """A program makes a tile, for all draws."""
    PER_CALL: tl.constexpr = 128 if DIST >= RADEMACHER else 4
    col_tiles = tl.cdiv(features + shift, BC)
    col_tile = tl.program_id(0) % col_tiles
    row = (tl.program_id(0) // col_tiles).to(tl.int64) * BR + tl.arange(0, BR)
    col = col_tile.to(tl.int64) * BC - shift + tl.arange(0, BC)
    col_inside = (col >= 0) & (col < features)
    inside = (row < rows)[:, None] & col_inside[None, :]
    scale = tl.load(sigma + col * stride_sigma, mask=col_inside, other=0)[None, :]
    x_rows = row_offsets(row, b_size, c_size, stride_x_a, stride_x_b, stride_x_c)
    y_rows = row_offsets(row, b_size, c_size, stride_y_a, stride_y_b, stride_y_c)
    x_tile = x + x_rows[:, None] + (col * stride_x_col)[None, :]
    y_tile = y + y_rows[:, None] + (col * stride_y_col)[None, :]
    source = open_source(key, table)
    rows_of_noise = tl.cast(row_offset, tl.uint32) + row.to(tl.uint32)
    calls = tl.cast(first, tl.uint32) + (col_tile * (BC // PER_CALL)).to(tl.uint32)
    if SHARED:
        clean = tl.load(x_tile, mask=inside, other=0).to(tl.float32)
    kept = no_signs(DIST, BR, BC)
    for d in range(draws):
        copy = tl.cast(d, tl.int64)
        this_draw = (tl.cast(draw, tl.int64) + d).to(tl.uint32)
        kept = shared_signs(kept, d == 0, rows_of_noise, calls, this_draw, source, DIST, BR, BC)
        raw = raw_noise(
            rows_of_noise, calls, this_draw, source, directions, positions, tl.cast(width, tl.int32), DIST, BR, BC, kept
        )
        eps = noise_tile(raw, source, DIST)
        if not SHARED:
            clean = tl.load(x_tile + copy * stride_x_copy, mask=inside, other=0).to(tl.float32)
        noised = tl.fma(scale, eps, clean)
        tl.store(y_tile + copy * stride_y_copy, noised.to(y.dtype.element_ty), mask=inside)
        if ANTITHETIC:
            if not SHARED:
                clean = tl.load(x_tile + (copy + draws) * stride_x_copy, mask=inside, other=0).to(tl.float32)
            noised = tl.fma(-scale, eps, clean)
            tl.store(y_tile + (copy + draws) * stride_y_copy, noised.to(y.dtype.element_ty), mask=inside)


def noise_add_launch(y: Tensor, a: NoiseAdd) -> Launch:
    to, clean = images(a.feature_dim % (y.dim() - 1), y, a.x[None] if a.shared else a.x)
    features = to.shape[2]
    rows = to[0].numel() // features
    tile = tiles.NOISE[a.noise.dist]
    noise = noise_arguments(a.noise, features)
    return tiled(
        noise_add_kernel,
        cdiv(rows, tile.rows) * cdiv(features + noise["shift"], tile.cols),
        {
            "y": to,
            "x": clean,
            "sigma": a.sigma,
            **noise,
            "rows": rows,
            "features": features,
            "draws": a.noise.draws(a.copies),
            **grid_arguments("x", clean),
            **grid_arguments("y", to),
            **strides("stride_", a.sigma, "sigma"),
            "SHARED": clean.shape[0] == 1,
            "ANTITHETIC": a.noise.antithetic,
        },
        tile,
    )
