"""perturbed_embedding: gathered rows get their noise in registers; no other row is read."""

import triton
import triton.language as tl
from torch import Tensor

from ulr_kernels.backends.triton import tiles
from ulr_kernels.backends.triton.launch import Launch, cdiv, strides, tiled
from ulr_kernels.backends.triton.weight_noise import open_weight_noise, perturbed, weight_arguments, weight_noise
from ulr_kernels.ops.perturbed_embedding import PerturbedEmbedding


@triton.jit(do_not_specialize=["rows", "table_rows", "draws", "draw", "row_offset", "col_offset", "width"])
def perturbed_embedding_kernel(
    y, indices, weight, sigma, mask, key, table, rows, cols, table_rows, draws, draw: tl.uint32, row_offset: tl.uint32,
    col_offset: tl.int64, width: tl.int64, shift, rank, rank_scale, stride_index_copy, stride_index, stride_weight_row,
    stride_weight_col, stride_mask_row, stride_mask_col, PAIRS: tl.constexpr, DIST: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """A program makes a tile of one copy, or of both copies of a pair that shares its indices."""
    col_tiles = tl.cdiv(cols + shift, BC)
    tile = tl.program_id(0) % (col_tiles * tl.cdiv(rows, BR))
    copy = (tl.program_id(0) // (col_tiles * tl.cdiv(rows, BR))).to(tl.int64)
    row = (tile // col_tiles).to(tl.int64) * BR + tl.arange(0, BR)
    col = (tile % col_tiles).to(tl.int64) * BC - shift + tl.arange(0, BC)
    row_inside = row < rows
    inside = row_inside[:, None] & ((col >= 0) & (col < cols))[None, :]
    index = tl.load(indices + copy * stride_index_copy + row * stride_index, mask=row_inside, other=0)
    exists = inside & ((index >= 0) & (index < table_rows))[:, None]
    w = tl.load(weight + index[:, None] * stride_weight_row + col[None, :] * stride_weight_col, mask=exists, other=0)
    noised = exists
    if mask is not None:
        allowed = mask + index[:, None] * stride_mask_row + col[None, :] * stride_mask_col
        noised = tl.load(allowed, mask=exists, other=0) != 0
    half = tl.cast(draws, tl.int64)  # copies from here on have the noise negated
    first = tl.cast(col_offset, tl.int64) - shift + (tile % col_tiles).to(tl.int64) * BC
    eps = weight_noise(
        tl.cast(row_offset, tl.uint32) + index.to(tl.uint32), first,
        (tl.cast(draw, tl.int64) + copy % half).to(tl.uint32), width, open_weight_noise(key, table, rank), rank,
        rank_scale, DIST, BR, BC,
    )  # fmt: skip
    scale = tl.load(sigma)
    scale = tl.where(copy < half, scale, -scale)
    nowhere = tl.full([BR, BC], float("nan"), tl.float32).to(w.dtype)
    to = y + (copy * rows + row)[:, None] * cols + col[None, :]
    tl.store(to, tl.where(exists, perturbed(w, scale, eps, noised), nowhere), mask=inside)
    if PAIRS:
        tl.store(to + half * rows * cols, tl.where(exists, perturbed(w, -scale, eps, noised), nowhere), mask=inside)


def perturbed_embedding_launch(y: Tensor, a: PerturbedEmbedding) -> Launch:
    indices, weight, sigma, how = a
    rows, cols = y.shape[1:]
    pairs = how.noise.antithetic and indices.dim() == 1
    tile = tiles.PARAMETERS[how.noise.dist]
    shift = how.noise.col_offset % tile.cols  # tiles start at multiples of their width in the whole noise
    programs = cdiv(rows, tile.rows) * cdiv(cols + shift, tile.cols) * (how.draws if pairs else how.copies)
    return tiled(
        perturbed_embedding_kernel,
        programs,
        {
            **weight_arguments(how.placed(weight)),
            "y": y,
            "indices": indices,
            "weight": weight,
            "sigma": sigma,
            "rows": rows,
            "cols": cols,
            "table_rows": weight.shape[0],
            "shift": shift,
            **strides("stride_index_", indices.expand(how.copies, -1), "copy"),
            "stride_index": indices.stride(-1),
            **strides("stride_weight_", weight, "row", "col"),
            **strides("stride_mask_", how.mask, "row", "col"),
            "PAIRS": pairs,
        },
        tile,
    )
