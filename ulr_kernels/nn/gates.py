"""Gates and supports of layers' outputs, from the elementwise functions that read them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ulr_kernels.nn.call import Call
from ulr_kernels.nn.generic import METADATA_FUNCTIONS
from ulr_kernels.nn.marks import flat
from ulr_kernels.nn.norm import NormCall

ARITHMETIC = {
    torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__,
    torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__, Tensor.__rsub__,
    torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__imul__, Tensor.__rmul__,
    torch.div, Tensor.div, Tensor.div_, Tensor.__truediv__, Tensor.__itruediv__,
}  # fmt: skip
STEPS = {torch.ge, torch.gt, Tensor.ge, Tensor.gt, Tensor.__ge__, Tensor.__gt__}
GATED = ARITHMETIC | STEPS | {
    F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish,
    F.softplus, F.hardtanh, F.hardswish, F.hardsigmoid, F.tanh, F.sigmoid, F.logsigmoid, F.softsign, F.tanhshrink,
    torch.relu, torch.relu_, torch.tanh, torch.tanh_, torch.sigmoid, torch.sigmoid_, Tensor.relu, Tensor.relu_,
    Tensor.tanh, Tensor.tanh_, Tensor.sigmoid, Tensor.sigmoid_, Tensor.clamp, torch.clamp, Tensor.clamp_min,
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.batch_norm, F.dropout,
}  # fmt: skip
"""Elementwise functions, and those that pass on some elements: their derivative in each element is one number. A step's
derivative is that of its mean over the noise."""

SIZES = METADATA_FUNCTIONS | {Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.stride, Tensor.__len__}
"""Functions that read no value; nor do getters of what is no tensor."""

MARGIN = 2.0  # of a support, in units of sigma
MOST_FUNCTIONS = 4  # that one output is followed through: a residual stream is added to without end


class _Path(NamedTuple):
    """A layer's output, and the last of the functions that have read it so far, with autograd's graph between them.

    Where the support is asked for, outputs and values are those for the output, and for more and less of it.
    """

    name: Hashable
    sigma: float | Tensor
    outputs: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    tensor: weakref.ref[Tensor]  # the model's own
    version: int  # of the tensor, which functions may write into
    length: int = 0  # the number of functions

    def derivative(self) -> Tensor | None:
        """That of the functions, of the output's shape; None: there is no function, so 1."""
        if not self.length:
            return None
        value = self.values[0]
        return torch.autograd.grad(value, self.outputs[0], torch.ones_like(value), retain_graph=True)[0]

    def support(self) -> Tensor | None:
        """Where they have a derivative, bool; None: there is no function, so everywhere."""
        if not self.length:
            return None
        found = torch.zeros_like(self.outputs[0], dtype=torch.bool)
        for value, output in zip(self.values, self.outputs, strict=True):
            # Weights that differ: an element that wins two windows of a pool is not to cancel.
            weights = torch.linspace(1, 2, value.numel(), dtype=value.dtype, device=value.device).view_as(value)
            found |= torch.autograd.grad(value, output, weights, retain_graph=True)[0] != 0
        return found


class Gate(NamedTuple):
    """What functions let through of a layer's output.

    Attributes:
        derivative: of the functions, of the output's shape; None: no function of the table has read it, so 1.
        support: bool, of its shape: the elements that they let through, or nearly do; None: all, or not known.
    """

    derivative: Tensor | None
    support: Tensor | None


class Gates:
    """Follows the outputs of layers through the functions that read them, in a forward without noise.

    Args:
        with_support: find the supports too.
    """

    def __init__(self, with_support: bool) -> None:
        self._with_support = with_support
        self._paths: dict[int, list[_Path]] = {}  # by the id of the model's tensor
        self._lasts: dict[Hashable, _Path] = {}  # of those through the first of the functions that read a tensor
        self._read: list[_Path] = []  # by a function that is not in the table

    def begin(self, name: Hashable, output: Tensor, sigma: float | Tensor) -> None:
        """Follow a layer's output, whose noise has the scale `sigma`, from here on."""
        if not output.is_floating_point():
            return
        margin = MARGIN * sigma
        margins = (0.0, margin, -margin) if self._with_support else (0.0,)
        leaves = tuple((output.detach() + more).requires_grad_() for more in margins)
        self._lasts[name] = self._add(_Path(name, sigma, leaves, leaves, weakref.ref(output), output._version), output)

    def follow(self, func: Callable, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Runs after a function that is no layer."""
        if func in SIZES or (getattr(func, "__name__", "") == "__get__" and not isinstance(result, Tensor)):
            return
        if func in GATED and isinstance(result, Tensor):
            places = 2 if func in ARITHMETIC | STEPS else 1
            if places == 2:  # an element that is broadcast has several derivatives
                self._end([arg for arg in args[:2] if isinstance(arg, Tensor) and arg.shape != result.shape])
            self._go_on(lambda *own: func(*own, **kwargs), args, result, places, func in STEPS)
            self._end([*args[places:], *kwargs.values()])
        else:
            self._end([*args, *kwargs.values()])

    def follow_call(self, call: Call, result: Tensor) -> None:
        """Runs after a layer: batch normalisation by running statistics is elementwise, too."""
        if isinstance(call, NormCall) and call.elementwise:
            self._go_on(call.forward, call.inputs, result, 1)
        else:
            self._end(call.given)

    def _add(self, path: _Path, tensor: Tensor) -> _Path:
        self._paths.setdefault(id(tensor), []).append(path)
        return path

    def _at(self, value: Any) -> list[_Path]:
        """The paths that end at a tensor, or ended there before a function wrote into it."""
        paths = [path for path in self._paths.get(id(value), ()) if path.tensor() is value]
        return [path for path in paths if path.version == max(each.version for each in paths)]

    def _end(self, given: Iterable[Any]) -> None:
        if self._with_support:
            self._read += (path for tensor in flat(given) for path in self._at(tensor))

    def _go_on(self, func: Callable, args: tuple, result: Tensor, places: int, step: bool = False) -> None:
        """`places`: the arguments, from the first on, that the derivative is taken in."""
        for place, arg in enumerate(args[:places]):
            for path in self._at(arg):
                if path.length == MOST_FUNCTIONS or step:
                    self._read.append(path)  # a step lets noise through everywhere, if seldom
                if path.length == MOST_FUNCTIONS:
                    continue
                # A copy, because the function may write in place.
                others = [other.detach() if isinstance(other, Tensor) else other for other in args]
                with torch.enable_grad():
                    own = [[v.clone() if i == place else other for i, other in enumerate(others)] for v in path.values]
                    if step:
                        values = tuple(torch.special.ndtr((each[0] - each[1]) / path.sigma) for each in own)
                    else:
                        values = tuple(func(*each) for each in own)
                further = path._replace(
                    values=values, tensor=weakref.ref(result), version=result._version, length=path.length + 1
                )
                if self._lasts[path.name] is path:
                    self._lasts[path.name] = further
                self._add(further, result)

    def found(self) -> dict[Any, Gate]:
        """The gate of each output. The forward has returned and its outputs are still held, as a tensor that is alive
        may be read by whatever keeps it."""
        held = [tensor for paths in self._paths.values() for path in paths if (tensor := path.tensor()) is not None]
        read = [*self._read, *(path for tensor in {id(t): t for t in held}.values() for path in self._at(tensor))]
        supports: dict[Any, Tensor | None] = {}
        for path in read if self._with_support else ():
            own, before = path.support(), supports.get(path.name, False)
            supports[path.name] = None if own is None or before is None else own | before
        return {name: Gate(path.derivative(), supports.get(name)) for name, path in self._lasts.items()}
