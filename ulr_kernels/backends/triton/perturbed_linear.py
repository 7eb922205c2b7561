"""perturbed_linear: each tile of the weight is perturbed in registers before the product."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulr_kernels import noise_contract
from ulr_kernels.backends.triton import tiles
from ulr_kernels.backends.triton.launch import Launch, cdiv, noise_arguments, strides, tiled
from ulr_kernels.backends.triton.noise_contract import RADEMACHER, noise_tile, open_source, raw_noise
from ulr_kernels.backends.triton.noisy_linear import product_tile
from ulr_kernels.backends.triton.weight_noise import COL_FACTOR, ROW_FACTOR, factor_source, perturbed
from ulr_kernels.ops.perturbed_linear import PerturbedLinear

RANKS = tl.constexpr(16)  # of low-rank noise at a time: the least that a product of tiles takes


@triton.jit(do_not_specialize=["rows", "draws", "draw", "row_offset", "first", "width"])
def perturbed_linear_kernel(
    y, x, weight, bias, sigma, mask, key, table, rows, features, inputs, draws: tl.uint32, draw: tl.uint32,
    row_offset: tl.uint32, first: tl.uint32, shift, width: tl.int64, stride_x_copy, stride_x_row, stride_x_input,
    stride_weight_col, stride_weight_input, stride_bias_copy, stride_bias, stride_mask_col, stride_mask_input,
    SHARED: tl.constexpr, ANTITHETIC: tl.constexpr, DIST: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """A program makes a tile of one copy, or of both copies of an antithetic pair, whose noise it makes once."""
    PER_CALL: tl.constexpr = 128 if DIST >= RADEMACHER else 4
    col_tiles = tl.cdiv(features, BC)
    tile = tl.program_id(0) % (col_tiles * tl.cdiv(rows, BR))
    copy = (tl.program_id(0) // (col_tiles * tl.cdiv(rows, BR))).to(tl.int64)
    row = (tile // col_tiles).to(tl.int64) * BR + tl.arange(0, BR)
    col = (tile % col_tiles).to(tl.int64) * BC + tl.arange(0, BC)
    row_inside = row < rows
    col_inside = col < features
    source = open_source(key, table)
    scale = tl.load(sigma)
    if not SHARED:
        x += copy * stride_x_copy
    minus_x = x + tl.cast(draws, tl.int64) * stride_x_copy
    rows_of_noise = row_offset + col.to(tl.uint32)
    d = (tl.cast(draw, tl.int64) + copy).to(tl.uint32)
    total = tl.zeros([BR, BC], tl.float32)
    mirror = total
    for start in range(0, inputs + shift, BK):
        k = start - shift + tl.arange(0, BK).to(tl.int64)
        k_inside = (k >= 0) & (k < inputs)
        inside = col_inside[:, None] & k_inside[None, :]
        w = tl.load(weight + col[:, None] * stride_weight_col + k[None, :] * stride_weight_input, mask=inside, other=0)
        calls = first + tl.cast(start // PER_CALL, tl.uint32)
        eps = noise_tile(raw_noise(rows_of_noise, calls, d, source, None, None, width, DIST, BC, BK), source, DIST)
        noised = inside
        if mask is not None:
            allowed = mask + col[:, None] * stride_mask_col + k[None, :] * stride_mask_input
            noised = inside & (tl.load(allowed, mask=inside, other=0) != 0)
        x_inside = row_inside[:, None] & k_inside[None, :]
        at = row[:, None] * stride_x_row + k[None, :] * stride_x_input
        a = tl.load(x + at, mask=x_inside, other=0)
        total = tl.dot(a, tl.trans(perturbed(w, scale, eps, noised)), total, input_precision="ieee")
        if ANTITHETIC:
            if not SHARED:
                a = tl.load(minus_x + at, mask=x_inside, other=0)
            mirror = tl.dot(a, tl.trans(perturbed(w, -scale, eps, noised)), mirror, input_precision="ieee")
    inside = row_inside[:, None] & col_inside[None, :]
    to = y + copy * rows * features + row[:, None] * features + col[None, :]
    second = tl.cast(draws, tl.int64)
    if bias is not None:
        b = bias + copy * stride_bias_copy + col * stride_bias
        total += tl.load(b, mask=col_inside, other=0).to(tl.float32)[None, :]
        if ANTITHETIC:
            b += second * stride_bias_copy
            mirror += tl.load(b, mask=col_inside, other=0).to(tl.float32)[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=inside)
    if ANTITHETIC:
        tl.store(to + second * rows * features, mirror.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "draws", "draw", "first", "first_feature", "copies_here"])
def low_rank_kernel(
    y, x, weight, bias, sigma, key, table, rows, features, inputs, draws: tl.uint32, draw: tl.uint32, first: tl.uint32,
    shift, first_feature: tl.uint32, feature_shift, rank, root, copies_here, stride_x_copy, stride_x_row,
    stride_x_input, stride_weight_col, stride_weight_input, stride_bias_copy, stride_bias,
    DIST: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A program makes the plain product of a tile, then adds sigma / sqrt(rank) * (x B) A^T for each of its copies."""
    PER_CALL: tl.constexpr = 128 if DIST >= RADEMACHER else 4
    col_tiles = tl.cdiv(features + feature_shift, BC)
    tile = tl.program_id(0) % (col_tiles * tl.cdiv(rows, BR))
    begin = (tl.program_id(0) // (col_tiles * tl.cdiv(rows, BR))).to(tl.int64)
    row = (tile // col_tiles).to(tl.int64) * BR + tl.arange(0, BR)
    col = (tile % col_tiles).to(tl.int64) * BC - feature_shift + tl.arange(0, BC)
    row_inside = row < rows
    col_inside = (col >= 0) & (col < features)
    inside = row_inside[:, None] & col_inside[None, :]
    x += begin * stride_x_copy
    clean = product_tile(
        x, weight, None, row, row_inside, col, col_inside, inputs, stride_x_row, stride_x_input, stride_weight_col,
        stride_weight_input, 0, BR, BC, BK,
    )  # fmt: skip
    source = open_source(key, table)
    by_row, by_col = factor_source(source, ROW_FACTOR), factor_source(source, COL_FACTOR)
    scale = tl.load(sigma) * root
    half = tl.cast(draws, tl.int64)  # copies from here on have the noise negated
    feature_calls = first_feature + ((tile % col_tiles) * (BC // PER_CALL)).to(tl.uint32)
    for copy in range(begin, begin + copies_here):
        d = (tl.cast(draw, tl.int64) + copy % half).to(tl.uint32)
        added = tl.zeros([BR, BC], tl.float32)
        for first_rank in range(0, rank, RANKS):
            ranks = (first_rank + tl.arange(0, RANKS)).to(tl.uint32)
            exists = (ranks < rank)[:, None]
            projected = tl.zeros([BR, RANKS], tl.float32)
            for start in range(0, inputs + shift, BK):
                k = start - shift + tl.arange(0, BK).to(tl.int64)
                x_inside = row_inside[:, None] & ((k >= 0) & (k < inputs))[None, :]
                at = row[:, None] * stride_x_row + k[None, :] * stride_x_input
                a = tl.load(x + at, mask=x_inside, other=0).to(tl.float32)
                calls = first + tl.cast(start // PER_CALL, tl.uint32)
                b = noise_tile(raw_noise(ranks, calls, d, by_col, None, 1, 0, DIST, RANKS, BK), by_col, DIST)
                projected = tl.dot(a, tl.trans(tl.where(exists, b, 0.0)), projected, input_precision="ieee")
            raw = raw_noise(ranks, feature_calls, d, by_row, None, 1, 0, DIST, RANKS, BC)
            added = tl.dot(projected, noise_tile(raw, by_row, DIST), added, input_precision="ieee")
        value = clean + tl.where(copy < half, scale, -scale) * added
        if bias is not None:
            b_at = bias + copy * stride_bias_copy + col * stride_bias
            value += tl.load(b_at, mask=col_inside, other=0).to(tl.float32)[None, :]
        to = y + copy * rows * features + row[:, None] * features + col[None, :]
        tl.store(to, value.to(y.dtype.element_ty), mask=inside)


def perturbed_linear_launch(y: Tensor, a: PerturbedLinear) -> Launch:
    x, weight, bias, sigma, how = a
    noise = how.noise
    rows, (features, inputs) = x.shape[-2], weight.shape
    which = noise_arguments(noise, inputs)
    arguments: dict[str, Any] = {name: which[name] for name in ("key", "table", "draw", "first", "shift", "DIST")}
    bias_view = bias if bias is None or bias.dim() == 2 else bias.expand(how.copies, -1)
    arguments |= {
        "y": y,
        "x": x,
        "weight": weight,
        "bias": bias,
        "sigma": sigma,
        "rows": rows,
        "features": features,
        "inputs": inputs,
        "draws": how.draws,
        **strides("stride_x_", x if x.dim() == 3 else x.expand(how.copies, *x.shape), "copy", "row", "input"),
        **strides("stride_weight_", weight, "col", "input"),
        **strides("stride_", bias_view, "bias_copy", "bias"),
    }
    shared = x.dim() == 2
    if how.rank is not None:
        tile = tiles.LOW_RANK[noise.dist]
        features_at = noise_arguments(noise._replace(row_offset=0, col_offset=noise.row_offset), features)
        tile_count = cdiv(rows, tile.rows) * cdiv(features + features_at["shift"], tile.cols)
        arguments |= {
            "first_feature": features_at["first"],
            "feature_shift": features_at["shift"],
            "rank": how.rank,
            "root": noise_contract.low_rank_scale(how.rank),
            "copies_here": how.copies if shared else 1,
        }
        kernel, programs = low_rank_kernel, tile_count * (1 if shared else how.copies)
    else:
        tile = tiles.PERTURBED[noise.dist, x.element_size()]
        programs = cdiv(rows, tile.rows) * cdiv(features, tile.cols) * how.draws
        mask = how.mask if how.mask is None else how.mask.view(torch.uint8)
        arguments |= {
            "mask": mask,
            "row_offset": noise.row_offset,
            "width": which["width"],
            **strides("stride_mask_", mask, "col", "input"),
            "SHARED": shared,
            "ANTITHETIC": noise.antithetic,
        }
        kernel = perturbed_linear_kernel
    return tiled(kernel, programs, arguments, tile)
