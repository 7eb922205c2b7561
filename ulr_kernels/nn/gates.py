"""Gates: the derivative of the elementwise functions that read a layer's output."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ulr_kernels.nn.call import Call
from ulr_kernels.nn.generic import SUMS
from ulr_kernels.nn.norm import NormCall

GATED = SUMS | {
    F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish,
    F.softplus, F.hardtanh, F.hardswish, F.hardsigmoid, F.tanh, F.sigmoid, F.logsigmoid, F.softsign, F.tanhshrink,
    torch.relu, torch.relu_, torch.tanh, torch.tanh_, torch.sigmoid, torch.sigmoid_, Tensor.relu, Tensor.relu_,
    Tensor.tanh, Tensor.tanh_, Tensor.sigmoid, Tensor.sigmoid_, Tensor.clamp, torch.clamp, Tensor.clamp_min,
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.batch_norm, F.dropout,
}  # fmt: skip
"""Elementwise functions, and those that pass on some elements: their derivative in each element is one number."""

MOST_FUNCTIONS = 4  # that one output is followed through: a residual stream is added to without end


class _Path(NamedTuple):
    """A layer's output, and the last of the functions that have read it so far, with autograd's graph between them."""

    name: Hashable
    output: Tensor
    value: Tensor
    holder: Tensor  # the model's own tensor; held, so that its id stays its own
    length: int = 0  # the number of functions


class Gates:
    """Follows the outputs of layers through the functions that read them, in a forward without noise."""

    def __init__(self) -> None:
        self._paths: dict[int, list[_Path]] = {}  # by the id of the model's tensor
        self._ended: list[_Path] = []

    def begin(self, name: Hashable, output: Tensor) -> None:
        """Follow a layer's output from here on."""
        leaf = output.detach().clone().requires_grad_(output.is_floating_point())
        if leaf.requires_grad:
            self._at(output).append(_Path(name, leaf, leaf, output))

    def follow(self, func: Callable, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Runs after a function that is no layer."""
        if func in GATED and isinstance(result, Tensor) and result.is_floating_point():
            self._go_on(lambda *own: func(*own, **kwargs), args, result, 2 if func in SUMS else 1)

    def follow_call(self, call: Call, result: Tensor) -> None:
        """Runs after a layer: batch normalisation by running statistics is elementwise, too."""
        if isinstance(call, NormCall) and call.elementwise:
            self._go_on(call.forward, call.inputs, result, 1)

    def _go_on(self, func: Callable, args: tuple, result: Tensor, places: int) -> None:
        """`places`: the arguments, from the first on, that the derivative is taken in."""
        for place, arg in enumerate(args[:places]):
            for path in self._paths.pop(id(arg), []):
                # A copy, because the function may write in place.
                own = [path.value.clone() if i == place else other for i, other in enumerate(args)]
                own = [t.detach() if isinstance(t, Tensor) and i != place else t for i, t in enumerate(own)]
                with torch.enable_grad():
                    further = path._replace(value=func(*own), holder=result, length=path.length + 1)
                (self._ended if further.length == MOST_FUNCTIONS else self._at(result)).append(further)

    def _at(self, tensor: Tensor) -> list[_Path]:
        return self._paths.setdefault(id(tensor), [])

    def found(self) -> dict[Any, Tensor | None]:
        """The gate of each output, of its shape; None: no function of the table has read it, so 1."""
        gates: dict[Any, Tensor | None] = {}
        for paths in (*self._paths.values(), self._ended):
            for path in paths:
                gate = None
                if path.value is not path.output:
                    ones = torch.ones_like(path.value)
                    gate = torch.autograd.grad(path.value, path.output, ones)[0]
                gates[path.name] = gate
        return gates
