# mypy: disable-error-code="assignment"
"""noisy_conv2d_grad_ and noisy_conv2d_recompute_: the score, reduced over copies, times the patches of x.

A convolution has many rows and few weights: programs share the rows of a tile, and the last one to arrive adds up the
partial sums of all, in their order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulr_kernels.backends.arrival_counter import arrival_counter
from ulr_kernels.backends.triton import tiles
from ulr_kernels.backends.triton.gradient import add_rows, add_scalar, gradient_arguments
from ulr_kernels.backends.triton.launch import Launch, cdiv, noise_arguments, tiled
from ulr_kernels.backends.triton.noise_contract import RADEMACHER, open_source
from ulr_kernels.backends.triton.noisy_conv2d import (
    conv_arguments,
    conv_tile,
    first_channel_of,
    meeting,
    output_rows,
    patch,
    pixel_of,
    pixel_strides,
    tap_of,
    weight_strides,
)
from ulr_kernels.backends.triton.scores import add
from ulr_kernels.ops._conv import ConvGradient


@triton.jit(do_not_specialize=["rows", "draws", "draw", "row_offset", "first", "width"])
def conv_gradient_kernel(
    y,
    grad_weight,
    grad_bias,
    grad_log_sigma,
    partials,
    arrival_counters,
    x,
    weight,
    bias,
    loss_weight,
    sigma,
    key,
    table,
    directions,
    rows,
    features,
    inner,
    splits,
    draws,
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
    grad_strides,
    stride_grad_bias,
    stride_log_sigma,
    stride_x_copy,
    x_strides,
    weight_strides,
    stride_bias,
    stride_loss_copy,
    stride_loss_sample,
    stride_sigma,
    SCALAR: tl.constexpr,
    SHARED: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    RUN: tl.constexpr,
    DIST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """A program owns a part of the rows for a tile [BC output channels, BK places of the inner axis] of the gradient.

    With `y` (recompute) each tile of the forward goes to a program that makes its noise anyway: of the programs
    that share channels and rows, number i mod their count takes the tile of rows i.
    """
    PER_CALL: tl.constexpr = 128 if DIST >= RADEMACHER else 4
    PART: tl.constexpr = BC * BK + 2 * BC  # of partials: a tile's weights, biases, ln sigmas
    input_tiles = tl.cdiv(inner, BK) if grad_weight is not None else 1
    col_tiles = tl.cdiv(features + shift, BC)
    tile_count = input_tiles * col_tiles
    tile = tl.program_id(0) % tile_count
    split = tl.program_id(0) // tile_count
    col_tile = tile // input_tiles
    input_tile = tile % input_tiles
    col = col_tile * BC - shift + tl.arange(0, BC)
    col_inside = (col >= 0) & (col < features)
    first_channel = first_channel_of(col_tile * BC - shift, window)
    k = input_tile * BK + tl.arange(0, BK)
    ky, kx, channel = tap_of(k, channels, window)
    channel += first_channel
    k_inside = k < inner
    calls = tl.cast(first, tl.uint32) + (col_tile * (BC // PER_CALL)).to(tl.uint32)
    source = open_source(key, table)
    scale = tl.load(sigma + col * stride_sigma, mask=col_inside, other=1)

    total = tl.zeros([BC, BK], tl.float32)
    by_bias = tl.zeros([BC], tl.float32)
    by_log_sigma = tl.zeros([BC], tl.float32)
    row_tiles = tl.cdiv(rows, BR)
    for row_tile in range(row_tiles * split // splits, row_tiles * (split + 1) // splits):
        first_row = tl.cast(row_tile, tl.int64) * BR
        row = first_row + tl.arange(0, BR)
        row_inside = row < rows
        image, line, column = pixel_of(row, window)
        x_tile, x_inside = patch(
            x, (image[:, None], line[:, None], column[:, None]), ky[None, :], kx[None, :], channel[None, :], window,
            x_strides, TRANSPOSED,
        )  # fmt: skip
        x_inside = x_inside & row_inside[:, None] & k_inside[None, :]
        losses = loss_weight + row // positions * stride_loss_sample
        y_tile, inside, depth = None, None, 0
        if y is not None:
            mine = row_tile % input_tiles == input_tile
            y_row, exists = output_rows(y, first_row, rows, window, y_strides, RUN, BR)
            y_tile = y_row[:, None] + col.to(tl.int64)[None, :] * y_strides[2]
            inside = exists[:, None] & ((col >= 0) & (col < tl.where(mine, features, 0)))[None, :]
            depth = tl.where(mine, steps, 0)
        rows_of_noise = tl.cast(row_offset, tl.uint32) + row.to(tl.uint32)
        total, by_bias, by_log_sigma = add_rows(
            total, by_bias, by_log_sigma, input_tile == 0, conv_tile, x,
            (  # here and not in a variable, which would hold no constexpr
                weight, bias, row, row_inside, col, col_inside, first_channel, depth, channels, window, x_strides,
                weight_strides, stride_bias, TRANSPOSED, BR, BC, BK,
            ),
            y_tile, y_strides[0], inside, x_tile, x_inside, stride_x_copy, losses, stride_loss_copy, row_inside, source,
            rows_of_noise, calls, directions, positions, width, draw, draws, scale, grad_weight, grad_log_sigma, SHARED,
            ANTITHETIC, DIST, BR, BC,
        )  # fmt: skip

    tile_part = tl.arange(0, BC)[:, None] * BK + tl.arange(0, BK)[None, :]
    col_part = BC * BK + tl.arange(0, BC)
    own = partials + (split * tile_count + tile).to(tl.int64) * PART
    tl.store(own + tile_part, total)
    tl.store(own + col_part, by_bias)
    tl.store(own + BC + col_part, by_log_sigma)
    tl.debug_barrier()
    if tl.atomic_add(arrival_counters + tile, 1, sem="acq_rel") == splits - 1:
        total = tl.zeros([BC, BK], tl.float32)
        by_bias = tl.zeros([BC], tl.float32)
        by_log_sigma = tl.zeros([BC], tl.float32)
        for i in range(splits):
            part = partials + (i * tile_count + tile).to(tl.int64) * PART
            total += tl.load(part + tile_part, cache_modifier=".cg")
            by_bias += tl.load(part + col_part, cache_modifier=".cg")
            by_log_sigma += tl.load(part + BC + col_part, cache_modifier=".cg")
        tl.store(arrival_counters + tile, 0)
        if grad_weight is not None:
            grad_tile, met = meeting(
                grad_weight, col[:, None], ky[None, :], kx[None, :], channel[None, :], window, grad_strides, TRANSPOSED
            )
            add(grad_tile, total / scale[:, None], met & col_inside[:, None] & k_inside[None, :])
        if input_tile == 0:
            if grad_bias is not None:
                add(grad_bias + col * stride_grad_bias, by_bias / scale, col_inside)
            if grad_log_sigma is not None:
                if SCALAR:
                    value = tl.sum(tl.where(col_inside, by_log_sigma, 0), 0)
                    scalars = partials + (splits * tile_count).to(tl.int64) * PART
                    add_scalar(grad_log_sigma, scalars, arrival_counters + tile_count, value, col_tile, col_tiles)
                else:
                    add(grad_log_sigma + col * stride_log_sigma, by_log_sigma, col_inside)


def noisy_conv2d_grad_(a: ConvGradient) -> None:
    if a.x.shape[-4]:
        conv_gradient_launch(None, a).run()


def noisy_conv2d_recompute_(y: Tensor, a: ConvGradient) -> None:
    if y.numel():
        conv_gradient_launch(y, a).run()


def conv_gradient_launch(y: Tensor | None, a: ConvGradient) -> Launch:
    """The launch of both ops: recompute is the gradient with `y`, a weight and perhaps a bias."""
    _, rows, _, features, shared = a.sizes
    kernel, (height, width) = a.kernel_size, a.output_size
    tile_table = tiles.CONV_GRADIENT if shared and y is None else tiles.CONV_GRADIENT_PER_DRAW
    tile = tile_table[a.noise.dist, a.x.element_size()]
    which = noise_arguments(a.noise, features)
    channels = a.window.tile_channels(a.x.shape[-3], features, tile.cols, which["shift"])
    inner = channels * kernel[0] * kernel[1]
    col_tiles = cdiv(features + which["shift"], tile.cols)
    tile_count = col_tiles * (cdiv(inner, tile.inputs) if a.grad_weight is not None else 1)
    splits = max(1, min(tiles.PROGRAMS // tile_count, cdiv(rows, tile.rows)))
    size = splits * tile_count * tile.cols * (tile.inputs + 2) + col_tiles
    return tiled(
        conv_gradient_kernel,
        tile_count * splits,
        {
            **gradient_arguments(y, a, shared),
            "partials": torch.empty(size, dtype=torch.float32, device=a.x.device),
            "arrival_counters": arrival_counter(a.x.device, tile_count + 1),
            **conv_arguments(a, kernel, features, channels),
            **which,
            "rows": rows,
            "features": features,
            "inner": inner,
            "splits": splits,
            "steps": kernel[0] * kernel[1] * cdiv(channels, tile.inputs),
            "y_strides": (0, 0, 0, 0) if y is None else pixel_strides(y),
            "grad_strides": weight_strides(a.grad_weight, a.window),
            "SCALAR": a.grad_log_sigma is not None and a.grad_log_sigma.dim() == 0,
            "RUN": math.gcd(height * width, tile.rows),
        },
        tile,
    )
