"""Arguments of the launchers of the convolutions (csrc/cuda/noisy_conv2d*.cu)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ulr_kernels.backends import _native
from ulr_kernels.backends._native import Arguments
from ulr_kernels.backends.cuda import mlp
from ulr_kernels.ops._conv import Conv, ConvGradient, Window

# Of csrc/cuda: Convolution::kFeatures in conv.cuh; kGradFeatures, kPanel and kGradRows in gradient_problem.cuh.
FEATURES_OF_FORWARD_TILE, FEATURES_OF_GRADIENT_TILE, PANEL, ROWS_OF_UNIT = 64, 32, 512, 128


def window_numbers(window: Window, kernel: Sequence[int], tile_channels: int) -> tuple[int, ...]:
    """In the order of the enum in csrc/cuda/conv.cuh. An output's size says what lies at the bottom and the right."""
    top, _, left, _ = window.padding
    groups = (window.groups, int(window.transposed))
    return (*window.stride, top, left, *window.dilation, *groups, *kernel, tile_channels)


def _tile_channels(window: Window, inputs: int, features: int, tile: int, col_offset: int) -> int:
    """The most input channels that a tile of features meets: those of all groups that it touches."""
    features_of_group, most = features // window.groups, 1
    for first in range(-(col_offset % tile), features, tile):
        last = min(first + tile, features) - 1
        most = max(most, last // features_of_group - max(first, 0) // features_of_group + 1)
    return most * (inputs // window.groups)


def noisy_conv2d(y: Tensor, a: Conv) -> Arguments:
    features = y.shape[2]
    images = a.x if a.x.dim() == 5 else a.x[None]
    channels = _tile_channels(a.window, a.x.shape[-3], features, FEATURES_OF_FORWARD_TILE, a.noise.col_offset)
    numbers = window_numbers(a.window, a.weight.shape[2:], channels)
    return Arguments(_native.noise_view(a.noise, features), (y, images, a.weight, a.bias, a.sigma), numbers)


class _Gradient(NamedTuple):
    """The arguments that gradient and recompute share."""

    noise: tuple
    images: Tensor
    partials: Tensor
    numbers: tuple[int, ...]


def _gradient(a: ConvGradient) -> _Gradient:
    x, kernel, size, sizes = a.x, a.kernel_size, a.output_size, a.sizes
    features = sizes.features
    channels = _tile_channels(a.window, x.shape[-3], features, FEATURES_OF_GRADIENT_TILE, a.noise.col_offset)
    inner = channels * kernel[0] * kernel[1]
    # As many parts of the rows as give every processor work; the sums of each are kept.
    tiles = -(-features // FEATURES_OF_GRADIENT_TILE) * -(-inner // PANEL)
    units = (1 if sizes.shared else sizes.copies) * -(-sizes.rows // ROWS_OF_UNIT)
    splits = max(1, min(-(-mlp.processors(x.device) // tiles), units))
    partials = torch.empty(splits * features * (inner + 2), dtype=torch.float32, device=x.device)
    numbers = (*window_numbers(a.window, kernel, channels), splits, *size, features)
    return _Gradient(_native.noise_view(a.noise, features), x if x.dim() == 5 else x[None], partials, numbers)


def noisy_conv2d_grad_(a: ConvGradient) -> Arguments:
    made = _gradient(a)
    tensors = (*a.buffers, made.images, a.loss_weight, a.sigma, made.partials)
    return Arguments(made.noise, tensors, made.numbers)


def noisy_conv2d_recompute_(y: Tensor, a: ConvGradient) -> Arguments:
    made = _gradient(a)
    tensors = (y, *a.buffers, made.images, a.weight, a.bias, a.loss_weight, a.sigma, made.partials)
    return Arguments(made.noise, tensors, made.numbers)
