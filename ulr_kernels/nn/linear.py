"""Linear layers: nn.Linear, F.linear, and products with a parameter (`x @ W`, matmul, mm, addmm)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ulr_kernels import ops, products
from ulr_kernels.nn.call import Call, KnownLosses, ParametersOf, gradient_buffers


class LinearCall(Call):
    """y = x W^T + b, with x `[samples (x positions), ..., K]`."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, parameters_of: ParametersOf, *, columns: bool = False
    ) -> None:
        """`columns`: the weight comes as `[K, N]`, as in `x @ W`, instead of `[N, K]`."""
        self._w = weight.T if columns else weight
        self._b = bias
        self._columns = columns
        self._weight, self._bias = parameters_of(weight), parameters_of(bias)
        super().__init__((x,), (self._weight, self._bias))

    def forward(self, *inputs: Tensor) -> Tensor:
        (x,), weight, bias = inputs, self._w, self._b
        plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
        fits = x.dtype == weight.dtype and x.shape[-1] == weight.shape[1]  # else F.linear raises its own error
        if plain and fits and x.device.type == "cpu" and products.dense(weight):
            return products.linear(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], weight.shape[0])
        return F.linear(x, weight, bias)

    def _rows(self) -> Tensor:
        """The input in the shape of the ops: `[R, K]`, shared by the copies, or `[C, R, K]`."""
        (x,) = self._operands
        return x.flatten(0, -2) if self._shared else x.unflatten(0, (self.noise.copies, -1)).flatten(1, -2)

    def _noised(self) -> Tensor:
        noise, rows = self.noise, self._rows()
        spec = self._spec(rows.shape[-2] // self._samples)
        y = ops.noisy_linear(
            rows, self._w, self._b, noise.sigma, noise.key, copies=noise.copies, draw=noise.draw, **spec
        )
        return self._like_input(y)

    def _like_input(self, y: Tensor) -> Tensor:
        return y.view(self.noise.copies, -1, *self._operands[0].shape[1:-1], y.shape[-1])

    def _noised_with_gradient(self, known: KnownLosses) -> Tensor:
        rows = self._rows()
        spec = self._spec(rows.shape[-2] // self._samples, known.loss_weight)
        spec = self._gradient_spec(spec, self.noise.draw, known.loss_weight, known.log_sigma)
        with self._buffers() as (weight, bias):
            y = ops.noisy_linear_recompute_(weight, bias, rows, self._w, self._b, **spec)
        return self._like_input(y)

    @contextlib.contextmanager
    def _buffers(self) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """Gradient buffers: of the weight, as `[N, K]`, and of the bias."""
        with gradient_buffers(self._weight, self._bias) as (weight, bias):
            yield weight.T if weight is not None and self._columns else weight, bias

    @staticmethod
    def add_together(calls: list[tuple[LinearCall, Tensor]], draw: int) -> None:
        """Add the gradients of many calls, in one launch where possible: small layers fill a device only together."""
        groups: list[list[tuple[LinearCall, Tensor]]] = []
        for call, loss_weight in calls:
            group = next((group for group in groups if call.joins([other for other, _ in group])), None)
            if group is None:
                groups.append([(call, loss_weight)])
            else:
                group.append((call, loss_weight))
        for group in groups:
            if len(group) == 1:
                group[0][0].add_gradient(group[0][1], draw, None)
            else:
                _launch_together(group, draw)

    def joins(self, others: Sequence[LinearCall]) -> bool:
        """Whether one launch can add the gradients of this and others: no trained weight belongs to two of them."""
        weights = [call._weight for call in (self, *others)]
        if any(weight is None or not weight.tensor.requires_grad for weight in weights):
            return False
        known = {id(p) for call in others for p in call.parameters}
        (x,), (y,) = self._operands, others[0]._operands
        return (x.dtype, x.device) == (y.dtype, y.device) and not any(id(p) in known for p in self.parameters)

    def add_output_gradient(self, gradient: Tensor) -> None:
        if not self._shared:
            return super().add_output_gradient(gradient)
        rows, flat = self._rows().float(), gradient.flatten(0, -2)
        with self._buffers() as (weight, bias):
            if weight is not None:
                products.add_outer_(weight, flat, rows)
            if bias is not None:
                bias += flat.sum(0)

    def add_gradient(self, loss_weight: Tensor, draw: int, log_sigma: Tensor | None) -> None:
        rows = self._rows()
        spec = self._spec(rows.shape[-2] // self._samples, loss_weight)
        with self._buffers() as (weight, bias):
            ops.noisy_linear_grad_(weight, bias, rows, **self._gradient_spec(spec, draw, loss_weight, log_sigma))


def _launch_together(group: list[tuple[LinearCall, Tensor]], draw: int) -> None:
    calls, loss_weights = zip(*group, strict=True)
    rows = [call._rows() for call in calls]
    specs = [call._spec(x.shape[-2] // call._samples, w) for call, x, w in zip(calls, rows, loss_weights, strict=True)]
    noise = calls[0].noise
    with contextlib.ExitStack() as stack:
        buffers = [stack.enter_context(call._buffers()) for call in calls]
        ops.foreach_noisy_linear_grad_(
            [weight for weight, _ in buffers if weight is not None],
            [bias for _, bias in buffers],
            rows,
            list(loss_weights),
            [call.noise.sigma for call in calls],
            [call.noise.key for call in calls],
            antithetic=noise.antithetic,
            dist=noise.dist,
            sampler=noise.sampler,
            positions=[spec["positions"] for spec in specs],
            draw=draw,
            row_offset=[spec["row_offset"] for spec in specs],
        )


def _linear(args: tuple, kwargs: dict[str, Any], parameters_of: ParametersOf) -> LinearCall | None:
    def call(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> LinearCall | None:
        if parameters_of(input) or input.dim() < 2 or weight.dim() != 2 or not _per_feature(bias, weight.shape[0]):
            return None
        return LinearCall(input, weight, bias, parameters_of)

    return call(*args, **kwargs)


def _product(args: tuple, kwargs: dict[str, Any], parameters_of: ParametersOf) -> LinearCall | None:
    if kwargs or len(args) < 2:
        return None
    x, weight = args[-2:]
    bias = args[0] if len(args) == 3 else None  # addmm(bias, x, weight)
    if parameters_of(x) or parameters_of(weight) is None or weight.dim() != 2 or x.dim() < 2:
        return None
    if not _per_feature(bias, weight.shape[1]):
        return None
    return LinearCall(x, weight, bias, parameters_of, columns=True)


def _per_feature(bias: Tensor | None, features: int) -> bool:
    """Whether a bias has one number for each feature; torch's functions would broadcast other shapes too."""
    return bias is None or bias.shape == (features,)


READERS = {
    F.linear: _linear,
    torch.matmul: _product,
    torch.mm: _product,
    torch.addmm: _product,
    Tensor.matmul: _product,
    Tensor.mm: _product,
}
