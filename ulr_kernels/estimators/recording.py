"""What a model does with its parameters: a clean forward of two copies of a batch, watched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ulr_kernels.estimators.batch import tensors
from ulr_kernels.estimators.meeting import Meeting
from ulr_kernels.estimators.settings import fail
from ulr_kernels.estimators.sums import Sums
from ulr_kernels.nn.call import Call
from ulr_kernels.nn.local import SUMS, LocalCall


class Trace(NamedTuple):
    """What a forward has shown that a plan needs later.

    Attributes:
        outline: what it has in common with forwards that differ in the sizes of their tensors alone.
        sizes: bytes that each function's result has for one sample, in their order.
        begins: layer -> the place of its first call among them.
    """

    outline: tuple
    sizes: list[int]
    begins: dict[str, int]


class Recording(Meeting):
    """Watches a clean forward of two copies of a batch: which layers it calls, and whether they can be trained.

    Attributes:
        calls: the trained layers in the order of their first call, and how often each is called.
        met_calls: those calls.
        reached: ids of the parameters whose gradient the calls give.
        elsewhere: id(parameter) -> a function beside the layers' calls that uses it.
        sizes: bytes that each function's result has for one sample, in their order.
        begins: layer -> the place of its first call among them.
        columns: layer -> how many features the outputs of its calls have.
        rows: layer -> the rows of noise that a sample has in each of its calls.
        functions: those of samples that the forward called.
    """

    def __init__(self, layers: Mapping[int, str], parameters: Iterable[Tensor], inputs: Any, samples: int) -> None:
        super().__init__(layers, parameters, inputs)
        self._samples = samples
        self.calls: dict[str, int] = {}
        self.met_calls: list[Call] = []
        self.reached: set[int] = set()
        self.elsewhere: dict[int, str] = {}
        self.sizes: list[int] = []
        self.begins: dict[str, int] = {}
        self.columns: dict[str, set[int]] = {}
        self.rows: dict[str, list[int]] = {}
        self.functions: set[Callable] = set()
        self._sums = Sums()

    def met(self, call: Call) -> tuple[Any, int]:
        layer = self.trained_layer(call)
        if layer is None:
            return call.clean(), 0
        if isinstance(call, LocalCall):
            result = call.differentiable()
            if result is None:
                self.elsewhere.update((id(p), call.name) for p in call.parameters if p.requires_grad)
                return call.clean(), 0
            self._check_rows(result, f"the output of {call.name} in layer {layer!r}")
        for x in call.inputs:
            self._check_rows(x, f"the input of layer {layer!r}")
        if isinstance(call, LocalCall) and not _by_copy(call):
            use = f"{call.name}, not sample by sample"
            self.elsewhere.update((id(p), use) for p in call.parameters if p.requires_grad)
            return call.clean(), 0
        self.calls[layer] = self.calls.get(layer, 0) + 1
        self.met_calls.append(call)
        self.reached.update(map(id, call.parameters))
        terms = self._sums.read(list(call.given))
        result = call.clean()
        self.begins.setdefault(layer, len(self.sizes))
        self._note_size(result)
        self._sums.output(result, layer, call.feature_dim)
        columns = result.shape[call.feature_dim] if result.dim() > 1 else 1
        self.rows.setdefault(layer, []).append(result.numel() // (2 * self._samples * max(1, columns)))
        if result.dim() > 1:
            self.columns.setdefault(layer, set()).add(columns)
        if call.additive and terms:
            (own,) = self._sums.read([result])
            self._sums.add(terms[0], own, result)
        return result, 0

    def _note_size(self, result: Any) -> None:
        self.sizes.append(sum(t.numel() * t.element_size() for t in tensors(result)) // (2 * self._samples))

    def _check_rows(self, x: Tensor, what: str) -> None:
        if not x.dim() or x.shape[0] % (2 * self._samples):
            fail(
                what,
                f"have samples on its first axis: a multiple of {2 * self._samples} for two copies of the batch",
                list(x.shape),
            )
        if not same(*x.unflatten(0, (2, -1))):
            fail_rows(what)

    def after(self, func: Callable, args: tuple, kwargs: dict[str, Any], marks: list, result: Any) -> None:
        given = [tensor for tensor, _ in marks]
        if given:
            self._note_size(result)
            self.functions.add(func)
        if not tensors(result) or self._sums.passed_on(result, given):
            return
        terms = self._sums.read(given)
        if len(terms) == 2 == len(args) and func in SUMS and not kwargs:
            first, second = terms
            self._sums.add(first, second, result)

    def trace(self) -> Trace:
        """What a plan keeps."""
        layers = tuple((layer, count > 1) for layer, count in self.calls.items())
        return Trace((layers, self.riders(), self.functions), self.sizes, self.begins)

    def riders(self) -> dict[str, str]:
        """layer -> the layer whose noise serves it too."""
        return self._sums.riders(self.calls)

    def other(self, func: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        if func is F.batch_norm and kwargs["training"]:  # in eval mode: there are no running statistics
            fail(
                "model", "normalise by running statistics (noise would enter those of the batch)", "batch_norm without"
            )


def _by_copy(call: LocalCall) -> bool:
    """Whether a call makes the first of two copies from that copy alone, as the gradients of one copy ask it to: not
    where a constant of its arguments has a row for each sample.
    """
    result = call.forward(*call.inputs)
    try:
        first = call.forward(*(x[: x.shape[0] // 2] for x in call.inputs))
    except (RuntimeError, ValueError, TypeError, IndexError):  # rows that do not fit
        return False
    half = result[: result.shape[0] // 2]
    return first.shape == half.shape and same(half, first)


def same(first: Tensor, second: Tensor, scale: Tensor | None = None) -> bool:
    """Whether two copies are equal but for rounding, which may flip a threshold here and there."""
    first, second = (torch.nan_to_num(t.to(torch.float32)) for t in (first, second))
    limit = 0.05 * (first if scale is None else torch.nan_to_num(scale.to(torch.float32))).norm() + 1e-5 * first.norm()
    return bool((first - second).norm() <= limit)


def fail_rows(what: str) -> None:
    fail(
        what,
        "have the samples on its first axis, in order, each made from its own sample only and without random numbers",
        "different values in two copies of the same batch",
    )
