"""Convolutions: nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, and their functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ulr_kernels import ops
from ulr_kernels.nn.call import Call, KnownLosses, ParametersOf, gradient_buffers


class ConvCall(Call):
    """y = conv(x, weight) + b, with x `[samples (x images of each), I, H, W]`, or without H."""

    feature_dim = 1

    def __init__(
        self,
        func: Callable[..., Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        window: dict[str, Any],
        parameters_of: ParametersOf,
    ) -> None:
        """`window`: stride, padding, dilation, groups and, of a transposed convolution, output_padding."""
        self._func, self._w, self._b, self._window = func, weight, bias, window
        self._weight, self._bias = parameters_of(weight), parameters_of(bias)
        super().__init__((x,), (self._weight, self._bias))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._func(*inputs, self._w, self._b, **self._window)

    def _arguments(self) -> tuple[Tensor, dict[str, Any]]:
        """The images and the window in the form of the ops: an image of one dimension has a height of 1."""
        (x,), window = self._operands, dict(self._window)
        if not self._shared:
            x = x.unflatten(0, (self.noise.copies, -1))
        if self._w.dim() == 3:
            x = x.unsqueeze(-2)
            for name, of_height in (("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0)):
                value = window.get(name, of_height)
                if not isinstance(value, str):
                    window[name] = (of_height, value if isinstance(value, int) else value[0])
        return x, window | {"transposed": self._func in TRANSPOSED}

    def _noised(self) -> Tensor:
        noise, (x, window), two = self.noise, self._arguments(), self._w.dim() == 4
        weight, spec = self._w if two else self._w.unsqueeze(2), self._forward_spec(x)
        y = ops.noisy_conv2d(
            x, weight, self._b, noise.sigma, noise.key, copies=noise.copies, draw=noise.draw, **window, **spec
        )
        return y if two else y.squeeze(-2)

    def _forward_spec(self, x: Tensor, loss_weight: Tensor | None = None) -> dict[str, Any]:
        """`_spec` before the output, whose rows it needs, exists."""
        if (images := x.shape[-4] // self._samples) > 1 or self.noise.first:
            return self._spec(images * self.forward(self._operands[0][:1])[0, 0].numel(), loss_weight)
        spec = self._spec(0, loss_weight)
        return spec if spec["positions"] else spec | {"positions": None}  # those of one image

    def _noised_with_gradient(self, known: KnownLosses) -> Tensor:
        (x, window), two = self._arguments(), self._w.dim() == 4
        own_weight = self._w if two else self._w.unsqueeze(2)
        spec = self._gradient_spec(
            self._forward_spec(x, known.loss_weight), self.noise.draw, known.loss_weight, known.log_sigma
        )
        with self._buffers() as (weight, bias):
            y = ops.noisy_conv2d_recompute_(weight, bias, x, own_weight, self._b, **window, **spec)
        return y if two else y.squeeze(-2)

    @contextlib.contextmanager
    def _buffers(self) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Gradient buffers: of the weight, in the shape of the ops, and of the bias."""
        with gradient_buffers(self._weight, self._bias) as (weight, bias):
            yield weight if weight is None or self._w.dim() == 4 else weight.unsqueeze(2), bias

    def add_gradient(self, loss_weight: Tensor, draw: int, log_sigma: Tensor | None) -> None:
        x, window = self._arguments()
        kernel = tuple(self._w.shape[2:]) if self._w.dim() == 4 else (1, self._w.shape[2])
        spec = self._gradient_spec(self._spec(self._positions, loss_weight), draw, loss_weight, log_sigma)
        with self._buffers() as (weight, bias):
            ops.noisy_conv2d_grad_(weight, bias, x, kernel_size=kernel, **window, **spec)


TRANSPOSED = {F.conv_transpose1d, F.conv_transpose2d}


def _reader(func: Callable[..., Tensor], names: tuple[str, ...]) -> Callable:
    """`names`: the function's arguments after the bias."""

    def read(args: tuple, kwargs: dict[str, Any], parameters_of: ParametersOf) -> ConvCall | None:
        given = dict(zip(("input", "weight", "bias", *names), args, strict=False)) | kwargs
        x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
        if x.dim() != weight.dim() or parameters_of(x):  # without a batch: torch would take it too
            return None
        return ConvCall(func, x, weight, bias, given, parameters_of)

    return read


WINDOW = ("stride", "padding", "dilation", "groups")
TRANSPOSED_WINDOW = ("stride", "padding", "output_padding", "groups", "dilation")
READERS = {
    F.conv1d: _reader(F.conv1d, WINDOW),
    F.conv2d: _reader(F.conv2d, WINDOW),
    F.conv_transpose1d: _reader(F.conv_transpose1d, TRANSPOSED_WINDOW),
    F.conv_transpose2d: _reader(F.conv_transpose2d, TRANSPOSED_WINDOW),
}
