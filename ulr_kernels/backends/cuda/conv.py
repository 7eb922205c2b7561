"""Arguments of the launchers of the convolutions (csrc/cuda/noisy_conv2d*.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ulr_kernels.backends import _native
from ulr_kernels.backends._native import Arguments
from ulr_kernels.backends.cuda import mlp, tiles
from ulr_kernels.backends.cuda.walsh import walsh_sums
from ulr_kernels.ops._conv import Conv, ConvGradient, Window


def window_numbers(window: Window, kernel: Sequence[int], tile_channels: int) -> tuple[int, ...]:
    """The numbers of the enum in csrc/cuda/conv.cuh. The output's size implies the other two paddings."""
    top, _, left, _ = window.padding
    groups = (window.groups, int(window.transposed))
    return (*window.stride, top, left, *window.dilation, *groups, *kernel, tile_channels)


def noisy_conv2d(y: Tensor, a: Conv) -> Arguments:
    features, tile = y.shape[2], tiles.CONV_FEATURES
    images = a.x if a.x.dim() == 5 else a.x[None]
    channels = a.window.tile_channels(a.x.shape[-3], features, tile, a.noise.col_offset % tile)
    numbers = window_numbers(a.window, a.weight.shape[2:], channels)
    return Arguments(_native.noise_view(a.noise, features), (y, images, a.weight, a.bias, a.sigma), numbers)


def noisy_conv2d_grad_(a: ConvGradient) -> Arguments:
    return _gradient((), a, (), (walsh_sums(a.noise, a.loss_weight, a.sizes.shared),))


def noisy_conv2d_recompute_(y: Tensor, a: ConvGradient) -> Arguments:
    return _gradient((y,), a, (a.weight, a.bias), ())


def _gradient(
    output: tuple[Tensor, ...],
    a: ConvGradient,
    operands: tuple[Tensor | None, ...],
    more: tuple[Tensor | None, ...],
) -> Arguments:
    """Arguments of a gradient, or, with the output and the operands of the forward, of a recompute. `more`: last."""
    x, kernel, size, sizes = a.x, a.kernel_size, a.output_size, a.sizes
    features, tile = sizes.features, tiles.GRADIENT_FEATURES
    channels = a.window.tile_channels(x.shape[-3], features, tile, a.noise.col_offset % tile)
    inner = channels * kernel[0] * kernel[1]
    # The rows are split into enough parts to occupy every processor; each part has its own sums.
    count = -(-features // tile) * -(-inner // tiles.GRADIENT_PANEL)
    units = (1 if sizes.shared else sizes.copies) * -(-sizes.rows // tiles.GRADIENT_ROWS)
    splits = max(1, min(-(-mlp.processors(x.device) // count), units))
    partials = torch.empty(splits * features * (inner + 2), dtype=torch.float32, device=x.device)
    images = x if x.dim() == 5 else x[None]
    tensors = (*output, *a.buffers, images, *operands, a.loss_weight, a.sigma, partials, *more)
    numbers = (*window_numbers(a.window, kernel, channels), splits, *size, features)
    return Arguments(_native.noise_view(a.noise, features), tensors, numbers)
