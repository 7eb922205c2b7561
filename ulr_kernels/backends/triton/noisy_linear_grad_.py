# mypy: disable-error-code="assignment"
"""noisy_linear_grad_ and noisy_linear_recompute_: the score, reduced over copies, times x."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulr_kernels.backends.arrival_counter import arrival_counter
from ulr_kernels.backends.triton import tiles
from ulr_kernels.backends.triton.gradient import add_rows, add_scalar, gradient_arguments
from ulr_kernels.backends.triton.launch import Launch, cdiv, noise_arguments, strides, tiled
from ulr_kernels.backends.triton.noise_contract import RADEMACHER, open_source
from ulr_kernels.backends.triton.noisy_linear import linear_arguments, product_tile
from ulr_kernels.backends.triton.scores import add
from ulr_kernels.ops._linear import LinearGradient


@triton.jit
def gradient_tile(
    tile,
    y, grad_weight, grad_bias, grad_log_sigma, partials, arrival_counter, x, weight, bias, loss_weight, sigma, key,
    table, directions, rows, features, inputs, draws, draw, row_offset, first, shift, positions, width, stride_grad_col,
    stride_grad_input, stride_grad_bias, stride_log_sigma, stride_x_copy, stride_x_row, stride_x_input,
    stride_weight_col, stride_weight_input, stride_bias, stride_loss_copy, stride_loss_sample, stride_sigma,
    SHARED: tl.constexpr, ANTITHETIC: tl.constexpr, DIST: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Adds a tile [BC features, BK inputs] of the gradient to the buffers: all rows, alone and in order.

    With `y` (recompute) each tile of the forward goes to a program that makes its noise anyway: of the programs
    that share features, number i mod their count takes the tile of rows i.
    """
    PER_CALL: tl.constexpr = 128 if DIST >= RADEMACHER else 4
    input_tiles = tl.cdiv(inputs, BK) if grad_weight is not None else 1
    input_tiles = tl.maximum(input_tiles, 1)
    col_tiles = tl.cdiv(features + shift, BC)
    col_tile = tile // input_tiles
    input_tile = tile % input_tiles
    col = col_tile.to(tl.int64) * BC - shift + tl.arange(0, BC)
    col_inside = (col >= 0) & (col < features)
    k = input_tile.to(tl.int64) * BK + tl.arange(0, BK)
    k_inside = k < inputs
    calls = tl.cast(first, tl.uint32) + (col_tile * (BC // PER_CALL)).to(tl.uint32)
    source = open_source(key, table)
    scale = tl.load(sigma + col * stride_sigma, mask=col_inside, other=1)
    copy_size = tl.cast(rows, tl.int64) * features

    total = tl.zeros([BC, BK], tl.float32)
    by_bias = tl.zeros([BC], tl.float32)
    by_log_sigma = tl.zeros([BC], tl.float32)
    for row_tile in range(0, tl.cdiv(rows, BR)):
        row = tl.cast(row_tile, tl.int64) * BR + tl.arange(0, BR)
        row_inside = row < rows
        x_tile = x + row[:, None] * stride_x_row + k[None, :] * stride_x_input
        x_inside = row_inside[:, None] & k_inside[None, :]
        losses = loss_weight + row // positions * stride_loss_sample
        y_tile, inside, depth = None, None, 0
        if y is not None:
            mine = row_tile % input_tiles == input_tile
            inside = (row < tl.where(mine, rows, 0))[:, None] & col_inside[None, :]
            y_tile = y + row[:, None] * features + col[None, :]
            depth = tl.where(mine, inputs, 0)
        rows_of_noise = tl.cast(row_offset, tl.uint32) + row.to(tl.uint32)
        total, by_bias, by_log_sigma = add_rows(
            total, by_bias, by_log_sigma, input_tile == 0, product_tile, x,
            (  # here and not in a variable, which would hold no constexpr
                weight, bias, row, row_inside, col, col_inside, depth, stride_x_row, stride_x_input, stride_weight_col,
                stride_weight_input, stride_bias, BR, BC, BK,
            ),
            y_tile, copy_size, inside, x_tile, x_inside, stride_x_copy, losses, stride_loss_copy, row_inside, source,
            rows_of_noise, calls, directions, positions, width, draw, draws, scale, grad_weight, grad_log_sigma, SHARED,
            ANTITHETIC, DIST, BR, BC,
        )  # fmt: skip

    if grad_weight is not None:
        grad_tile = grad_weight + col[:, None] * stride_grad_col + k[None, :] * stride_grad_input
        add(grad_tile, total / scale[:, None], col_inside[:, None] & k_inside[None, :])
    if input_tile == 0:
        if grad_bias is not None:
            add(grad_bias + col * stride_grad_bias, by_bias / scale, col_inside)
        if grad_log_sigma is not None:
            if partials is None:
                add(grad_log_sigma + col * stride_log_sigma, by_log_sigma, col_inside)
            else:
                value = tl.sum(tl.where(col_inside, by_log_sigma, 0), 0)
                add_scalar(grad_log_sigma, partials, arrival_counter, value, col_tile, col_tiles)


@triton.jit(do_not_specialize=["rows", "draws", "draw", "row_offset", "first", "width"])
def gradient_kernel(
    y,
    grad_weight,
    grad_bias,
    grad_log_sigma,
    partials,
    arrival_counter,
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
    inputs,
    draws,
    draw: tl.uint32,
    row_offset: tl.uint32,
    first: tl.uint32,
    shift,
    positions,
    width: tl.int64,
    stride_grad_col,
    stride_grad_input,
    stride_grad_bias,
    stride_log_sigma,
    stride_x_copy,
    stride_x_row,
    stride_x_input,
    stride_weight_col,
    stride_weight_input,
    stride_bias,
    stride_loss_copy,
    stride_loss_sample,
    stride_sigma,
    SHARED: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    DIST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    gradient_tile(
        tl.program_id(0),
        y, grad_weight, grad_bias, grad_log_sigma, partials, arrival_counter, x, weight, bias, loss_weight, sigma, key,
        table, directions, rows, features, inputs, draws, draw, row_offset, first, shift, positions, width,
        stride_grad_col, stride_grad_input, stride_grad_bias, stride_log_sigma, stride_x_copy, stride_x_row,
        stride_x_input, stride_weight_col, stride_weight_input, stride_bias, stride_loss_copy, stride_loss_sample,
        stride_sigma, SHARED, ANTITHETIC, DIST, BR, BC, BK,
    )  # fmt: skip


def noisy_linear_grad_(a: LinearGradient) -> None:
    launch = gradient_launch(None, a)
    if launch.grid and a.x.shape[-2]:
        launch.run()


def noisy_linear_recompute_(y: Tensor, a: LinearGradient) -> None:
    if y.numel():
        gradient_launch(y, a).run()


def gradient_launch(y: Tensor | None, a: LinearGradient) -> Launch:
    """The launch of both ops: recompute is the gradient with `y`, a weight and perhaps a bias."""
    _, rows, inputs, features, shared = a.sizes
    tile = (tiles.GRADIENT if shared and y is None else tiles.GRADIENT_PER_DRAW)[a.noise.dist, a.x.element_size()]
    which = noise_arguments(a.noise, features)
    col_tiles = cdiv(features + which["shift"], tile.cols) if features else 0
    input_tiles = max(cdiv(inputs, tile.inputs), 1) if a.grad_weight is not None else 1
    return tiled(
        gradient_kernel,
        col_tiles * input_tiles,
        {
            **gradient_arguments(y, a, shared),
            **_scalar_workspace(a.grad_log_sigma, col_tiles),
            **linear_arguments(a),
            **which,
            "rows": rows,
            "features": features,
            **strides("stride_grad_", a.grad_weight, "col", "input"),
        },
        tile,
    )


def _scalar_workspace(grad_log_sigma: Tensor | None, tile_count: int) -> dict[str, Tensor | None]:
    """The workspace of `add_scalar`, where one number stands for all features; else None."""
    if grad_log_sigma is None or grad_log_sigma.dim():
        return {"partials": None, "arrival_counter": None}
    device = grad_log_sigma.device
    partials = torch.empty(max(tile_count, 1), dtype=torch.float32, device=device)
    return {"partials": partials, "arrival_counter": arrival_counter(device)}
