"""noisy_linear: the noise is added to a tile of the product while it is still in registers."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ulr_kernels.backends.triton import tiles
from ulr_kernels.backends.triton.launch import Launch, cdiv, noise_arguments, strides, tiled
from ulr_kernels.backends.triton.noise_contract import (
    RADEMACHER,
    no_signs,
    noise_tile,
    open_source,
    raw_noise,
    shared_signs,
)
from ulr_kernels.ops._linear import Linear, LinearGradient


@triton.jit
def product_tile(
    x,
    weight,
    bias,
    row,
    row_inside,
    col,
    col_inside,
    inputs,
    stride_x_row,
    stride_x_input,
    stride_weight_col,
    stride_weight_input,
    stride_bias,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """x W^T + b of a tile, fp32 [BR, BC]; `row` and `col` are int64. fp32 is multiplied without tensor cores."""
    k = tl.arange(0, BK)
    x_tile = x + row[:, None] * stride_x_row + k[None, :] * tl.cast(stride_x_input, tl.int64)
    weight_tile = weight + col[None, :] * stride_weight_col + k[:, None] * tl.cast(stride_weight_input, tl.int64)
    total = tl.zeros([BR, BC], tl.float32)
    for start in range(0, inputs, BK):
        k_inside = k < inputs - start
        a = tl.load(x_tile, mask=row_inside[:, None] & k_inside[None, :], other=0)
        b = tl.load(weight_tile, mask=k_inside[:, None] & col_inside[None, :], other=0)
        total = tl.dot(a, b, total, input_precision="ieee")
        x_tile += BK * tl.cast(stride_x_input, tl.int64)
        weight_tile += BK * tl.cast(stride_weight_input, tl.int64)
    if bias is not None:
        total += tl.load(bias + col * stride_bias, mask=col_inside, other=0).to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=["rows", "draws", "draws_here", "draw", "row_offset", "first", "width"])
def noisy_linear_kernel(
    y,
    x,
    weight,
    bias,
    sigma,
    key,
    table,
    directions,
    rows,
    features,
    inputs,
    draws,
    draws_here,
    draw: tl.uint32,
    row_offset: tl.uint32,
    first: tl.uint32,
    shift,
    positions,
    width: tl.int64,
    stride_x_copy,
    stride_x_row,
    stride_x_input,
    stride_weight_col,
    stride_weight_input,
    stride_bias,
    stride_sigma,
    SHARED: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    DIST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """A program makes a tile, for `draws_here` draws. Copies that share x share one product."""
    PER_CALL: tl.constexpr = 128 if DIST >= RADEMACHER else 4
    col_tiles = tl.cdiv(features + shift, BC)
    tiles = col_tiles * tl.cdiv(rows, BR)
    tile = tl.program_id(0) % tiles
    begin = tl.program_id(0) // tiles * draws_here
    col_tile = tile % col_tiles
    row = (tile // col_tiles).to(tl.int64) * BR + tl.arange(0, BR)
    col = col_tile.to(tl.int64) * BC - shift + tl.arange(0, BC)
    row_inside = row < rows
    col_inside = (col >= 0) & (col < features)

    if not SHARED:
        x += begin.to(tl.int64) * stride_x_copy
    clean = product_tile(
        x, weight, bias, row, row_inside, col, col_inside, inputs, stride_x_row, stride_x_input,
        stride_weight_col, stride_weight_input, stride_bias, BR, BC, BK,
    )  # fmt: skip
    mirror = clean  # the product that the negated noise is added to
    if ANTITHETIC and not SHARED:
        mirror = product_tile(
            x + tl.cast(draws, tl.int64) * stride_x_copy, weight, bias, row, row_inside, col, col_inside, inputs,
            stride_x_row, stride_x_input, stride_weight_col, stride_weight_input, stride_bias, BR, BC, BK,
        )  # fmt: skip

    source = open_source(key, table)
    scale = tl.load(sigma + col * stride_sigma, mask=col_inside, other=0)[None, :]
    inside = row_inside[:, None] & col_inside[None, :]
    copy_size = tl.cast(rows, tl.int64) * features
    y_tile = y + row[:, None] * features + col[None, :]
    rows_of_noise = tl.cast(row_offset, tl.uint32) + row.to(tl.uint32)
    calls = tl.cast(first, tl.uint32) + (col_tile * (BC // PER_CALL)).to(tl.uint32)
    kept = no_signs(DIST, BR, BC)
    for d in range(begin, min(begin + draws_here, draws)):
        this_draw = (tl.cast(draw, tl.int64) + d).to(tl.uint32)
        kept = shared_signs(kept, d == begin, rows_of_noise, calls, this_draw, source, DIST, BR, BC)
        raw = raw_noise(
            rows_of_noise, calls, this_draw, source, directions, positions, tl.cast(width, tl.int32), DIST, BR, BC, kept
        )
        eps = noise_tile(raw, source, DIST)
        tl.store(y_tile + d * copy_size, tl.fma(scale, eps, clean).to(y.dtype.element_ty), mask=inside)
        if ANTITHETIC:
            tl.store(y_tile + (d + draws) * copy_size, tl.fma(-scale, eps, mirror).to(y.dtype.element_ty), mask=inside)


def noisy_linear_launch(y: Tensor, a: Linear) -> Launch:
    _, rows, _, features, shared = a.sizes
    draws = a.noise.draws(a.copies)
    tile = tiles.FORWARD[a.noise.dist, a.x.element_size()]
    which = noise_arguments(a.noise, features)
    tile_count = cdiv(rows, tile.rows) * cdiv(features + which["shift"], tile.cols)
    draws_here = tiles.draws_per_program(draws, tile_count) if shared else 1
    return tiled(
        noisy_linear_kernel,
        tile_count * cdiv(draws, draws_here),
        {
            "y": y,
            **linear_arguments(a),
            **which,
            "rows": rows,
            "features": features,
            "draws": draws,
            "draws_here": draws_here,
            "SHARED": shared,
            "ANTITHETIC": a.noise.antithetic,
        },
        tile,
    )


def linear_arguments(a: Linear | LinearGradient) -> dict[str, Any]:
    """The operands of a product with noise, and their strides."""
    x, weight, bias, sigma = a.x, a.weight, a.bias, a.sigma
    return {
        "x": x,
        "weight": weight,
        "bias": bias,
        "sigma": sigma,
        "inputs": x.shape[-1],
        **strides("stride_x_", x if x.dim() == 3 else x.unsqueeze(0), "copy", "row", "input"),
        **strides("stride_weight_", weight, "col", "input"),
        **strides("stride_", bias, "bias"),
        **strides("stride_", sigma, "sigma"),
    }
