"""What the launchers of the convolutions (csrc/cuda/noisy_conv2d*.cu) are handed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ulr_kernels.backends import _native
from ulr_kernels.backends._native import Arguments
from ulr_kernels.backends.cuda import mlp
from ulr_kernels.ops._conv import Window, weight_shape

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


def noisy_conv2d(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    key: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
    copies: int,
    antithetic: bool,
    dist: str,
    sampler: str,
    positions: int,
    *at: int,
) -> Arguments:
    window = Window.of(stride, padding, dilation, groups, transposed)
    spec = _native.noise_spec(key, dist, sampler, positions, *at, width=at[-1] + y.shape[2], antithetic=antithetic)
    images = x if x.dim() == 5 else x[None]
    channels = _tile_channels(window, x.shape[-3], y.shape[2], FEATURES_OF_FORWARD_TILE, at[-1])
    return Arguments(spec, (y, images, weight, bias, sigma), window_numbers(window, weight.shape[2:], channels))


def noisy_conv2d_grad_(
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_log_sigma: Tensor | None,
    x: Tensor,
    loss_weight: Tensor,
    sigma: Tensor,
    key: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
    antithetic: bool,
    dist: str,
    sampler: str,
    positions: int,
    *at: int,
) -> Arguments:
    window = Window.of(stride, padding, dilation, groups, transposed)
    features = window.channels(weight_shape(grad_weight, grad_bias, x, kernel, window))[1]
    size = window.output_size(x.shape[-2:], kernel)
    spec = _native.noise_spec(key, dist, sampler, positions, *at, width=at[-1] + features, antithetic=antithetic)
    images = x if x.dim() == 5 else x[None]
    channels = _tile_channels(window, x.shape[-3], features, FEATURES_OF_GRADIENT_TILE, at[-1])
    inner = channels * kernel[0] * kernel[1]
    # As many parts of the rows as give every processor work; the sums of each are kept.
    tiles = -(-features // FEATURES_OF_GRADIENT_TILE) * -(-inner // PANEL)
    units = (1 if x.dim() == 4 else loss_weight.shape[0]) * -(-x.shape[-4] * size[0] * size[1] // ROWS_OF_UNIT)
    splits = max(1, min(-(-mlp.processors(x.device) // tiles), units))
    partials = torch.empty(splits * features * (inner + 2), dtype=torch.float32, device=x.device)
    tensors = (grad_weight, grad_bias, grad_log_sigma, images, loss_weight, sigma, partials)
    return Arguments(spec, tensors, (*window_numbers(window, kernel, channels), splits, *size, features))


def noisy_conv2d_replay_(
    y: Tensor,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_log_sigma: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss_weight: Tensor,
    sigma: Tensor,
    key: Tensor,
    *rest,
) -> Arguments:
    buffers = (grad_weight, grad_bias, grad_log_sigma)
    gradient = noisy_conv2d_grad_(*buffers, x, loss_weight, sigma, key, list(weight.shape[2:]), *rest)
    *_, images, _, _, partials = gradient.tensors
    tensors = (y, *buffers, images, weight, bias, loss_weight, sigma, partials)
    return Arguments(gradient.noise, tensors, gradient.numbers)
