"""How the estimator meets a model's layers: a mode that sees each torch function as the model's forward calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from ulr_kernels.estimators.batch import tensors
from ulr_kernels.nn import COMPOSITES, LOOPS, READERS
from ulr_kernels.nn.call import Call, Owned
from ulr_kernels.nn.local import ELEMENTWISE, EXPANDS, LIKES, LocalCall, RowsCall

SAMPLE, NOISED = 1, 2  # what a tensor depends on: the batch, and some layer's noise


class Meeting(TorchFunctionMode):
    """Base of the modes: sorts tensors by what they depend on, and hands calls of layers to `met`.

    A tensor depends on samples (it comes from the batch), on parameters alone (`Owned`), or is a constant. A function
    of parameters and constants runs with autograd's graph, which is what later takes a gradient back to the parameters.
    One that brings samples and parameters together is a call of a layer.

    Args:
        layers: id(parameter) -> the name of its layer.
        parameters: the model's.
        inputs: the model's input.
    """

    def __init__(self, layers: Mapping[int, str], parameters: Iterable[Tensor], inputs: Any) -> None:
        super().__init__()
        self._layers = layers
        self._owned = {id(p): Owned(p, (p,)) for p in parameters}  # keeps what was computed from them alive
        self._marks: dict[int, int] = {}  # by storage, so that views and writes in place are seen
        self._mark(inputs, SAMPLE)

    def origin(self, value: Any) -> Owned | None:
        """What a tensor owes to parameters alone."""
        return self._owned.get(id(value))

    def marks(self, tensor: Tensor) -> int:
        return self._marks.get(_storage(tensor), 0)

    def trained_layer(self, call: Call) -> str | None:
        """The name of a call's layer, if any parameter of the call is trained."""
        if not any(p.requires_grad for p in call.parameters):
            return None
        return self._layers[id(call.parameters[0])]

    def noises_outputs(self, given: list[Tensor]) -> bool:
        """Whether a function of these has a layer inside that may have noise on its output."""
        return any(t.requires_grad for t in given if self.origin(t) is not None)

    def met(self, call: Call) -> tuple[Any, int]:
        """A call of a layer: its result, and the marks that this gets beside those of the arguments."""
        raise NotImplementedError

    def other(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        """Any function, before it is called."""

    def after(self, func: Callable, args: tuple, kwargs: dict[str, Any], marks: list, result: Any) -> None:
        """A function that is no layer has been called; `marks` has the tensors that it read."""

    def recalled(self, bits: int) -> tuple[Any, int] | None:
        """The result and marks of a function with these marks, if it need not run."""
        return None

    def returned(self, result: Any, bits: int) -> None:
        """What a function with marks has returned, and its marks."""

    def prepare(
        self, func: Callable, args: tuple, kwargs: dict[str, Any], marks: list[tuple[Tensor, int]]
    ) -> tuple[tuple, dict[str, Any]]:
        """The arguments that a function of samples is called with."""
        return args, kwargs

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.other(func, args, kwargs)
        owned, marks, bits = self._sort(args, kwargs)
        if owned and not bits & SAMPLE:
            return self._of_parameters(func, args, kwargs, owned)
        if owned and (result := self._shown(func, args, kwargs)) is not NotImplemented:
            return result
        if rowed := self._rowed(func, owned, marks):
            return self._with_rows(func, types, args, kwargs, rowed)
        if (known := self.recalled(bits)) is not None:
            self._mark(*known)
            return known[0]
        if bits & NOISED:
            args, kwargs = self.prepare(func, args, kwargs, marks)
        call = self._read(func, args, kwargs, owned) if owned else None
        if call is None:
            result = func(*args, **kwargs)
            self.after(func, args, kwargs, marks, result)
        else:
            result, more = self.met(call)
            bits |= more
        self._mark(args[0] if func is Tensor.__setitem__ else result, bits)
        self.returned(result, bits)
        return result

    def _shown(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The result of a function that hides layers, by the form that shows them; NotImplemented if it is none."""
        if func not in COMPOSITES or (func in LOOPS and not self.noises_outputs(flat(args))):
            return NotImplemented
        with self:
            return COMPOSITES[func](*args, **kwargs)

    def _sort(self, args: tuple, kwargs: dict[str, Any]) -> tuple[list[Owned], list[tuple[Tensor, int]], int]:
        """The tensors among the arguments: those owed to parameters alone; the others with their marks; all marks."""
        owned, marks, bits = [], [], 0
        for tensor in flat(args) + flat(kwargs.values()):
            each = self._owned.get(id(tensor))
            if each is not None:
                owned.append(each)
            elif of_tensor := self.marks(tensor):
                marks.append((tensor, of_tensor))
                bits |= of_tensor
        return owned, marks, bits

    def _of_parameters(self, func: Callable, args: tuple, kwargs: dict[str, Any], owned: list[Owned]) -> Any:
        with torch.enable_grad():
            result = func(*args, **kwargs)
        parameters = tuple({id(p): p for each in owned for p in each.parameters}.values())
        for tensor in flat((result,)):
            if tensor.requires_grad and id(tensor) not in self._owned:
                rows = any(_has_rows(func, each, tensor) for each in owned)
                self._owned[id(tensor)] = Owned(tensor, parameters, rows)
        self._mark(result, 0)
        return result

    def _rowed(self, func: Callable, owned: list[Owned], marks: list[tuple[Tensor, int]]) -> list[Owned]:
        """The arguments that are computed from parameters and have a row for each sample."""
        found = []
        for each in owned:
            if each.tensor.is_leaf or not each.tensor.dim():
                continue
            like = next((t for t, _ in marks if t.dim() and t.shape[0] == each.tensor.shape[0] > 1), None)
            aligned = func in ELEMENTWISE and each.tensor.dim() > 1
            if like is not None and (aligned and like.dim() == each.tensor.dim() or each.rows and not aligned):
                found.append(each)
        return found

    def _with_rows(self, func: Callable, types: Any, args: tuple, kwargs: dict[str, Any], rowed: list[Owned]) -> Any:
        """The function, of the rows that calls of their own have made."""
        made = {}
        for each in rowed:
            rows, more = self.met(RowsCall(each))
            self._mark(rows, SAMPLE | more)
            made[id(each.tensor)] = rows
        args, kwargs = _pytree.tree_map(lambda leaf: made.get(id(leaf), leaf), (args, kwargs))
        return self.__torch_function__(func, types, args, kwargs)

    def _read(self, func: Callable, args: tuple, kwargs: dict[str, Any], owned: list[Owned]) -> Call | None:
        reader = READERS.get(func)
        call = reader(args, kwargs, self.origin) if reader is not None else None
        if call is None and func not in LIKES and any(each.tensor.requires_grad for each in owned):
            samples = {id(t): t for t in flat(args) + flat(kwargs.values()) if self.marks(t) & SAMPLE}
            call = LocalCall(func, args, kwargs, list(samples.values()), owned)
        return call

    def _mark(self, value: Any, bits: int) -> None:
        """Note what tensors depend on; memory that is used again gets the marks of what it now holds."""
        for tensor in (value,) if isinstance(value, Tensor) else tensors(value):
            if bits:
                self._marks[_storage(tensor)] = bits
            elif self._marks:
                self._marks.pop(_storage(tensor), None)


def flat(values: Iterable) -> list[Tensor]:
    """The tensors in arguments; quicker than a tree of any depth."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += flat(value)
    return found


def _storage(tensor: Tensor) -> int:
    """The address of a tensor's memory, or where it has none its own, as empty tensors all share address 0."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError):  # tensors without one: inside vmap, sparse
        return id(tensor)


def _has_rows(func: Callable, owned: Owned, result: Tensor) -> bool:
    """Whether a result has a row for each sample, as far as shapes can tell."""
    given = owned.tensor
    if not result.dim():
        return False
    if func in EXPANDS and (given.dim() < result.dim() or given.shape[0] == 1 < result.shape[0]):
        return True
    return owned.rows and given.shape[0] == result.shape[0]
