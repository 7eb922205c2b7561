"""philox4x32, fold_in and noise."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulr_kernels import noise_contract
from ulr_kernels.backends.triton import tiles
from ulr_kernels.backends.triton.launch import Launch, cdiv, noise_arguments, tiled
from ulr_kernels.backends.triton.noise_contract import RADEMACHER, noise_tile, open_source, raw_noise
from ulr_kernels.backends.triton.noise_contract import philox as philox_rounds
from ulr_kernels.ops.noise import FoldIn, Noise, Philox

BLOCK = 128


@triton.jit
def philox_kernel(out, counter, key, count, stride_call, stride_word, stride_key, BLOCK: tl.constexpr):
    call = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = call < count
    low = tl.load(key).to(tl.uint32)
    high = tl.load(key + stride_key).to(tl.uint32)
    word = counter + call * stride_call
    c0 = tl.load(word, mask=inside, other=0).to(tl.uint32)
    c1 = tl.load(word + stride_word, mask=inside, other=0).to(tl.uint32)
    c2 = tl.load(word + 2 * stride_word, mask=inside, other=0).to(tl.uint32)
    c3 = tl.load(word + 3 * stride_word, mask=inside, other=0).to(tl.uint32)
    w0, w1, w2, w3 = philox_rounds(c0, c1, c2, c3, low, high)
    tl.store(out + call * 4, w0.to(tl.int64), mask=inside)
    tl.store(out + call * 4 + 1, w1.to(tl.int64), mask=inside)
    tl.store(out + call * 4 + 2, w2.to(tl.int64), mask=inside)
    tl.store(out + call * 4 + 3, w3.to(tl.int64), mask=inside)


def philox4x32_launch(out: Tensor, a: Philox) -> Launch:
    calls = a.counter.reshape(-1, 4)  # a view, except for a counter with several axes that strides do not join
    return Launch(
        philox_kernel,
        cdiv(calls.shape[0], BLOCK),
        {
            "out": out,
            "counter": calls,
            "key": a.key,
            "count": calls.shape[0],
            "stride_call": calls.stride(0),
            "stride_word": calls.stride(1),
            "stride_key": a.key.stride(0),
            "BLOCK": BLOCK,
        },
    )


@triton.jit
def fold_in_kernel(out, key, data, count, stride_key, stride_data, COUNTER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    k = tl.load(key + i * stride_key, mask=inside, other=0)
    d = tl.load(data + i * stride_data, mask=inside, other=0)
    zero = tl.zeros([BLOCK], tl.uint32)
    low, high, _, _ = philox_rounds(
        d.to(tl.uint32), (d >> 32).to(tl.uint32), zero, zero + COUNTER, k.to(tl.uint32), (k >> 32).to(tl.uint32)
    )
    tl.store(out + i, low.to(tl.int64) | (high.to(tl.int64) << 32), mask=inside)


def fold_in_launch(out: Tensor, a: FoldIn) -> Launch:
    keys, numbers = (t.reshape(-1) for t in torch.broadcast_tensors(a.key, a.data))  # views, except for several axes
    return Launch(
        fold_in_kernel,
        cdiv(out.numel(), BLOCK),
        {
            "out": out,
            "key": keys,
            "data": numbers,
            "count": out.numel(),
            "stride_key": keys.stride(0),
            "stride_data": numbers.stride(0),
            "COUNTER": noise_contract.FOLD_IN_COUNTER,
            "BLOCK": BLOCK,
        },
    )


@triton.jit(do_not_specialize=["rows", "draw", "row_offset", "first", "width"])
def noise_kernel(
    out,
    key,
    table,
    directions,
    rows,
    cols: tl.int64,  # 2^34 fit the contract
    draw: tl.uint32,
    row_offset: tl.uint32,
    first: tl.uint32,
    shift,
    positions,
    width: tl.int64,
    DIST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    PER_CALL: tl.constexpr = 128 if DIST >= RADEMACHER else 4
    tiles = tl.cdiv(cols + shift, BC)
    tile = tl.program_id(0)
    col_tile = (tile % tiles).to(tl.int64)
    row = (tile // tiles).to(tl.int64) * BR + tl.arange(0, BR)
    col = col_tile * BC - shift + tl.arange(0, BC)
    source = open_source(key, table)
    raw = raw_noise(
        tl.cast(row_offset, tl.uint32) + row.to(tl.uint32),
        tl.cast(first, tl.uint32) + (col_tile * (BC // PER_CALL)).to(tl.uint32),
        tl.cast(draw, tl.uint32),
        source,
        directions,
        positions,
        tl.cast(width, tl.int32),
        DIST,
        BR,
        BC,
    )
    inside = (row < rows)[:, None] & ((col >= 0) & (col < cols))[None, :]
    tl.store(out + row[:, None] * cols + col[None, :], noise_tile(raw, source, DIST), mask=inside)


def noise_launch(out: Tensor, a: Noise) -> Launch:
    cols = out.shape[-1] if out.dim() else 1
    rows = out.numel() // cols
    tile = tiles.NOISE[a.noise.dist]
    which = noise_arguments(a.noise, cols)
    return tiled(
        noise_kernel,
        cdiv(rows, tile.rows) * cdiv(cols + which["shift"], tile.cols),
        {"out": out, **which, "rows": rows, "cols": cols},
        tile,
    )
