"""A watched forward without noise: the layers that a model calls, and whether they can be trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ulr_kernels.errors import fail
from ulr_kernels.estimators.residual_sums import ResidualSums
from ulr_kernels.estimators.view import ModelView
from ulr_kernels.nn.batch import tensors
from ulr_kernels.nn.call import Call
from ulr_kernels.nn.generic import SUMS, AutogradCall
from ulr_kernels.nn.interceptor import LayerInterceptor


class Outline(NamedTuple):
    """The result of a trace, without tensors."""

    calls: Mapping[str, int]  # the trained layers in the order of their first call, and the number of calls of each
    shared_noise: Mapping[str, str]  # layer -> the layer whose noise it has (`residual_sums.py`)
    functions: frozenset[Callable]  # the functions of samples that the forward called
    noise_rows: Mapping[str, list[int]]  # layer -> the rows of noise that a sample has in each of its calls
    columns: Mapping[str, set[int]]  # layer -> the numbers of features that outputs of its calls have
    sizes: list[int]  # bytes that each function's result has for one sample, in their order
    begins: Mapping[str, int]  # layer -> the place of its first call among them

    @property
    def form(self) -> tuple:
        """The part that forwards have in common which differ in the sizes of their tensors alone."""
        layers = tuple((layer, count > 1) for layer, count in self.calls.items())
        return layers, self.shared_noise, self.functions


class ModelTrace(LayerInterceptor):
    """Watches a forward of two copies of a batch without noise.

    Attributes:
        covered: ids of the parameters that get a gradient from the calls.
        unsupported_uses: id(parameter) -> a function that uses it in a way that has no gradient.

    Raises:
        RuleError: (from the forward) rows are not samples, or a function normalises over the batch.
    """

    def __init__(self, view: ModelView, inputs: Any, samples: int) -> None:
        super().__init__(view.layers, view.followed, inputs)
        self._view = view
        self._samples = samples
        self.covered: set[int] = set()
        self.unsupported_uses: dict[int, str] = {}
        self._calls: list[Call] = []
        self._counts: dict[str, int] = {}
        self._sizes: list[int] = []
        self._begins: dict[str, int] = {}
        self._columns: dict[str, set[int]] = {}
        self._rows: dict[str, list[int]] = {}
        self._functions: set[Callable] = set()
        self._sums = ResidualSums()

    def outline(self) -> Outline:
        """The result of the forward."""
        shared_noise = self._sums.shared_noise(self._counts)
        functions = frozenset(self._functions)
        return Outline(self._counts, shared_noise, functions, self._rows, self._columns, self._sizes, self._begins)

    def on_layer_call(self, call: Call) -> tuple[Any, int]:
        layer = self.trained_layer(call)
        if layer is None:
            return call.clean(), 0
        if call.generic and (use := self._unsupported(cast(AutogradCall, call), layer)) is not None:
            self.unsupported_uses.update((id(p), use) for p in call.parameters if p.requires_grad)
            return call.clean(), 0
        self._check_inputs(call, layer)
        self._counts[layer] = self._counts.get(layer, 0) + 1
        self._calls.append(call)
        self.covered.update(map(id, call.parameters))
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

    def _unsupported(self, call: AutogradCall, layer: str) -> str | None:
        """The use that a call without a layer type makes of its parameters, if this has no gradient."""
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
        if not x.dim() or x.shape[0] % (2 * self._samples):
            fail(
                what,
                f"have samples on its first axis: a multiple of {2 * self._samples} for two copies of the batch",
                list(x.shape),
            )
        if not same(*x.unflatten(0, (2, -1))):
            fail_rows(what)

    def before_call(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        if func is F.batch_norm and kwargs["training"]:  # in eval mode: there are no running statistics
            fail(
                "model", "normalise by running statistics (noise would enter those of the batch)", "batch_norm without"
            )

    def after_call(self, func: Callable, args: tuple, kwargs: dict[str, Any], marks: list, result: Any) -> None:
        given = [tensor for tensor, _ in marks]
        if given:
            self._note_size(result)
            self._functions.add(func)
        if not tensors(result) or self._sums.passed_on(result, given):
            return
        terms = self._sums.read(given)
        if len(terms) == 2 == len(args) and func in SUMS and not kwargs:
            first, second = terms
            self._sums.add(first, second, result)

    def check(self) -> None:
        """Raise if an input was changed in place, or a trained parameter gets no gradient, or not all of it."""
        for call in self._calls:
            call.check_unchanged()
        problems = []
        for parameter in self._view.followed:
            name = self._view.names[id(parameter)]
            if not parameter.requires_grad:
                continue
            if id(parameter) in self.unsupported_uses:
                problems.append(f"{name} (used by {self.unsupported_uses[id(parameter)]})")
            elif id(parameter) not in self.covered:
                problems.append(f"{name} (met in no call)")
        if problems:
            fail(
                "model",
                "bring each trained parameter together with the samples in a function with one output, samples first, "
                "each from its own alone, and a derivative in the parameter. Those that it does not can be frozen "
                "(requires_grad_(False)), or trained by noise on the weights (noise={name: 'weights'}, ulr.optim), or "
                "left out of the model",
                ", ".join(problems),
            )


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
