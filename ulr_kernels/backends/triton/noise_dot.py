# mypy: disable-error-code="assignment"
"""noise_dot: tiles of noise times a tensor, summed over each sample."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulr_kernels.backends.triton import tiles
from ulr_kernels.backends.triton.grid import grid_arguments, row_offsets
from ulr_kernels.backends.triton.launch import Launch, cdiv, noise_arguments, strides, tiled
from ulr_kernels.backends.triton.noise_contract import (
    RADEMACHER,
    no_signs,
    noise_parts,
    open_source,
    raw_noise,
    shared_signs,
)
from ulr_kernels.ops._axes import images
from ulr_kernels.ops.noise_dot import NoiseDot


@triton.jit
def _scaled_parts(x_rows, sigma, col, features, stride_col, stride_sigma, row_inside, P: tl.constexpr):
    """sigma * x as the parts of `noise_parts`; `col` are the columns of part 0; 0 outside x."""
    parts = ()
    for p in tl.static_range(P):
        at = col + p
        inside = (at >= 0) & (at < features)
        value = tl.load(
            x_rows[:, None] + (at * stride_col)[None, :], mask=row_inside[:, None] & inside[None, :], other=0
        )
        scale = tl.load(sigma + at * stride_sigma, mask=inside, other=0)
        parts = parts + (value.to(tl.float32) * scale[None, :],)
    return parts


@triton.jit(do_not_specialize=["samples", "draws", "draws_here", "draw", "row_offset", "first", "width"])
def noise_dot_kernel(
    sums,
    x,
    sigma,
    key,
    table,
    directions,
    samples,
    features,
    draws,
    draws_here,
    draw: tl.uint32,
    row_offset: tl.uint32,
    first: tl.uint32,
    shift,
    positions,
    width: tl.int64,
    b_size,
    c_size,
    stride_x_a,
    stride_x_col,
    stride_x_b,
    stride_x_c,
    stride_sigma,
    POSITIONS: tl.constexpr,
    DIST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """A program sums one tile for some draws. Its rows are `POSITIONS` of each of BR / POSITIONS samples."""
    PER_CALL: tl.constexpr = 128 if DIST >= RADEMACHER else 4
    P: tl.constexpr = 16 if DIST >= RADEMACHER else 4
    SAMPLES: tl.constexpr = BR // POSITIONS
    col_tiles = tl.cdiv(features + shift, BC)
    tiles_of_sample = col_tiles * tl.cdiv(positions, POSITIONS)
    sample_tiles = tl.cdiv(samples, SAMPLES)
    tile = tl.program_id(0) % tiles_of_sample
    sample_tile = tl.program_id(0) // tiles_of_sample % sample_tiles
    first_draw = tl.program_id(0) // tiles_of_sample // sample_tiles * draws_here
    col_tile = tile % col_tiles
    row_of_tile = tl.arange(0, BR)
    sample = sample_tile.to(tl.int64) * SAMPLES + row_of_tile // POSITIONS
    position = (tile // col_tiles).to(tl.int64) * POSITIONS + row_of_tile % POSITIONS
    row = sample * positions + position
    row_inside = (sample < samples) & (position < positions)
    x_rows = x + row_offsets(row, b_size, c_size, stride_x_a, stride_x_b, stride_x_c)
    col = col_tile.to(tl.int64) * BC - shift + P * tl.arange(0, BC // P)
    scaled = _scaled_parts(x_rows, sigma, col, features, stride_x_col, stride_sigma, row_inside, P)
    source = open_source(key, table)
    rows_of_noise = tl.cast(row_offset, tl.uint32) + row.to(tl.uint32)
    calls = tl.cast(first, tl.uint32) + (col_tile * (BC // PER_CALL)).to(tl.uint32)
    sum_sample = sample_tile.to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    sums_tile = sums + tile.to(tl.int64) * draws * samples + sum_sample
    kept = no_signs(DIST, BR, BC)
    for d in range(first_draw, tl.minimum(first_draw + draws_here, draws)):
        this_draw = (tl.cast(draw, tl.int64) + d).to(tl.uint32)
        kept = shared_signs(kept, d == first_draw, rows_of_noise, calls, this_draw, source, DIST, BR, BC)
        raw = raw_noise(
            rows_of_noise, calls, this_draw, source, directions, positions, tl.cast(width, tl.int32), DIST, BR, BC, kept
        )
        parts = noise_parts(raw, source, DIST)
        products = tl.zeros([BR, BC // P], tl.float32)
        for p in tl.static_range(P):
            products = tl.fma(parts[p], scaled[p], products)
        total = tl.sum(products.reshape(SAMPLES, POSITIONS * (BC // P)), 1)
        tl.store(sums_tile + tl.cast(d, tl.int64) * samples, total, mask=sum_sample < samples)


def noise_dot(out: Tensor, a: NoiseDot) -> None:
    if not a.x.numel():
        out.zero_()
        return
    draws = a.noise.draws(a.copies)
    launch = noise_dot_launch(out, a)
    launch.run()
    sums = launch.arguments["sums"]  # of each tile, which torch adds up in one order
    if sums.shape[0] > 1:
        torch.sum(sums, 0, out=out[:draws])
    if a.noise.antithetic:
        torch.neg(out[:draws], out=out[draws:])


def noise_dot_launch(out: Tensor, a: NoiseDot) -> Launch:
    """The launch that writes the sums of the tiles, [tiles of a sample, draws, samples]: to `out` if there is one."""
    (grid,) = images(a.feature_dim % a.x.dim(), a.x[None])
    features, samples, draws = grid.shape[2], out.shape[1], a.noise.draws(a.copies)
    tile = tiles.NOISE[a.noise.dist]
    noise = noise_arguments(a.noise, features)
    rows_of_sample = min(tile.rows, triton.next_power_of_2(a.noise.positions))
    tiles_of_sample = cdiv(features + noise["shift"], tile.cols) * cdiv(a.noise.positions, rows_of_sample)
    count = tiles_of_sample * cdiv(samples * rows_of_sample, tile.rows)
    draws_here = tiles.draws_per_program(draws, count)
    sums = out[None, :draws] if tiles_of_sample == 1 else out.new_empty(tiles_of_sample, draws, samples)
    arguments = grid_arguments("x", grid)
    del arguments["stride_x_copy"]  # there is one
    return tiled(
        noise_dot_kernel,
        count * cdiv(draws, draws_here),
        {
            "sums": sums,
            "x": grid,
            "sigma": a.sigma,
            **noise,
            "samples": samples,
            "features": features,
            "draws": draws,
            "draws_here": draws_here,
            **arguments,
            **strides("stride_", a.sigma, "sigma"),
            "POSITIONS": rows_of_sample,
        },
        tile,
    )
