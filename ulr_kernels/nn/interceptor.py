"""Interception of a model's layers: a mode that sees each torch function as the model's forward calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from ulr_kernels.nn import COMPOSITES, READERS, RECURRENT_FUNCTIONS
from ulr_kernels.nn.autograd_function import AutogradFunction, overridable_autograd_functions
from ulr_kernels.nn.batch import ModelInput, apply, tensors
from ulr_kernels.nn.call import Call, DerivedParameter
from ulr_kernels.nn.generic import (
    BACKWARD_HOOKS,
    ELEMENTWISE,
    EXPAND_FUNCTIONS,
    METADATA_FUNCTIONS,
    AutogradCall,
    RowsCall,
    ignored_hook,
)
from ulr_kernels.nn.marks import NOISED, SAMPLE, Marked, flat
from ulr_kernels.nn.module_state import ModuleState


class LayerInterceptor(Marked, TorchFunctionMode):
    """Base of the modes that watch a forward: it sorts tensors by what they depend on, and finds the calls of layers.

    A tensor depends on samples (it comes from the batch), on parameters alone (`DerivedParameter`), or is a constant.
    A function of parameters and constants runs with autograd's graph, which later takes a gradient back to the
    parameters. A function that brings samples and parameters together is a call of a layer: `on_layer_call` runs it,
    and its result has no graph. So a tensor with a graph depends on parameters alone, or comes from a function that
    this mode does not see (`unseen`).
    A subclass may override this and the other hooks, down to `expand_copies`.

    Args:
        layers: id(parameter) -> the name of its layer.
        parameters: the model's.
        inputs: the model's input.
    """

    keeps_graphs = False  # of functions of samples, for a subclass that differentiates the whole forward

    def __init__(self, layers: Mapping[int, str], parameters: Iterable[Tensor], inputs: Any) -> None:
        super().__init__()
        self._layers = layers
        self._derived = {id(p): DerivedParameter(p, (p,)) for p in parameters}  # keeps alive what is computed from them
        self._marks = {}
        self._mark(inputs.tensors if isinstance(inputs, ModelInput) else inputs, SAMPLE)

    def run(self, model: nn.Module, inputs: Any, state: ModuleState) -> Any:
        """The model's output, with this mode and autograd's graphs on; `state`: of its modules, which they begin with.

        What this forward leaves on modules stays there, so that a loss can read it.
        """
        state.restore()
        state.drop_caches()
        with torch.enable_grad(), overridable_autograd_functions(), self:
            state.fill_caches()
            return apply(model, inputs)

    def parameters_of(self, value: Any) -> DerivedParameter | None:
        """The parameters that a tensor was computed from, if no sample was involved."""
        return self._derived.get(id(value))

    def trained_layer(self, call: Call) -> str | None:
        """The name of a call's layer, if any parameter of the call is trained."""
        if not any(p.requires_grad for p in call.parameters):
            return None
        return self._layers[id(call.parameters[0])]

    # --- hooks -------------------------------------------------------------------------------------------------------

    def on_layer_call(self, call: Call) -> tuple[Any, int]:
        """Run a call of a layer: returns its result, and the marks that this gets beside those of the arguments."""
        raise NotImplementedError

    def noises_outputs(self, given: list[Tensor]) -> bool:
        """Whether a function of these tensors contains a layer that may have noise on its output."""
        return any(t.requires_grad for t in given if self.parameters_of(t) is not None)

    def unseen(self, tensor: Tensor) -> None:
        """Runs for a tensor with autograd's graph that no function of this mode returned."""

    def on_parameters(self, func: Callable, derived: list[DerivedParameter], result: Any) -> None:
        """Runs after a function of parameters and constants alone."""

    def before_call(self, func: Callable, args: tuple, kwargs: dict[str, Any], bits: int) -> None:
        """Runs before any function is called; `bits`: the marks of the tensors that it reads."""

    def after_call(self, func: Callable, args: tuple, kwargs: dict[str, Any], marks: list, result: Any) -> None:
        """Runs after a function that is no layer; `marks` has the tensors that it read, with their marks."""

    def cached_result(self, func: Callable, bits: int) -> tuple[Any, int] | None:
        """The result and marks of a function with these marks, if it need not run."""
        return None

    def cache_result(self, func: Callable, result: Any, bits: int) -> None:
        """Runs after a function has returned a result with these marks."""

    def expand_copies(
        self, func: Callable, args: tuple, kwargs: dict[str, Any], marks: list[tuple[Tensor, int]]
    ) -> tuple[tuple, dict[str, Any]]:
        """The arguments to call a function of noised tensors with."""
        return args, kwargs

    # --- a call ------------------------------------------------------------------------------------------------------

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in BACKWARD_HOOKS and not args[0].requires_grad:
            return ignored_hook(func)
        derived, marks, bits = self._sort(args, kwargs)
        if any(each.stopped for each in derived) and torch.is_grad_enabled():
            # What was computed under no_grad is a constant outside of that, as for autograd.
            args, kwargs = _with_constants(args, kwargs, [each.tensor for each in derived if each.stopped])
            derived = [each for each in derived if not each.stopped]
        self.before_call(func, args, kwargs, bits)
        if derived and not bits & SAMPLE:
            return self._call_of_parameters(func, args, kwargs, derived)
        if isinstance(func, AutogradFunction) and not derived:
            return self._call_from_inside(func, args, kwargs, bits)
        if derived and (result := self._call_composite(func, args, kwargs)) is not NotImplemented:
            return result
        if with_rows := self._with_sample_rows(func, derived, marks):
            return self._call_with_rows(func, types, args, kwargs, with_rows)
        shaped = args[0] if func in METADATA_FUNCTIONS and self.parameters_of(args[0]) is None else None
        if shaped is not None and not bits & NOISED:
            bits = self.marks(shaped)  # the values of the others do not enter
        if (cached := self.cached_result(func, bits)) is not None:
            self._mark(*cached)
            return cached[0]
        if bits & NOISED:
            args, kwargs = self.expand_copies(func, args, kwargs, marks)
            if shaped is not None and shaped is args[0]:
                bits = self.marks(shaped)
        call = self._read(func, args, kwargs, derived) if derived else None
        if call is None:
            hides = torch._C._are_functorch_transforms_active()  # parameters, which a graph will show
            if marks and not (self.keeps_graphs or hides) and not any(t.requires_grad for t, _ in marks):
                with torch.no_grad():  # no graph from parameters that this mode does not follow
                    result = func(*args, **kwargs)
            else:
                result = func(*args, **kwargs)
            self.after_call(func, args, kwargs, marks, result)
        else:
            result, more = self.on_layer_call(call)
            bits |= more
        self._mark(args[0] if func is Tensor.__setitem__ else result, bits)
        self.cache_result(func, result, bits)
        return result

    def _call_composite(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The result of a function that hides layers, by the form that shows them; NotImplemented if it hides none."""
        if func not in COMPOSITES or (func in RECURRENT_FUNCTIONS and not self.noises_outputs(flat(args))):
            return NotImplemented
        with self:
            return COMPOSITES[func](*args, **kwargs)

    def _call_from_inside(self, func: AutogradFunction, args: tuple, kwargs: dict[str, Any], bits: int) -> Any:
        """A custom function without parameters among its arguments; its forward may call layers."""
        with self:
            result = func.apply(*args, **kwargs)
        for tensor in tensors(result):
            self._mark(tensor, bits | self.marks(tensor))
        return result

    def _sort(
        self, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[list[DerivedParameter], list[tuple[Tensor, int]], int]:
        """The tensors among the arguments: those of parameters alone; the others with their marks; all marks."""
        derived, marks, bits = [], [], 0
        for tensor in flat(args) + flat(kwargs.values()):
            each = self._derived.get(id(tensor))
            if each is not None:
                derived.append(each)
            elif of_tensor := self.marks(tensor):
                marks.append((tensor, of_tensor))
                bits |= of_tensor
            elif tensor.requires_grad:
                self.unseen(tensor)
        return derived, marks, bits

    def _call_of_parameters(
        self, func: Callable, args: tuple, kwargs: dict[str, Any], derived: list[DerivedParameter]
    ) -> Any:
        stopped = not torch.is_grad_enabled()
        own = {id(each.tensor) for each in derived}
        if others := [t for t in flat(args) + flat(kwargs.values()) if t.requires_grad and id(t) not in own]:
            args, kwargs = _with_constants(args, kwargs, others)  # of parameters that this mode does not follow
        with torch.enable_grad():
            result = func(*args, **kwargs)
        parameters = tuple({id(p): p for each in derived for p in each.parameters}.values())
        for tensor in flat((result, *args, *kwargs.values())):  # an argument may have been written in place
            if tensor.requires_grad and id(tensor) not in self._derived:
                rows = any(_has_rows(func, each, tensor) for each in derived)
                self._derived[id(tensor)] = DerivedParameter(tensor, parameters, rows, stopped)
        self._mark(result, 0)
        self.on_parameters(func, derived, result)
        return result

    def _with_sample_rows(
        self, func: Callable, derived: list[DerivedParameter], marks: list[tuple[Tensor, int]]
    ) -> list[DerivedParameter]:
        """The arguments that are computed from parameters and have a row for each sample."""
        found = []
        for each in derived:
            if each.tensor.is_leaf or not each.tensor.dim():
                continue
            like = next((t for t, _ in marks if t.dim() and t.shape[0] == each.tensor.shape[0] > 1), None)
            aligned = func in ELEMENTWISE and each.tensor.dim() > 1
            if like is not None and (aligned and like.dim() == each.tensor.dim() or each.rows and not aligned):
                found.append(each)
        return found

    def _call_with_rows(
        self, func: Callable, types: Any, args: tuple, kwargs: dict[str, Any], with_rows: list[DerivedParameter]
    ) -> Any:
        """The function, of rows that calls of their own have returned."""
        found = {}
        for each in with_rows:
            rows, more = self.on_layer_call(RowsCall(each))
            self._mark(rows, SAMPLE | more)
            found[id(each.tensor)] = rows
        args, kwargs = _pytree.tree_map(lambda leaf: found.get(id(leaf), leaf), (args, kwargs))
        return self.__torch_function__(func, types, args, kwargs)

    def _read(
        self, func: Callable, args: tuple, kwargs: dict[str, Any], derived: list[DerivedParameter]
    ) -> Call | None:
        reader = READERS.get(func)
        call = reader(args, kwargs, self.parameters_of) if reader is not None else None
        if call is None and func not in METADATA_FUNCTIONS and any(each.tensor.requires_grad for each in derived):
            samples = {id(t): t for t in flat(args) + flat(kwargs.values()) if self.marks(t) & SAMPLE}
            call = AutogradCall(func, args, kwargs, list(samples.values()), derived)
        return call


def _with_constants(args: tuple, kwargs: dict[str, Any], given: Iterable[Tensor]) -> tuple[tuple, dict[str, Any]]:
    """Arguments in which some tensors have no graph."""
    constants = {id(tensor): tensor.detach() for tensor in given}
    return _pytree.tree_map(lambda leaf: constants.get(id(leaf), leaf), (args, kwargs))


def _has_rows(func: Callable, derived: DerivedParameter, result: Tensor) -> bool:
    """Whether a result has a row for each sample, as far as shapes can tell."""
    given = derived.tensor
    if not result.dim():
        return False
    if func in EXPAND_FUNCTIONS and (given.dim() < result.dim() or given.shape[0] == 1 < result.shape[0]):
        return True
    return derived.rows and given.shape[0] == result.shape[0]
