"""noisy_conv2d: an implicit product whose rows are the output's pixels; noise is added while it is in registers."""

import math
from collections.abc import Sequence
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
from ulr_kernels.ops._conv import Conv, ConvGradient, Window


@triton.jit
def pixel_of(row, window):
    """Image, row and column of output pixels."""
    pixel = (row % window[10]).to(tl.int32)
    return row // window[10], pixel // window[9], pixel % window[9]


@triton.jit
def output_rows(y, first_row, rows, window, y_strides, RUN: tl.constexpr, BR: tl.constexpr):
    """Addresses of BR output pixels, and which of them exist.

    Each `RUN` of them lie side by side in one image. This form shows that to the compiler: stores move `RUN` at once.
    """
    if RUN == BR:
        image = first_row // window[10]
        pixel = tl.multiple_of(first_row % window[10], BR) + tl.arange(0, BR)
        exists = tl.full([BR], True, tl.int1)
    else:
        row = first_row + tl.arange(0, BR)
        image = tl.max_constancy(row // window[10], RUN)
        pixel = tl.max_contiguous(tl.multiple_of(row % window[10], RUN), RUN)
        exists = tl.max_constancy(row < rows, RUN)
    return y + image * y_strides[1] + pixel * y_strides[3], exists


@triton.jit
def tap_of(k, channels, window):
    """Kernel row and column, and channel, of places of the inner axis: channel by channel of tap by tap."""
    tap = k // channels
    return tap // window[6], tap % window[6], k % channels


@triton.jit
def patch(x, pixel, ky, kx, channel, window, x_strides, TRANSPOSED: tl.constexpr):
    """Addresses of the input pixels of output pixels and kernel places, and whether they exist. All broadcast."""
    y, column = pixel[1], pixel[2]
    if TRANSPOSED:
        y = y + window[2] - ky * window[4]
        column = column + window[3] - kx * window[5]
        inside = (y >= 0) & (column >= 0) & (y % window[0] == 0) & (column % window[1] == 0)
        y = y // window[0]
        column = column // window[1]
    else:
        y = y * window[0] - window[2] + ky * window[4]
        column = column * window[1] - window[3] + kx * window[5]
        inside = (y >= 0) & (column >= 0)
    inside = inside & (y < window[7]) & (column < window[8]) & (channel < window[11])
    place = pixel[0] * x_strides[0] + y.to(tl.int64) * x_strides[2] + column.to(tl.int64) * x_strides[3]
    return x + place + channel.to(tl.int64) * x_strides[1], inside


@triton.jit
def meeting(weight, col, ky, kx, channel, window, weight_strides, TRANSPOSED: tl.constexpr):
    """Addresses of the weights of output channels at kernel places, and whether the two are of one group."""
    group = col // window[13]
    inside = (channel < window[11]) & (channel // window[12] == group)
    if TRANSPOSED:
        col = col - group * window[13]
    else:
        channel = channel - group * window[12]
    place = col.to(tl.int64) * weight_strides[0] + channel.to(tl.int64) * weight_strides[1]
    return weight + place + ky.to(tl.int64) * weight_strides[2] + kx.to(tl.int64) * weight_strides[3], inside


@triton.jit
def first_channel_of(first_col, window):
    """The first input channel of a tile of output channels."""
    return (tl.maximum(first_col, 0) // window[13] * window[12]).to(tl.int32)


@triton.jit
def conv_tile(
    x, weight, bias, row, row_inside, col, col_inside, first_channel, steps, channels, window, x_strides,
    weight_strides, stride_bias, TRANSPOSED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The clean convolution of a tile, fp32 [BR, BC]; each step takes BK channels of a tap. None: no steps."""
    image, y, column = pixel_of(row, window)
    pixel = (image[:, None], y[:, None], column[:, None])
    total = tl.zeros([BR, BC], tl.float32)
    steps_of_tap = tl.cdiv(channels, BK)
    for step in range(0, steps):
        tap = step // steps_of_tap
        ky, kx = tap // window[6], tap % window[6]
        c = step % steps_of_tap * BK + tl.arange(0, BK)
        c_inside = c < channels
        x_tile, seen = patch(x, pixel, ky, kx, (first_channel + c)[None, :], window, x_strides, TRANSPOSED)
        weight_tile, met = meeting(
            weight, col[None, :], ky, kx, (first_channel + c)[:, None], window, weight_strides, TRANSPOSED
        )
        a = tl.load(x_tile, mask=seen & row_inside[:, None] & c_inside[None, :], other=0)
        b = tl.load(weight_tile, mask=met & col_inside[None, :] & c_inside[:, None], other=0)
        total = tl.dot(a, b, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + col * stride_bias, mask=col_inside, other=0).to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=["rows", "draws", "draws_here", "draw", "row_offset", "first", "width"])
def noisy_conv2d_kernel(
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
    draws,
    draws_here,
    steps,
    channels,
    window,
    draw: tl.uint32,
    row_offset: tl.uint32,
    first: tl.uint32,
    shift,
    positions,
    width: tl.int64,
    y_strides,
    stride_x_copy,
    x_strides,
    weight_strides,
    stride_bias,
    stride_sigma,
    SHARED: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    RUN: tl.constexpr,
    DIST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """A program makes a tile, for `draws_here` draws. Copies that share x share one product."""
    PER_CALL: tl.constexpr = 128 if DIST >= RADEMACHER else 4
    col_tiles = tl.cdiv(features + shift, BC)
    tile_count = col_tiles * tl.cdiv(rows, BR)
    tile = tl.program_id(0) % tile_count
    begin = tl.program_id(0) // tile_count * draws_here
    col_tile = tile % col_tiles
    first_row = (tile // col_tiles).to(tl.int64) * BR
    row = first_row + tl.arange(0, BR)
    col = col_tile * BC - shift + tl.arange(0, BC)
    row_inside = row < rows
    col_inside = (col >= 0) & (col < features)
    first_channel = first_channel_of(col_tile * BC - shift, window)

    if not SHARED:
        x += begin.to(tl.int64) * stride_x_copy
    clean = conv_tile(
        x, weight, bias, row, row_inside, col, col_inside, first_channel, steps, channels, window, x_strides,
        weight_strides, stride_bias, TRANSPOSED, BR, BC, BK,
    )  # fmt: skip
    mirror = clean  # the product that the negated noise is added to
    if ANTITHETIC and not SHARED:
        mirror = conv_tile(
            x + tl.cast(draws, tl.int64) * stride_x_copy, weight, bias, row, row_inside, col, col_inside,
            first_channel, steps, channels, window, x_strides, weight_strides, stride_bias, TRANSPOSED, BR, BC, BK,
        )  # fmt: skip

    source = open_source(key, table)
    scale = tl.load(sigma + col * stride_sigma, mask=col_inside, other=0)[None, :]
    y_row, exists = output_rows(y, first_row, rows, window, y_strides, RUN, BR)
    y_tile = y_row[:, None] + col.to(tl.int64)[None, :] * y_strides[2]
    inside = exists[:, None] & col_inside[None, :]
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
        copy = tl.cast(d, tl.int64) * y_strides[0]
        tl.store(y_tile + copy, tl.fma(scale, eps, clean).to(y.dtype.element_ty), mask=inside)
        if ANTITHETIC:
            copy += tl.cast(draws, tl.int64) * y_strides[0]
            tl.store(y_tile + copy, tl.fma(-scale, eps, mirror).to(y.dtype.element_ty), mask=inside)


def noisy_conv2d_launch(y: Tensor, a: Conv) -> Launch:
    features, rows = y.shape[2], y.shape[1] * y.shape[3] * y.shape[4]
    draws, kernel = a.noise.draws(a.copies), a.weight.shape[2:]
    shared = a.x.dim() == 4
    tile = tiles.CONV[a.noise.dist, a.x.element_size()]
    which = noise_arguments(a.noise, features)
    tile_count = cdiv(rows, tile.rows) * cdiv(features + which["shift"], tile.cols)
    draws_here = tiles.draws_per_program(draws, tile_count) if shared else 1
    channels = a.window.tile_channels(a.x.shape[-3], features, tile.cols, which["shift"])
    return tiled(
        noisy_conv2d_kernel,
        tile_count * cdiv(draws, draws_here),
        {
            "y": y,
            **conv_arguments(a, kernel, features, channels),
            **which,
            "rows": rows,
            "features": features,
            "draws": draws,
            "draws_here": draws_here,
            "steps": kernel[0] * kernel[1] * cdiv(channels, tile.inputs),
            "y_strides": pixel_strides(y),
            "SHARED": shared,
            "ANTITHETIC": a.noise.antithetic,
            "RUN": math.gcd(y.shape[3] * y.shape[4], tile.rows),
        },
        tile,
    )


def pixel_strides(y: Tensor) -> tuple[int, int, int, int]:
    """The strides of copies, images, channels and pixels, which follow one another."""
    copy, image, channel, _, pixel = y.stride()
    return copy, image, channel, pixel


def weight_strides(weight: Tensor | None, window: Window) -> tuple[int, int, int, int]:
    """The strides of output channels, input channels, kernel rows and columns."""
    if weight is None:
        return 0, 0, 0, 0
    first, second, row, column = weight.stride()
    return (second, first, row, column) if window.transposed else (first, second, row, column)


def image_arguments(x: Tensor, window: Window, kernel: Sequence[int], features: int) -> dict[str, Any]:
    """The images, their strides, and the window: stride, padding at the top and left, dilation, the kernel's width, the
    image's height and width, the output's width and pixels, input channels, and input and output channels of a group.
    """
    top, _, left, _ = window.padding
    height, width = window.output_size(x.shape[-2:], kernel)
    copy, image, channel, row, column = (x if x.dim() == 5 else x.unsqueeze(0)).stride()
    inputs = x.shape[-3]
    return {
        "x": x,
        "window": (
            *(*window.stride, top, left, *window.dilation, kernel[1], *x.shape[-2:]),
            *(width, height * width, inputs, inputs // window.groups, features // window.groups),
        ),
        "stride_x_copy": copy,
        "x_strides": (image, channel, row, column),
    }


def conv_arguments(a: Conv | ConvGradient, kernel: Sequence[int], features: int, channels: int) -> dict[str, Any]:
    """The operands of a convolution with noise, their strides and the window."""
    return {
        **image_arguments(a.x, a.window, kernel, features),
        "weight": a.weight,
        "bias": a.bias,
        "sigma": a.sigma,
        "channels": channels,
        "weight_strides": weight_strides(a.weight, a.window),
        **strides("stride_", a.bias, "bias"),
        **strides("stride_", a.sigma, "sigma"),
        "TRANSPOSED": a.window.transposed,
    }
