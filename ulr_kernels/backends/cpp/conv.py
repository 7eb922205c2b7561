"""The three convolutions of the cpp back end: oneDNN's products, through torch, and the library's pass over the noise.

They take a chunk of images at a time. The pass is csrc/cpu/noisy_linear.cpp for channels last, and
csrc/cpu/noisy_channels.cpp for pixels last. It makes a chunk's noise once for output and gradient. The only memory
allocated beside the outputs is a chunk of clean outputs, of scores, and of inputs that torch must convert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ulr_kernels import products
from ulr_kernels.backends import _native
from ulr_kernels.backends.cpp.tiles import halves, part, row_tiles, store, sums_of
from ulr_kernels.ops._conv import Conv, ConvGradient, Window

CHUNK = 2**19  # elements of a chunk's inputs or outputs, whichever are more
_FP32 = torch.float32


def noisy_conv2d(y: Tensor, a: Conv) -> None:
    _conv(y, None, a, a.weight.shape[2:], a.copies)


def noisy_conv2d_grad_(a: ConvGradient) -> None:
    _conv(None, a, a, a.kernel_size, a.loss_weight.shape[0])


def noisy_conv2d_recompute_(y: Tensor, a: ConvGradient) -> None:
    _conv(y, a, a, a.kernel_size, a.loss_weight.shape[0])


def _conv(
    y: Tensor | None, gradient_of: ConvGradient | None, a: Conv | ConvGradient, kernel: Sequence[int], copies: int
) -> None:
    """The forward where there is y, the gradient where there is `gradient_of`."""
    grad_weight, grad_bias, grad_log_sigma = gradient_of.buffers if gradient_of else (None, None, None)
    loss_weight = gradient_of.loss_weight if gradient_of else None
    x, weight, bias, window, noise = a.x, a.weight, a.bias, a.window, a.noise
    antithetic = noise.antithetic
    if not x.shape[-4]:
        return
    draws = noise.draws(copies)
    own_x = x.dim() == 5 and copies > 1  # each copy has its own; a single copy is the shared case
    x = x if x.dim() == 5 else x[None]
    height, width = window.output_size(x.shape[-2:], kernel)
    features = _features(y, grad_weight, grad_bias, window)
    last = (x[0] if y is None else y[0]).is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    xs, ys, loss_weights = halves(x, antithetic and own_x), halves(y, antithetic), halves(loss_weight, antithetic)
    bias_sums = None if grad_bias is None else sums_of(grad_bias)
    log_sigma = None if grad_log_sigma is None else sums_of(grad_log_sigma)
    weight_sums = None if grad_weight is None else sums_of(grad_weight)

    launch = _native.launcher("cpp", "noisy_linear" if last else "noisy_channels")
    pixels, threads = height * width, torch.get_num_threads()
    weight_rows = (
        noise.positions if loss_weight is None else x.shape[1] * pixels // loss_weight.shape[1]
    )  # of one weight
    for copy, image in _chunks(x, draws if own_x else 1, features * pixels, pixels, weight_rows):
        use = copy if own_x else slice(0, draws)
        weighed = slice(image.start * pixels // weight_rows, -(-image.stop * pixels // weight_rows))
        x_chunks = [part(half, copy, image) for half in xs]
        bases: list[Tensor | None] = [None, None]
        if weight is not None:
            bases = [None if t is None else _product(t, weight, bias, window, memory_format) for t in x_chunks]
        scores: list[Tensor | None] = [None, None]
        if loss_weight is not None:
            size = (features, height, width)
            scores = [None if t is None else _images(t.shape[:2], size, memory_format) for t in x_chunks]
        pass_tensors = (
            *(_laid_out(part(half, use, image), last) for half in ys),
            *(_laid_out(base, last) for base in bases),
            a.sigma.expand(features),
            *(part(half, use, weighed) for half in loss_weights),
            *(_laid_out(score, last) for score in scores),
            bias_sums,
            None if log_sigma is None else log_sigma.expand(features),  # a scalar's has stride 0
        )
        which = _native.noise_view(noise, features, use.start, image.start * pixels)
        launch(which, _native.views(pass_tensors), threads=threads)
        if weight_sums is not None:
            for score, chunk in zip(scores, x_chunks, strict=True):
                if score is not None and chunk is not None:
                    inputs = chunk.flatten(0, 1).float()
                    weight_sums.add_(window.weight_gradient(score.flatten(0, 1), inputs, weight_sums.shape))
        del bases, scores, pass_tensors  # before the next chunk's are allocated
    store(weight_sums, grad_weight)
    if loss_weight is not None:
        store(bias_sums, grad_bias)
        store(log_sigma, grad_log_sigma)


def _features(y: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None, window: Window) -> int:
    if y is not None:
        return y.shape[2]
    return window.channels(grad_weight.shape)[1] if grad_weight is not None else grad_bias.shape[0]  # type: ignore


def _chunks(x: Tensor, copies: int, outputs: int, pixels: int, positions: int):
    """Copies and images of each chunk: whole copies, or images of one copy (whole samples, or parts of one sample)."""
    limit = max(1, CHUNK // max(outputs, x[0, 0].numel()))
    images_of_sample = math.lcm(pixels, positions) // pixels
    if images_of_sample * pixels != positions:  # samples end within images
        limit = max(limit, images_of_sample)
    return row_tiles(copies, x.shape[1], limit, images_of_sample)


def _images(lead: torch.Size, size: tuple[int, int, int], memory_format: torch.memory_format) -> Tensor:
    """fp32 `[copies, images, O, H', W']`."""
    return torch.empty((lead.numel(), *size), dtype=_FP32, device="cpu", memory_format=memory_format).unflatten(0, lead)


def _laid_out(images: Tensor | None, last: bool) -> Tensor | None:
    """`[C, B, O, H', W']` as a pass takes it: `[C, rows, O]`, or `[C, B, O, 1, H' W']`."""
    if images is None:
        return None
    copies, count, features = images.shape[:3]
    if last:
        return images.movedim(2, -1).view(copies, -1, features)
    return images.view(copies, count, features, 1, -1)


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Window, memory_format: torch.memory_format
) -> Tensor:
    """The clean convolution of a chunk of copies, with fp32 sums.

    A bf16 product is rounded to bf16 before the noise is added, because oneDNN's output has its inputs' dtype. An fp16
    product is fp32 where oneDNN has no fp16.
    """
    dtype = x.dtype if products.supports(x.dtype) else _FP32
    made = window.convolve(x.flatten(0, 1).to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return made.contiguous(memory_format=memory_format).unflatten(0, x.shape[:2])
