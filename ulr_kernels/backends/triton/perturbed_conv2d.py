"""perturbed_conv2d: an implicit product whose inner axis follows the weight's memory, and so its noise."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ulr_kernels.backends.triton import tiles
from ulr_kernels.backends.triton.launch import Launch, cdiv, strides, tiled
from ulr_kernels.backends.triton.noisy_conv2d import image_arguments, pixel_of, pixel_strides
from ulr_kernels.backends.triton.weight_noise import open_weight_noise, perturbed, weight_arguments, weight_noise
from ulr_kernels.ops.perturbed_conv2d import PerturbedConv


@triton.jit(do_not_specialize=["rows", "draws", "draw", "row_offset", "col_offset", "width"])
def perturbed_conv2d_kernel(
    y, x, weight, bias, sigma, mask, key, table, rows, inner, draws, draw: tl.uint32, row_offset: tl.uint32,
    col_offset: tl.int64, width: tl.int64, shift, rank, rank_scale, window, y_strides, stride_x_copy, x_strides,
    weight_strides, mask_strides, stride_bias_copy, stride_bias, SHARED: tl.constexpr, ANTITHETIC: tl.constexpr,
    DIST: tl.constexpr, TAPS: tl.constexpr, WIDTH: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A program makes a tile of output pixels x channels of one group, for one copy or for both of an antithetic pair.

    It makes a pair's noise once.
    """
    tiles_of_group = tl.cdiv(window[13], BC)
    col_tiles = tiles_of_group * (window[11] // window[12])
    tile = tl.program_id(0) % (col_tiles * tl.cdiv(rows, BR))
    copy = (tl.program_id(0) // (col_tiles * tl.cdiv(rows, BR))).to(tl.int64)
    group = tile % col_tiles // tiles_of_group
    within = tile % tiles_of_group * BC + tl.arange(0, BC)
    col_inside = within < window[13]
    col = group * window[13] + within
    row = (tile // col_tiles).to(tl.int64) * BR + tl.arange(0, BR)
    row_inside = row < rows
    image, line, column = pixel_of(row, window)
    # An address is the sum of the start of an output pixel's window and of the offset of a place of the inner axis.
    top, left = line * window[0] - window[2], column * window[1] - window[3]
    corner = image * x_strides[0] + top.to(tl.int64) * x_strides[2] + left.to(tl.int64) * x_strides[3]
    x += group.to(tl.int64) * window[12] * x_strides[1]
    sources = open_weight_noise(key, table, rank)
    scale = tl.load(sigma)
    second = tl.cast(draws, tl.int64)
    if not SHARED:
        x += copy * stride_x_copy
    weight += (col.to(tl.int64) * weight_strides[0])[:, None]
    rows_of_noise = tl.cast(row_offset, tl.uint32) + col.to(tl.uint32)
    d = (tl.cast(draw, tl.int64) + copy).to(tl.uint32)
    first = tl.cast(col_offset, tl.int64) - shift
    total = tl.zeros([BR, BC], tl.float32)
    mirror = total
    for start in range(0, inner + shift, BK):
        k = start - shift + tl.arange(0, BK)
        k_inside = (k >= 0) & (k < inner)
        inside = col_inside[:, None] & k_inside[None, :]
        k = tl.maximum(k, 0)
        channel, ky, kx = k // TAPS, k % TAPS // WIDTH, k % TAPS % WIDTH
        at = channel * weight_strides[1] + ky * weight_strides[2] + kx * weight_strides[3]
        w = tl.load(weight + at[None, :], mask=inside, other=0)
        noised = inside
        if mask is not None:
            at = channel * mask_strides[1] + ky * mask_strides[2] + kx * mask_strides[3]
            allowed = mask + (col.to(tl.int64) * mask_strides[0])[:, None] + at[None, :]
            noised = inside & (tl.load(allowed, mask=inside, other=0) != 0)
        eps = weight_noise(rows_of_noise, first + start, d, width, sources, rank, rank_scale, DIST, BC, BK)
        down, right = ky * window[4], kx * window[5]
        y_inside = (top[:, None] + down[None, :]).to(tl.uint32) < tl.cast(window[7], tl.uint32)
        x_inside = (left[:, None] + right[None, :]).to(tl.uint32) < tl.cast(window[8], tl.uint32)
        seen = y_inside & x_inside & row_inside[:, None] & k_inside[None, :]
        at = channel.to(tl.int64) * x_strides[1] + down.to(tl.int64) * x_strides[2] + right * x_strides[3]
        x_tile = x + corner[:, None] + at[None, :]
        a = tl.load(x_tile, mask=seen, other=0)
        total = tl.dot(a, tl.trans(perturbed(w, scale, eps, noised)), total, input_precision="ieee")
        if ANTITHETIC:
            if not SHARED:
                a = tl.load(x_tile + second * stride_x_copy, mask=seen, other=0)
            mirror = tl.dot(a, tl.trans(perturbed(w, -scale, eps, noised)), mirror, input_precision="ieee")
    if bias is not None:
        b = bias + copy * stride_bias_copy + col * stride_bias
        total += tl.load(b, mask=col_inside, other=0).to(tl.float32)[None, :]
        if ANTITHETIC:
            b += second * stride_bias_copy
            mirror += tl.load(b, mask=col_inside, other=0).to(tl.float32)[None, :]
    inside = row_inside[:, None] & col_inside[None, :]
    place = image * y_strides[1] + (line * window[9] + column).to(tl.int64) * y_strides[3]
    to = y + copy * y_strides[0] + place[:, None] + (col.to(tl.int64) * y_strides[2])[None, :]
    tl.store(to, total.to(y.dtype.element_ty), mask=inside)
    if ANTITHETIC:
        tl.store(to + second * y_strides[0], mirror.to(y.dtype.element_ty), mask=inside)


def perturbed_conv2d_launch(y: Tensor, a: PerturbedConv) -> Launch:
    x, weight, bias, sigma, window, how = a
    rows, of_group = y.shape[1] * y.shape[3] * y.shape[4], len(weight) // window.groups
    taps = weight.shape[2] * weight.shape[3]
    tile = tiles.perturbed_conv(x.element_size(), of_group)
    bias_view = bias if bias is None or bias.dim() == 2 else bias.expand(how.copies, -1)
    arguments: dict[str, Any] = {
        **weight_arguments(how.placed(weight)),
        **image_arguments(x, window, weight.shape[2:], len(weight)),
        **strides("stride_", bias_view, "bias_copy", "bias"),
        "y": y,
        "weight": weight,
        "bias": bias,
        "sigma": sigma,
        "rows": rows,
        "inner": weight.shape[1] * taps,
        "shift": how.noise.col_offset % tile.inputs,  # tiles start at multiples of their width in the whole noise
        "y_strides": pixel_strides(y),
        "weight_strides": weight.stride(),
        "mask_strides": (0, 0, 0, 0) if how.mask is None else how.mask.stride(),
        "SHARED": x.dim() == 4,
        "ANTITHETIC": how.noise.antithetic,
        "TAPS": taps,  # constants, as is the kernel's width: places of the inner axis are divided by them
        "WIDTH": weight.shape[3],
    }
    programs = cdiv(rows, tile.rows) * cdiv(of_group, tile.cols) * window.groups * how.draws
    return tiled(perturbed_conv2d_kernel, programs, arguments, tile)
