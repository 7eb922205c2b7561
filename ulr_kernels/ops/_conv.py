"""Convolutions: their window and rules, and the reference of the noisy ones in torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ulr_kernels.ops import _linear
from ulr_kernels.ops._linear import Sizes
from ulr_kernels.ops._op import FLOATS, Check, NoiseSpec, Output

# Part of the ops' schemas; padding is (top, bottom, left, right).
WINDOW_SCHEMA = "int[] stride, int[] padding, int[] dilation, int groups, bool transposed"


class Window(NamedTuple):
    """The input pixels of an output pixel. Output row y and kernel row ky have the input row

    y * stride - top + ky * dilation, or, transposed, (y + top - ky * dilation) / stride where that is whole.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]  # top, bottom, left, right; transposed: rows and columns cut off the output
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False

    @staticmethod
    def of(stride, padding, dilation, groups, transposed) -> Window:
        return Window(tuple(stride), tuple(padding), tuple(dilation), groups, transposed)

    def output_size(self, image: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        """Height and width of the output for those of the input and of the kernel."""

        def extent(axis: int) -> int:
            reach = self.dilation[axis] * (kernel[axis] - 1) + 1
            padding = self.padding[2 * axis] + self.padding[2 * axis + 1]
            if self.transposed:
                return (image[axis] - 1) * self.stride[axis] + reach - padding
            return (image[axis] + padding - reach) // self.stride[axis] + 1

        return extent(0), extent(1)

    def channels(self, weight: Sequence[int]) -> tuple[int, int]:
        """Channels of the input and of the output for a weight's shape."""
        per_group = weight[1] * self.groups
        return (weight[0], per_group) if self.transposed else (per_group, weight[0])

    def tile_channels(self, inputs: int, features: int, tile: int, shift: int) -> int:
        """The largest number of input channels that a tile of features needs: those of all groups in the tile.

        The first tile begins `shift` features before the first one.
        """
        of_group, most = features // self.groups, 1
        for first in range(-shift, features, tile):
            last = min(first + tile, features) - 1
            most = max(most, last // of_group - max(first, 0) // of_group + 1)
        return most * (inputs // self.groups)

    def _for_torch(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
        """Input, padding and output padding for torch's convolutions, whose padding is the same on both sides."""
        top, bottom, left, right = self.padding
        if self.transposed:
            return x, (top, left), (top - bottom, left - right)
        if top == bottom and left == right:
            return x, (top, left), (0, 0)
        return F.pad(x, (left, right, top, bottom)), (0, 0), (0, 0)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`[B, O, H', W']` of `x [B, I, H, W]`, by torch."""
        x, padding, output_padding = self._for_torch(x)
        if self.transposed:
            return F.conv_transpose2d(x, weight, bias, self.stride, padding, output_padding, self.groups, self.dilation)
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of x and of the weight from the output's, by torch; the second needs only `weight`'s shape."""
        padded, padding, output_padding = self._for_torch(x)
        by_x, by_weight, _ = torch.ops.aten.convolution_backward(
            grad,
            padded,
            weight,
            None,
            self.stride,
            padding,
            self.dilation,
            self.transposed,
            output_padding,
            self.groups,
            [*wanted, False],
        )
        if padded is not x and by_x is not None:
            top, _, left, _ = self.padding
            by_x = by_x[..., top : top + x.shape[-2], left : left + x.shape[-1]]
        return by_x, by_weight

    def weight_gradient(self, grad: Tensor, x: Tensor, shape: Sequence[int]) -> Tensor:
        """The gradient of a weight of this shape, of x's dtype, from the output's, by torch."""
        by_weight = self.backward(grad, x, x.new_empty(shape), (False, True))[1]
        assert by_weight is not None
        return by_weight


class Conv(NamedTuple):
    """Arguments of noisy_conv2d."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    sigma: Tensor
    window: Window
    copies: int
    noise: NoiseSpec

    @property
    def sizes(self) -> Sizes:
        return sizes_of(self.x, self.weight.shape, self.window, self.copies)


class ConvGradient(NamedTuple):
    """Arguments of noisy_conv2d_grad_; with a weight instead of `kernel`, those of noisy_conv2d_recompute_."""

    grad_weight: Tensor | None
    grad_bias: Tensor | None
    grad_log_sigma: Tensor | None
    x: Tensor
    loss_weight: Tensor
    sigma: Tensor
    window: Window
    noise: NoiseSpec
    weight: Tensor | None = None
    bias: Tensor | None = None
    kernel: list[int] | None = None

    @property
    def buffers(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.grad_weight, self.grad_bias, self.grad_log_sigma

    @property
    def kernel_size(self) -> Sequence[int]:
        """Height and width of the kernel."""
        size = self.kernel if self.weight is None else self.weight.shape[2:]
        assert size is not None
        return size

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The weight's shape by grad_weight, or else by grad_bias, x and the kernel's size together."""
        if self.grad_weight is not None:
            return tuple(self.grad_weight.shape)
        assert self.grad_bias is not None  # by the op's check
        inputs, features = self.x.shape[-3], self.grad_bias.shape[0]
        first, second = (inputs, features) if self.window.transposed else (features, inputs)
        return first, second // self.window.groups, *self.kernel_size

    @property
    def sizes(self) -> Sizes:
        return sizes_of(self.x, self.weight_shape, self.window, self.loss_weight.shape[0])

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        return self.window.output_size(self.x.shape[-2:], self.kernel_size)


# --- public arguments ------------------------------------------------------------------------------------------------

Pair = int | Sequence[int]


def _pair(check: Check, argument: str, value: Pair) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) == 1:
        pair *= 2
    if len(pair) != 2 or not all(isinstance(v, int) for v in pair):
        check.fail(argument, "be an integer or a pair of integers", repr(value))
    return pair


def check_images(check: Check, x: Tensor) -> None:
    if x.dim() not in (4, 5):
        check.fail("x", "be [B, I, H, W] or [C, B, I, H, W]", list(x.shape))


def check_kernel(check: Check, argument: str, weight: Tensor, transposed: bool) -> None:
    if weight.dim() != 4 or not weight.numel():
        form = "[I, O / groups, kh, kw]" if transposed else "[O, I / groups, kh, kw]"
        check.fail(argument, f"be {form}, none of them 0", list(weight.shape))


def resolve_window(
    check: Check,
    kernel: Sequence[int],
    stride: Pair,
    padding: Pair | str,
    dilation: Pair,
    groups: int,
    transposed: bool,
    output_padding: Pair,
) -> Window:
    """The window of F.conv2d's arguments, or, transposed, of F.conv_transpose2d's."""
    strides, dilations = _pair(check, "stride", stride), _pair(check, "dilation", dilation)
    extra = _pair(check, "output_padding", output_padding)
    if extra != (0, 0) and not transposed:
        check.fail("output_padding", "be 0 where transposed is not set", repr(output_padding))
    if isinstance(padding, str):
        if padding not in ("same", "valid") or transposed:
            rule = "be an integer or a pair" if transposed else "be an integer, a pair, 'same' or 'valid'"
            check.fail("padding", rule, repr(padding))
        if padding == "same" and strides != (1, 1):
            check.fail("padding", "be no 'same' where stride is not 1", strides)
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernel, strict=True)]
        sides = (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
    else:
        height, width = _pair(check, "padding", padding)
        if min(height, width) < 0:
            check.fail("padding", "be at least 0", repr(padding))
        sides = (height, height - extra[0], width, width - extra[1])
    window = Window(strides, sides, dilations, groups, transposed)
    check_window(check, window)
    return window


def kernel_of(check: Check, grad_weight: Tensor | None, kernel_size: Pair | None, transposed: bool) -> tuple[int, int]:
    """The kernel's height and width, which grad_weight gives where there is one."""
    given = None if kernel_size is None else _pair(check, "kernel_size", kernel_size)
    if grad_weight is None:
        if given is None:
            check.fail("kernel_size", "be given where grad_weight is None", None)
        if min(given) < 1:
            check.fail("kernel_size", "be at least 1", given)
        return given
    check_kernel(check, "grad_weight", grad_weight, transposed)
    height, width = grad_weight.shape[2:]
    if given not in (None, (height, width)):
        check.fail("kernel_size", f"be {[height, width]} like grad_weight's", repr(kernel_size))
    return height, width


def resolve_positions(window: Window, x: Tensor, kernel: Sequence[int], positions: int | None) -> int:
    """Rows per sample; None: those of one image. (The op's check refuses an output without rows.)"""
    height, width = window.output_size(x.shape[-2:], kernel)
    return max(height, 1) * max(width, 1) if positions is None else positions


# --- rules -----------------------------------------------------------------------------------------------------------


def check_window(check: Check, window: Window) -> None:
    for argument, values, length in (
        ("stride", window.stride, 2),
        ("padding", window.padding, 4),
        ("dilation", window.dilation, 2),
    ):
        if len(values) != length:
            check.fail(argument, f"have {length} values", list(values))
        least = 0 if argument == "padding" else 1
        if min(values) < least and not (argument == "padding" and window.transposed):
            check.fail(argument, f"be at least {least}", values)
    if window.groups < 1:
        check.fail("groups", "be at least 1", window.groups)
    if window.transposed:
        for axis in (0, 1):
            extra = window.padding[2 * axis] - window.padding[2 * axis + 1]
            if not 0 <= extra < max(window.stride[axis], window.dilation[axis]):
                check.fail("output_padding", "be at least 0 and less than stride or dilation", extra)


def sizes_of(x: Tensor, weight: Sequence[int], window: Window, copies: int) -> Sizes:
    """The sizes of the product: rows are (image, y, x), inputs the terms of an output, features the channels."""
    height, width = window.output_size(x.shape[-2:], weight[2:])
    inputs, features = window.channels(weight)
    taps = inputs // window.groups * weight[2] * weight[3]
    return Sizes(copies, x.shape[-4] * height * width, taps, features, x.dim() == 4)


def check_sizes(check: Check, x: Tensor, weight: Sequence[int], window: Window, copies: int, named: str) -> Sizes:
    """`named` is the argument that gave the weight's shape."""
    check.dtype("x", x, FLOATS)
    if weight[0] % window.groups:
        check.fail("groups", f"divide the {weight[0]} channels of {named}", window.groups)
    inputs = window.channels(weight)[0]
    if x.shape[-3] != inputs:
        check.fail("x", f"have {inputs} channels ({named} is {list(weight)})", list(x.shape))
    if x.dim() == 5 and x.shape[0] != copies:
        check.fail("x", f"have {copies} copies on its first axis, or no copy axis", list(x.shape))
    size = window.output_size(x.shape[-2:], weight[2:])
    if min(*x.shape[-2:], *size) < 1:
        check.fail("x", f"have images large enough for a kernel of {list(weight[2:])}", list(x.shape))
    return sizes_of(x, weight, window, copies)


def check_gradient(check: Check, a: ConvGradient) -> Sizes:
    """All rules of a gradient; returns its sizes."""
    x, window, kernel, grad_weight, grad_bias = a.x, a.window, a.kernel_size, a.grad_weight, a.grad_bias
    check_images(check, x)
    check_window(check, window)
    if grad_weight is None and grad_bias is None:
        check.fail("grad_weight", "be given where grad_bias is None", None)
    if grad_weight is not None:
        check_kernel(check, "grad_weight", grad_weight, window.transposed)
        check.dtype("grad_weight", grad_weight, _linear.buffer_dtypes(x))
        if tuple(grad_weight.shape[2:]) != tuple(kernel):
            check.fail("grad_weight", f"have a kernel of {list(kernel)}", list(grad_weight.shape))
    elif grad_bias is not None and grad_bias.dim() != 1:
        check.fail("grad_bias", "be [O], one per channel", list(grad_bias.shape))
    named = "a weight of grad_bias's channels" if grad_weight is None else "grad_weight"
    if a.loss_weight.dim() != 2:
        check.fail("loss_weight", "be [copies, samples]", list(a.loss_weight.shape))
    sizes = check_sizes(check, x, a.weight_shape, window, a.loss_weight.shape[0], named)
    _linear.check_loss_weight(check, a.loss_weight, sizes.rows, a.noise.positions)
    _linear.check_feature_gradients(check, sizes.features, a)
    draws = check.copies(sizes.copies, a.noise.antithetic)
    if a.weight is not None:
        check_sizes(check, x, a.weight.shape, window, sizes.copies, "weight")
        features = window.channels(a.weight.shape)[1]
        if features != sizes.features:
            name = "grad_bias" if grad_weight is None else "grad_weight"
            check.fail(name, f"have {features} channels like weight", sizes.features)
        _linear.check_weight(check, x, a.weight, a.bias, sizes.features)
    _linear.check_sigma(check, "sigma", a.sigma, sizes.features, (torch.float32,))
    _linear.check_gradient_devices(check, a)
    check.noise(a.noise, sizes.rows, sizes.features, draws)
    return sizes


def output(x: Tensor, weight: Tensor, sizes: Sizes, window: Window) -> Output:
    """`[C, B, O, H', W']`, channels last where x or the weight is, as torch's convolution decides."""
    last = any(
        t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()
        for t in (x if x.dim() == 4 else x[0], weight)
    )
    size = window.output_size(x.shape[-2:], weight.shape[2:])
    shape = (sizes.copies, x.shape[-4], sizes.features, *size)
    return Output(shape, x.dtype, innermost=2 if last else -1)


def products(window: Window, sizes: Sizes) -> int:
    """Multiply-adds of the convolution of all copies; transposed, an output uses 1 / stride^2 of the kernel."""
    skipped = window.stride[0] * window.stride[1] if window.transposed else 1
    return (1 if sizes.shared else sizes.copies) * sizes.rows * sizes.features * sizes.inputs // skipped


# --- reference -------------------------------------------------------------------------------------------------------


def forward_reference(y: Tensor, a: Conv | ConvGradient) -> None:
    """y[c] = conv(x[c], weight) + b + sigma * eps_c, with fp32 sums."""
    sizes, weight, channels_last = a.sizes, a.weight, y.movedim(2, -1)
    assert weight is not None

    def product(images: Tensor) -> Tensor:
        bias = None if a.bias is None else a.bias.float()
        return a.window.convolve(images.float(), weight.float(), bias).movedim(1, -1)

    shared = product(a.x) if sizes.shared else None
    for copy, eps in _linear.copies_of_noise(a.noise, sizes):
        clean = shared if shared is not None else product(a.x[copy])
        channels_last[copy].copy_(clean + (a.sigma * eps).view(clean.shape))


def gradient_reference(a: ConvGradient) -> None:
    """`_linear.gradient_reference` with the convolution's weight gradient in place of the outer product."""

    def product(scores: Tensor, images: Tensor) -> Tensor:
        assert a.grad_weight is not None
        by_output = scores.view(images.shape[0], *a.output_size, a.sizes.features).movedim(-1, 1)
        return a.window.weight_gradient(by_output, images.float(), a.grad_weight.shape)

    _linear.gradient_reference(a, product)
