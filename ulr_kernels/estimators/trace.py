"""A watched forward without noise: the layers that a model calls, and whether they can be trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ulr_kernels.errors import fail
from ulr_kernels.estimators.record import Record
from ulr_kernels.estimators.residual_sums import ResidualSums
from ulr_kernels.estimators.view import ModelView
from ulr_kernels.nn.batch import Batch, tensors
from ulr_kernels.nn.call import Call, DerivedParameter, leaves_of
from ulr_kernels.nn.carried_state import refuse_state
from ulr_kernels.nn.generic import SUMS, AutogradCall
from ulr_kernels.nn.interceptor import LayerInterceptor
from ulr_kernels.nn.module_state import ModuleState
from ulr_kernels.nn.perturbed import in_forward_mode, reads_only_metadata

DERIVATIVES = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}


class Outline(NamedTuple):
    """The result of a trace, without tensors."""

    calls: Mapping[str, int]  # the trained layers in the order of their first call, and the number of calls of each
    shared_noise: Mapping[str, str]  # layer -> the layer whose noise it has (`residual_sums.py`)
    functions: frozenset[Callable]  # the functions of samples that the forward called
    noise_rows: Mapping[str, list[int]]  # layer -> the rows of noise that a sample has in each of its calls
    columns: Mapping[str, set[int]]  # layer -> the numbers of features that outputs of its calls have
    sizes: list[int]  # bytes that each function's result has for one sample, in their order
    begins: Mapping[str, int]  # layer -> the place of its first call among them
    hidden: bool = False  # some functions are hidden, so that noise enters tensors which do not show it

    @property
    def form(self) -> tuple:
        """The part that forwards have in common which differ in the sizes of their tensors alone."""
        layers = tuple((layer, count > 1) for layer, count in self.calls.items())
        return layers, self.shared_noise, self.functions


class ModelTrace(LayerInterceptor):
    """Watches a forward of two copies of a batch without noise; the second has its samples in another order
    (`two_copies`), so that a result which is not made of samples row by row differs.

    Attributes:
        record: of this forward.
        notes: sentences on what the gradient leaves out.
        covered: ids of the parameters that get a gradient from the calls.
        unsupported_uses: id(parameter) -> a function that uses it in a way that has no gradient.

    Raises:
        RuleError: (from the forward) rows are not samples, or a function normalises over the batch.
    """

    def __init__(self, view: ModelView, inputs: Any, samples: int, state: ModuleState) -> None:
        super().__init__(view.layers, view.parameters, inputs)
        self._view, self._state = view, state
        self._noised = {id(p) for p in view.noised.values()}  # have noise themselves: no layers of the trace
        self._samples = samples
        self.record = Record(2 * samples)
        self.notes: list[str] = []
        self.covered: set[int] = set()
        self.unsupported_uses: dict[int, str] = {}
        self._calls: list[Call] = []
        self._counts: dict[str, int] = {}
        self._sizes: list[int] = []
        self._begins: dict[str, int] = {}
        self._columns: dict[str, set[int]] = {}
        self._rows: dict[str, list[int]] = {}
        self._functions: set[Callable] = set()
        self._read_by: dict[int, str] = {}  # id(parameter) -> a function that has read it
        self._sums = ResidualSums()

    def outline(self) -> Outline:
        """The result of the forward."""
        shared_noise = self._sums.shared_noise(self._counts)
        functions = frozenset(self._functions)
        return Outline(self._counts, shared_noise, functions, self._rows, self._columns, self._sizes, self._begins)

    @torch.no_grad()
    def on_layer_call(self, call: Call) -> tuple[Any, int]:
        layer = self.trained_layer(call)
        if layer is None:
            with torch.set_grad_enabled(any(x.requires_grad for x in call.given)):
                return call.clean(), 0
        if any(x.requires_grad for x in call.given):
            self._refuse_derivative("requires_grad_() on tensors of samples")
        if in_forward_mode():
            self._refuse_derivative("forward-mode derivatives")
        if torch._C._are_functorch_transforms_active():
            self.unsupported_uses.update((id(p), "a function inside torch.func or vmap") for p in call.parameters)
            return call.clean(), 0
        if call.generic and (use := self._unsupported(cast(AutogradCall, call), layer)) is not None:
            self.unsupported_uses.update((id(p), use) for p in call.parameters if p.requires_grad)
            return call.clean(), 0
        self._check_inputs(call, layer)
        self._counts[layer] = self._counts.get(layer, 0) + 1
        self._calls.append(call)
        self.covered.update(map(id, call.parameters))
        for each in call.derived:
            self._note_zeros(each)
        terms = self._sums.read(list(call.given))
        result = call.clean()
        self._begins.setdefault(layer, len(self._sizes))
        self._note_size(result)
        self._sums.output(result, layer, call.feature_dim)
        columns = result.shape[call.feature_dim] if result.dim() > 1 else 1
        self._rows.setdefault(layer, []).append(result.numel() // (2 * self._samples * max(1, columns)))
        if result.dim() > 1:
            self._columns.setdefault(layer, set()).add(columns)
        if call.additive and terms:
            (own,) = self._sums.read([result])
            self._sums.add(terms[0], own, result)
        return result, 0

    def trained_layer(self, call: Call) -> str | None:
        """The name by the call's first parameter that has no noise itself, if any such is trained."""
        own = [p for p in call.parameters if id(p) not in self._noised]
        return self._layers[id(own[0])] if any(p.requires_grad for p in own) else None

    def _note_zeros(self, derived: DerivedParameter) -> None:
        """Say so where a tensor that is computed from parameters has a derivative of 0 in them, as signs have."""
        trained = [p for p in derived.parameters if p.requires_grad]
        if derived.tensor.is_leaf or not derived.tensor.requires_grad:
            return
        places = torch.arange(derived.tensor.numel(), device=derived.tensor.device)
        direction = torch.cos(places).view_as(derived.tensor).to(derived.tensor.dtype)  # no sum, which may be constant
        found = torch.autograd.grad(derived.tensor, trained, direction, retain_graph=True, allow_unused=True)
        if not any(gradient is not None and gradient.any() for gradient in found):
            names = ", ".join(self._view.names[id(p)] for p in trained)
            self.notes.append(
                f"the derivative of {type(derived.tensor.grad_fn).__name__} in {names} is 0: nothing trains it so, but "
                f"noise on the weights does: noise={{{self._view.layers[id(trained[0])]!r}: 'weights'}}"
            )

    def _unsupported(self, call: AutogradCall, layer: str) -> str | None:
        """The use that a call which no layer type reads makes of its parameters, if this has no gradient."""
        result = call.differentiable()
        if result is None:
            return call.name
        self._check_rows(result, f"the output of {call.name} in layer {layer!r}")
        self._check_inputs(call, layer)
        return None if _by_copy(call) else f"{call.name}, not sample by sample"

    def _check_inputs(self, call: Call, layer: str) -> None:
        for x in call.inputs:
            self._check_rows(x, f"the input of layer {layer!r}")

    def _note_size(self, result: Any) -> None:
        self._sizes.append(sum(t.numel() * t.element_size() for t in tensors(result)) // (2 * self._samples))

    def _check_rows(self, x: Tensor, what: str) -> None:
        if self._has_time_first(x):
            rows = 2 * self._samples
            got = f"not a multiple of {rows} for" if x.shape[0] % rows else "different values in"
            fail(
                what,
                "have the samples on its first axis, each made from its own sample only, and time steps after them: "
                "[samples * steps, ...]; or loop over the steps around the layers (spikingjelly: "
                "functional.set_step_mode(model, 's') and `for t in range(T)`)",
                f"{got} two copies of the batch, and time first, {list(x.shape)}",
            )
        if not x.dim() or x.shape[0] % (2 * self._samples):
            fail(
                what,
                f"have samples on its first axis: a multiple of {2 * self._samples} for two copies of the batch",
                list(x.shape),
            )
        first, second = x.unflatten(0, (2, self._samples, -1))
        if not same(first, second.roll(-1, 0)):
            fail_rows(what)

    def _has_time_first(self, x: Tensor) -> bool:
        """Whether the rows of two copies are `[steps, copies * samples, ...]`, and cannot have samples first."""
        rows = 2 * self._samples
        if x.dim() > 1 and x.shape[0] % rows and x.shape[1] == rows:
            return same(*self._copies_of_steps(x))
        if not x.dim() or x.shape[0] % rows or x.shape[0] == rows:
            return False
        first, second = x.unflatten(0, (2, self._samples, -1))
        return not same(first, second.roll(-1, 0)) and same(*self._copies_of_steps(x.unflatten(0, (-1, rows))))

    def _copies_of_steps(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.unflatten(1, (2, self._samples)).unbind(1)
        return first, second.roll(-1, 1)

    def before_call(self, func: Callable, args: tuple, kwargs: dict[str, Any], bits: int) -> None:
        if func is F.batch_norm and bits and kwargs["training"]:  # in eval mode: there are no running statistics
            fail(
                "model", "normalise by running statistics (noise would enter those of the batch)", "batch_norm without"
            )
        if func in DERIVATIVES and bits and self.covered:
            self._refuse_derivative(func.__name__)

    @staticmethod
    def _refuse_derivative(how: str) -> NoReturn:
        fail(
            "noise",
            "be 'weights' for a model that differentiates inside its forward: that derivative has the weights, but not "
            "the noise on a layer's outputs",
            f"'outputs', with {how}",
        )

    def noises_outputs(self, given: list[Tensor]) -> bool:
        return super().noises_outputs([t for t in given if id(t) not in self._noised])

    def on_parameters(self, func: Callable, derived: list[DerivedParameter], result: Any) -> None:
        name = getattr(func, "__name__", str(func))
        names = {self._view.names[id(p)]: p for each in derived for p in each.parameters if p.requires_grad}
        self._read_by.update((id(p), name) for p in names.values())
        if any(id(p) not in self._noised for each in derived for p in each.parameters):
            for tensor in tensors(result):
                self.record.add_constant(f"{name} of {', '.join(names)}", tensor)
        if (
            names
            and isinstance(result, float | int | list)
            and not (isinstance(result, bool) or reads_only_metadata(func))
        ):
            self.notes.append(
                f"{name} reads numbers of {', '.join(names)}: they are constants in the gradient, as for autograd"
            )

    def unseen(self, tensor: Tensor) -> None:
        if self._state.holds(tensor):
            refuse_state(f"one of {list(tensor.shape)} with autograd's graph from an earlier forward")
        trained = {id(p): p for p in self._view.parameters if p.requires_grad}
        if found := [trained[id(leaf)] for leaf in leaves_of(tensor) if id(leaf) in trained]:
            fail(
                "model",
                "use its trained parameters in torch functions of the thread that runs the forward (torch.jit, "
                "torch.func with vmap, and other threads hide what they do: use a Python module, a loop, one thread; a "
                "tensor from an earlier forward must be detached)",
                f"a result of {type(tensor.grad_fn).__name__} with {', '.join(self._view.names[id(p)] for p in found)}",
            )

    def after_call(self, func: Callable, args: tuple, kwargs: dict[str, Any], marks: list, result: Any) -> None:
        given = [tensor for tensor, _ in marks]
        if given:
            self._note_size(result)
            self._functions.add(func)
        if reads_only_metadata(func) or self._sums.returned_unchanged(result, given):
            return
        terms = self._sums.read(given)
        if len(terms) == 2 == len(args) and func in SUMS and not kwargs:
            first, second = terms
            self._sums.add(first, second, result)

    def check(self, direct: set[int]) -> None:
        """Raise if an input was changed in place, or a trained parameter gets no gradient, or not all of it.

        `direct`: ids of the parameters that the loss depends on past all calls.
        """
        for call in self._calls:
            call.check_unchanged()
        self._calls.clear()
        problems = []
        for parameter in self._view.followed:
            name = self._view.names[id(parameter)]
            if not parameter.requires_grad:
                continue
            if id(parameter) in self.unsupported_uses:
                problems.append(f"{name} (used by {self.unsupported_uses[id(parameter)]})")
            elif id(parameter) not in self.covered | direct and parameter.numel():
                problems.append(f"{name} ({self._why(name, parameter)})")
        if problems:
            fail(
                "model",
                "bring each trained parameter together with the samples in a function with one output, samples first, "
                "each from its own alone, and a derivative in the parameter. Those that it does not can be frozen "
                "(requires_grad_(False)), or trained by noise on the weights (noise={name: 'weights'}, ulr.optim), or "
                "left out of the model",
                ", ".join(problems),
            )

    def _why(self, name: str, parameter: Tensor) -> str:
        """Why a parameter gets no gradient."""
        if id(parameter) in self._read_by:
            return f"read by {self._read_by[id(parameter)]}, whose result no function of the samples reads"
        path = name.rpartition(".")[0]
        while path and not isinstance(self._view.model.get_submodule(path), torch.jit.ScriptModule):
            path = path.rpartition(".")[0]
        if path or isinstance(self._view.model, torch.jit.ScriptModule):
            return f"inside the torch.jit module {path!r}, which hides its functions: use the Python module"
        return "read by no function of the forward, unless in another thread or in torch.func, which hide it"


def two_copies(batch: Batch) -> Batch:
    """A batch of its samples twice, the second time from the last sample on."""
    order = torch.arange(batch.samples, device="cpu")
    return batch.part(torch.cat([order, order.roll(1)]), 0)


def _by_copy(call: AutogradCall) -> bool:
    """Whether a call makes the first of two copies from that copy alone, as a gradient of one copy requires. It does
    not where a constant among its arguments has a row for each sample.
    """
    result = call.forward(*call.inputs)
    try:
        first = call.forward(*(x[: x.shape[0] // 2] for x in call.inputs))
    except (RuntimeError, ValueError, TypeError, IndexError):  # rows that do not fit
        return False
    half = result[: result.shape[0] // 2]
    return first.shape == half.shape and same(half, first)


def same(first: Tensor, second: Tensor, scale: Tensor | None = None) -> bool:
    """Whether two copies are equal but for rounding, which may flip a threshold here and there.

    The limit is 5 % of the norm of `scale` (of `first` if None).
    """
    first, second = (torch.nan_to_num(t.to(torch.float32)) for t in (first, second))
    limit = 0.05 * (first if scale is None else torch.nan_to_num(scale.to(torch.float32))).norm() + 1e-5 * first.norm()
    return bool((first - second).norm() <= limit)


def fail_rows(what: str) -> None:
    """Raise `RuleError`: two copies of a batch differ."""
    fail(
        what,
        "have the samples on its first axis, in order, each made from its own sample only and without random numbers",
        "different values in two copies of the same batch",
    )
