"""Linear layers: nn.Linear, F.linear, and products with a parameter (`x @ W`, matmul, mm, addmm)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ulr_kernels import ops
from ulr_kernels.backends.cpp import onednn

Origin = Callable[[Tensor], tuple[Tensor, bool] | None]  # a tensor -> (its parameter, whether it is the transpose)


class Noise(NamedTuple):
    """What makes a call's noise: its scale, its key, and the settings that all layers share."""

    sigma: float | Tensor
    key: Tensor
    copies: int
    antithetic: bool
    dist: str
    sampler: str


class LinearCall:
    """One call of a linear layer, y = x W^T + b, with x `[samples (x positions), ..., K]`.

    Attributes:
        x: the input, as the model gave it.
        parameters: the model's own parameters among weight and bias.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, origin: Origin, *, columns: bool = False
    ) -> None:
        """`columns`: the weight comes as `[K, N]`, as in `x @ W`, instead of `[N, K]`."""
        self.x = x
        self._version = x._version
        self._w = weight.T if columns else weight
        self._b = bias
        found = origin(weight)
        self._weight = None if found is None else found[0]
        self._bias = bias if bias is not None and origin(bias) is not None else None
        self._stored_as_columns = columns != (found is not None and found[1])
        self.parameters = tuple(p for p in (self._weight, self._bias) if p is not None)

    def clean(self) -> Tensor:
        x, weight, bias = self.x, self._w, self._b
        plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
        fits = x.dtype == weight.dtype and x.shape[-1] == weight.shape[1]  # else F.linear says what is wrong
        if plain and fits and x.device.type == "cpu" and onednn.dense(weight):
            return onednn.linear(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], weight.shape[0])
        return F.linear(x, weight, bias)

    def noised(self, noise: Noise, samples: int, x_copies: int, *, shared: bool) -> Tensor:
        """The layer's output with noise, copy-major: `[copies * samples (x positions), ..., N]`.

        Args:
            noise: the noise to add.
            samples: how many one copy has.
            x_copies: how many copies x holds: 1, or all of them.
            shared: x is the same in all copies.
        """
        flat = self.x.flatten(0, -2)
        rows = flat.shape[0] // x_copies
        self._operand = flat[:rows] if shared else flat.unflatten(0, (x_copies, rows))
        self._noise = noise
        self._spec: dict[str, Any] = {
            "antithetic": noise.antithetic,
            "dist": noise.dist,
            "sampler": noise.sampler,
            "positions": rows // samples,
        }
        y = ops.noisy_linear(self._operand, self._w, self._b, noise.sigma, noise.key, copies=noise.copies, **self._spec)
        return y.view(self.x.shape[0] // x_copies * noise.copies, *self.x.shape[1:-1], y.shape[-1])

    def check_unchanged(self) -> None:
        """Raise if the input, which the gradient needs, was modified in place since."""
        if self.x._version != self._version:
            raise RuntimeError(
                "ulr.ULR: the input of a linear layer must not be modified in place after the layer has read it "
                f"(its gradient needs it), got an input {list(self.x.shape)} that was"
            )

    def add_gradient(self, loss_weight: Tensor, log_sigma: Tensor | None) -> None:
        """Add the likelihood-ratio gradient of this call to `.grad` of its trainable parameters.

        Args:
            loss_weight: fp32 `[copies, samples]`.
            log_sigma: the learnt ln sigma, which gets its gradient too, or None.
        """
        weight = gradient_buffer(self._weight)
        ops.noisy_linear_grad_(
            weight.T if weight is not None and self._stored_as_columns else weight,
            gradient_buffer(self._bias),
            self._operand,
            loss_weight,
            self._noise.sigma,
            self._noise.key,
            grad_log_sigma=gradient_buffer(log_sigma),
            **self._spec,
        )


def gradient_buffer(parameter: Tensor | None) -> Tensor | None:
    """`.grad`, made if there is none; None for a parameter that is not trained."""
    if parameter is None or not parameter.requires_grad:
        return None
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _linear(args: tuple, kwargs: dict[str, Any], origin: Origin) -> LinearCall | None:
    def call(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> LinearCall | None:
        if input.dim() < 2 or weight.dim() != 2 or not _per_feature(bias, weight.shape[0]):
            return None
        return LinearCall(input, weight, bias, origin)

    return call(*args, **kwargs)


def _product(args: tuple, kwargs: dict[str, Any], origin: Origin) -> LinearCall | None:
    if kwargs or len(args) < 2:
        return None
    x, weight = args[-2:]
    bias = args[0] if len(args) == 3 else None  # addmm(bias, x, weight)
    if origin(weight) is None or weight.dim() != 2 or x.dim() < 2 or not _per_feature(bias, weight.shape[1]):
        return None
    return LinearCall(x, weight, bias, origin, columns=True)


def _per_feature(bias: Tensor | None, features: int) -> bool:
    """Whether a bias is what layers have; torch's functions would broadcast other shapes too."""
    return bias is None or bias.shape == (features,)


READERS = {
    F.linear: _linear,
    torch.matmul: _product,
    torch.mm: _product,
    torch.addmm: _product,
    Tensor.matmul: _product,
    Tensor.mm: _product,
}
