"""Noise on a weight, in tiles: of low rank from its factors, and a tile of W' from one of W."""

from typing import Any

import torch
import triton
import triton.language as tl

from ulr_kernels import noise_contract
from ulr_kernels.backends._native import float_bits
from ulr_kernels.backends.triton.launch import noise_code, table
from ulr_kernels.backends.triton.noise_contract import (
    HADAMARD,
    HADAMARD_BITS,
    RADEMACHER,
    noise_tile,
    open_source,
    philox,
    quantile,
    raw_noise,
    slots,
    walsh_words,
)
from ulr_kernels.ops._perturbed import WeightNoise

FOLD_IN = tl.constexpr(noise_contract.FOLD_IN_COUNTER)
ROW_FACTOR, COL_FACTOR = (tl.constexpr(stream) for stream in noise_contract.LOW_RANK_STREAMS)


@triton.jit
def factor_source(source, stream: tl.constexpr):
    """`source` with the key of a factor of low-rank noise: fold_in(key, stream)."""
    zero = source[0] - source[0]
    low, high, _, _ = philox(zero + stream, zero, zero, zero + FOLD_IN, source[0], source[1])
    return low, high, source[2], source[3], source[4], source[5]


@triton.jit
def _sign_of(bits):
    """1.0 for an even number, -1.0 for an odd one."""
    return ((bits << 31) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _row_factor(i, row, draw, source, DIST: tl.constexpr):
    """Column `row` (uint32 [BR]) of row i of noise."""
    zero = tl.zeros_like(row)
    calls = row >> (7 if DIST >= RADEMACHER else 2)
    w0, w1, w2, w3 = philox(calls, zero + i, zero + draw, zero, source[0], source[1])
    which = ((row >> 5) if DIST >= RADEMACHER else row) & 3
    word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    if DIST >= RADEMACHER:
        return _sign_of(word >> (row & 31))
    else:
        return quantile(word, source)


@triton.jit
def _tile(rows, col, draw, width, source, DIST: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """fp32 [BR, BC] of full rank: uint32 `rows`, and the columns from int64 `col` on, which BC or a call divides.

    A tile of signs may be narrower than the 128 that a call makes: then it shifts one word of the call.
    """
    if DIST >= RADEMACHER and BC < 128:
        zero = tl.zeros_like(rows)
        call_draw = draw
        if DIST == HADAMARD:
            call_draw = draw >> HADAMARD_BITS
        w0, w1, w2, w3 = philox(zero + (col >> 7).to(tl.uint32), rows, zero + call_draw, zero, source[0], source[1])
        which = (col >> 5) & 3
        word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
        if DIST == HADAMARD:
            word ^= walsh_words(slots(rows, (col & -32).to(tl.uint32), None, width), draw)
        bit = (col & 31).to(tl.uint32) + tl.arange(0, BC).to(tl.uint32)
        return _sign_of(word[:, None] >> bit[None, :])
    else:
        first = (col >> (7 if DIST >= RADEMACHER else 2)).to(tl.uint32)
        return noise_tile(raw_noise(rows, first, draw, source, None, None, width, DIST, BR, BC), source, DIST)


@triton.jit
def low_rank_noise(
    rows, col, draw, by_row, by_col, rank, scale, DIST: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """fp32 [BR, BC] of A B^T * scale: rows and columns as of a tile of full rank."""
    total = tl.zeros([BR, BC], tl.float32)
    for i in range(rank):
        a = _row_factor(i, rows, draw, by_row, DIST)
        b = _tile(tl.zeros([1], tl.uint32) + i, col, draw, 0, by_col, DIST, 1, BC)
        total = tl.fma(tl.broadcast_to(a[:, None], (BR, BC)), tl.broadcast_to(b, (BR, BC)), total)
    return total * scale


@triton.jit
def open_weight_noise(key, table, rank):
    """The sources of a weight's noise: one, or, if `rank` is not None, those of its two factors."""
    source = open_source(key, table)
    if rank is None:
        return (source,)
    else:
        return factor_source(source, ROW_FACTOR), factor_source(source, COL_FACTOR)


@triton.jit
def weight_noise(
    rows, col, draw, width, sources, rank, scale_bits, DIST: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """fp32 [BR, BC]. `width` counts the columns of the whole weight; `scale_bits` are those of 1 / sqrt(rank) (see
    `noise_contract.number_of`)."""
    if rank is None:
        return _tile(rows, col, draw, width, sources[0], DIST, BR, BC)
    else:
        scale = tl.cast(scale_bits, tl.uint32).to(tl.float32, bitcast=True)
        return low_rank_noise(rows, col, draw, sources[0], sources[1], rank, scale, DIST, BR, BC)


@triton.jit
def perturbed(weight, sigma, eps, noised):
    """round(fma(sigma, eps, W)) where `noised`, else W."""
    wide = weight.to(tl.float32)
    return tl.where(noised, tl.fma(sigma, eps, wide), wide).to(weight.dtype)


def weight_arguments(how: WeightNoise) -> dict[str, Any]:
    """A kernel's arguments for the noise of a weight; `how` is placed."""
    noise = how.noise
    return {
        "key": noise.key,
        "table": table(noise.dist, noise.key.device),
        "DIST": noise_code(noise.dist, noise.sampler),
        "draws": how.draws,
        "draw": noise.draw,
        "row_offset": noise.row_offset,
        "col_offset": noise.col_offset,
        "width": noise.width,
        "mask": how.mask if how.mask is None else how.mask.view(torch.uint8),
        "rank": how.rank,
        "rank_scale": None if how.rank is None else float_bits(noise_contract.low_rank_scale(how.rank)),
    }
