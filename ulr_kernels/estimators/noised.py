"""A forward in which some layers are noised."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ulr_kernels import ops
from ulr_kernels.errors import RuleError
from ulr_kernels.estimators.clean_pass import Site
from ulr_kernels.estimators.clean_prefix import CleanPrefixCache
from ulr_kernels.estimators.record import OUTPUTS, Record
from ulr_kernels.estimators.schedule import Pass
from ulr_kernels.estimators.view import ModelView
from ulr_kernels.nn.affects import RowWeights
from ulr_kernels.nn.batch import Batch, tensors
from ulr_kernels.nn.call import Call, DerivedParameter, KnownLosses, Noise, NoiseSite
from ulr_kernels.nn.graphs import GraphInput
from ulr_kernels.nn.interceptor import LayerInterceptor
from ulr_kernels.nn.marks import NOISED, SAMPLE, STRUCTURE, flat
from ulr_kernels.nn.module_state import ModuleState
from ulr_kernels.nn.perturbed import PerturbedWeights

Keys = Mapping[str, Tensor]  # name of a layer or parameter -> its key in this step


class FirstPass(NamedTuple):
    """The result of a first forward. With it a second one adds each layer's gradients as it runs, and keeps nothing."""

    weights: RowWeights  # of the rows of noise in the gradient
    log_sigma: Mapping[str, Tensor]  # layer -> its learnt ln sigma
    order: Sequence[str]  # the layers of the noised calls; the output of the last one is not needed again
    # Of a layer and the number of its call: the gradient of its output to add, and the whole gradient of its output.
    guides: Mapping[Site, Tensor]
    deltas: Mapping[Site, Tensor]


class KeptCall(NamedTuple):
    """A noised call that is kept for its gradient, with its layer and its number among that layer's, from 0."""

    layer: str
    number: int
    call: Call


class CannotExpandLate(Exception):
    """A forward shows that its results from before the noise, or sizes that it read there, do not serve all copies."""


class ForwardSpec(NamedTuple):
    """One forward of a pass."""

    pass_: Pass
    keys: Keys  # of this step
    batch: Batch
    copies: int  # of each sample in this forward
    draw: int = 0  # of the first copy
    keep: bool = False  # keep the calls, and the tensors that they read, for their gradients
    first_pass: FirstPass | None = None  # add the gradients now
    prefix: CleanPrefixCache | None = None  # a cache of the results before the noise, to fill or to use
    # Of a layer and the number of its call, the rows that get the noise: bool `[copies * samples]` or
    # `[copies * samples * rows]` on the device; None: all. Not with `first_pass`, nor where a pass expands late.
    noisy_rows: Callable[[str, int], Tensor] | None = None
    large_noise: bool = False  # the noise of a trial: at least as large as the layer's output, so that its effect shows
    record: Record | None = None  # of what the forward computes, to fill


class NoisedForward(LayerInterceptor):
    """A forward in which some layers are noised.

    Args:
        view: of the model.
        spec: what to run.
        inputs: the model's input; one copy where the pass expands late: the first noised call makes the others.
        noises: the noise of each noised layer; all with the same number of copies.
        perturbed: the mode that makes the noise of weights, if any have noise.

    Attributes:
        order: the layers of the noised calls, in their order.
        calls: these calls, if they are kept.
        functions: those of samples that the forward has called.
        sites: layer and number of each call that has noise of its own -> this noise.
    """

    def __init__(
        self,
        view: ModelView,
        spec: ForwardSpec,
        inputs: Any,
        noises: Mapping[str, Noise],
        perturbed: PerturbedWeights | None,
    ) -> None:
        super().__init__(view.layers, view.followed, inputs)
        self._noises, self._shared_noise, self._samples = noises, spec.pass_.shared_noise, spec.batch.samples
        self._expand_late, self._keep, self._first_pass = spec.pass_.expand_late, spec.keep, spec.first_pass
        self.perturbed = perturbed
        if perturbed is not None:
            perturbed.share_marks(self)
        self._prefix = spec.prefix  # until the noise is reached
        self._noisy_rows, self._large_noise, self._record = spec.noisy_rows, spec.large_noise, spec.record
        self._hidden, self._begun = spec.pass_.hidden, False
        self._graphs = inputs if self._expand_late and isinstance(inputs, GraphInput) else None
        if self._graphs is not None:
            for tensor, marks in self._graphs.structure:
                self._mark(tensor, SAMPLE | marks)
        self._expanded: dict[int, tuple[Tensor, Tensor]] = {}  # id(tensor of one copy) -> it, and that of all copies
        self._counts: dict[str, int] = {}  # the keys of a layer's calls differ by them
        self._numbers: collections.Counter[str] = collections.Counter()
        self.order: list[str] = []
        self.calls: list[KeptCall] = []
        self.functions: set[Callable] = set()
        self.sites: dict[Site, NoiseSite] = {}

    def run(self, model: nn.Module, inputs: Any, state: ModuleState) -> Any:
        def of_samples(leaf: Any) -> Any:  # a model that differentiates inside its forward leaves a graph on these
            return leaf.detach() if leaf.requires_grad and self.parameters_of(leaf) is None else leaf

        outputs = _pytree.tree_map_only(Tensor, of_samples, super().run(model, inputs, state))
        if self.perturbed is not None and self.perturbed.copies > 1 and self.perturbed.reads(tensors(outputs)):
            raise RuleError("ulr.ULR: an output of noised weights alone has no rows: each copy needs its own forward")
        if self._record is not None:
            for tensor in tensors(outputs):
                if not self._note(OUTPUTS, [tensor]):  # also what only a hidden function has made of samples
                    self._record.add(OUTPUTS, tensor, True)
        return outputs

    def marks(self, tensor: Tensor) -> int:
        bits = super().marks(tensor)
        return bits | NOISED if bits and self._hidden and self._begun else bits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = flat(args) + flat(kwargs.values())
        if (
            self._graphs is not None
            and self._begun
            and (func in SIZES or any(self._is_structure(tensor) for tensor in given))
        ):
            args, kwargs = self._expand_structure(func, args, kwargs, given)
            given = flat(args) + flat(kwargs.values())
        if self.perturbed is None or not self.perturbed.reads(given):
            return super().__torch_function__(func, types, args, kwargs)
        if (result := self._call_composite(func, args, kwargs)) is not NotImplemented:
            return result
        bits = NOISED
        for tensor in given:
            bits |= self.marks(tensor)
        if self._record is not None and any(isinstance(tensor, nn.Parameter) for tensor in given):
            self._note("weights", given)
        with torch.set_grad_enabled(any(t.requires_grad and not isinstance(t, nn.Parameter) for t in given)):
            result = self.perturbed.__torch_function__(func, types, args, kwargs)
        for tensor in flat((result,)):
            more = self.marks(tensor) if self.perturbed.copies > 1 else 0  # rows that a parameter was expanded to
            self._mark(tensor, bits | more)
        return result

    def _sort(
        self, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[list[DerivedParameter], list[tuple[Tensor, int]], int]:
        derived, marks, bits = super()._sort(args, kwargs)
        if bits & STRUCTURE and (derived or not all(of_tensor & STRUCTURE for _, of_tensor in marks)):
            bits &= ~STRUCTURE  # of features too
        return derived, marks, bits

    def _is_structure(self, tensor: Tensor) -> bool:
        """Whether a tensor of one copy tells how nodes belong together."""
        bits = self.marks(tensor)
        return bool(bits & STRUCTURE) and not bits & NOISED

    def _expand_structure(
        self, func: Callable, args: tuple, kwargs: dict[str, Any], given: Sequence[Tensor]
    ) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a function that reads the edges or the size of one copy after the noise: of all copies.

        Whether this is right shows in the model's outputs, which are compared before a pass expands late.
        """
        assert self._graphs is not None
        copies, found = next(iter(self._noises.values())).copies, {}
        for tensor in given:
            bits = self.marks(tensor)
            if not bits or bits & NOISED or not tensor.dim():
                continue
            if func in SIZES and not bits & STRUCTURE:  # its values are not read
                found[id(tensor)] = tensor.new_empty(()).expand(copies * len(tensor), *tensor.shape[1:])
                continue
            if id(tensor) not in self._expanded:
                self._expanded[id(tensor)] = tensor, self._graphs.expanded(tensor, bits, copies)
            found[id(tensor)] = self._expanded[id(tensor)][1]
        self._mark(list(found.values()), SAMPLE | NOISED)
        return _pytree.tree_map(lambda leaf: found.get(id(leaf), leaf), (args, kwargs))

    def noises_outputs(self, given: list[Tensor]) -> bool:
        if self.perturbed is not None and any(id(t) in self.perturbed.noised for t in given):
            return False  # some have noise themselves
        layers = {self._layers[id(p)] for t in given if (each := self.parameters_of(t)) for p in each.parameters}
        return any(self._shared_noise.get(layer, layer) in self._noises for layer in layers)

    def _note(self, name: str, given: Sequence[Tensor]) -> int:
        """Record those of the tensors that a function reads which depend on samples; returns their number."""
        assert self._record is not None
        samples = [x for x in given if self.marks(x) & SAMPLE]
        noised = any(self.marks(x) & NOISED for x in samples)
        copies = next(iter(self._noises.values())).copies if self._expand_late and not noised else 1
        for x in samples:
            self._record.add(name, x, not self.marks(x) & NOISED, copies)
        return len(samples)

    def on_parameters(self, func: Callable, derived: list[DerivedParameter], result: Any) -> None:
        if self._record is not None:
            for tensor in tensors(result):
                self._record.add_constant(getattr(func, "__name__", str(func)), tensor)

    @torch.no_grad()
    def on_layer_call(self, call: Call) -> tuple[Tensor, int]:
        layer = self.trained_layer(call)
        noted = self._note(layer, call.given) if self._record is not None and layer is not None else 0
        source = self._shared_noise.get(layer, layer) if layer is not None else None
        noise = self._noises.get(source) if source is not None else None
        if layer is None or noise is None:
            return call.clean(), 0
        if self._prefix is not None:
            if not self._prefix.finish():
                raise CannotExpandLate
            self._prefix = None
        if self._record is not None and not self._begun:
            self._record.begins = len(self._record.entries) - noted
        self._begun = True
        count = self._counts.get(layer, -1) + (not call.time)  # the first time step begins a call
        self._counts[layer] = count
        key = ops.fold_in(noise.key, count) if count else noise.key
        if call.time is not None:
            key = ops.fold_in(key, call.time)
        shared = not any(self.marks(x) & NOISED for x in call.given)
        if call.expands_rows:
            x_copies = call.inputs[0].shape[0] // self._samples
        else:
            x_copies = 1 if shared and self._expand_late else noise.copies
        number = self._numbers[layer]
        self._numbers[layer] += 1
        self.order.append(layer)
        if self._keep:
            self.calls.append(KeptCall(layer, number, call))
        noise = noise._replace(key=key.to(call.inputs[0].device))
        if self._large_noise or self._noisy_rows is not None:
            noise = noise._replace(sigma=_large_sigma(noise.sigma, call.clean()))
        from_branch, known = source != layer, self._known_losses(layer, number)
        last = self._first_pass is not None and len(self.order) == len(self._first_pass.order)
        silent = from_branch or last  # nothing reads the last one's noise
        result = call.noised(noise, self._samples, x_copies, shared=shared, silent=silent, known=known)
        if not from_branch:
            self.sites[layer, number] = call.site()
        if last:  # the rest of the forward runs on as many copies as this layer's input has
            return result, 0
        if self._noisy_rows is not None and not from_branch:
            noisy, rows = self._noisy_rows(layer, number), list(result.shape)
            if len(rows) > 1:
                rows[call.feature_dim] = 1
            noisy = noisy.repeat_interleave(math.prod(rows) // len(noisy)).view(rows)
            # In place: the model may write into this tensor.
            result.copy_(torch.where(noisy, result, call.forward(*call.inputs)))
        return result, 0 if from_branch else NOISED

    def after_call(self, func: Callable, args: tuple, kwargs: dict[str, Any], marks: list, result: Any) -> None:
        if marks:
            self.functions.add(func)

    def cached_result(self, func: Callable, bits: int) -> tuple[Any, int] | None:
        if self._prefix is None or not bits & SAMPLE or not self._prefix.complete:
            return None
        return self._prefix.next_result(func)

    def cache_result(self, func: Callable, result: Any, bits: int) -> None:
        if self._prefix is None or not bits & SAMPLE:
            return
        if self._prefix.complete:  # the first forward did not call this function
            raise CannotExpandLate
        self._prefix.add(func, result, bits)

    def _known_losses(self, layer: str, number: int) -> KnownLosses | None:
        if self._first_pass is None:
            return None
        self.check_order(self._first_pass.order[: len(self.order)])
        first, site = self._first_pass, (self._shared_noise.get(layer, layer), number)
        log_sigma = first.log_sigma.get(layer)
        delta = first.deltas.get(site) if log_sigma is None else None
        return KnownLosses(first.weights.of(layer, number), log_sigma, first.guides.get(site), delta)

    def check_order(self, expected: Sequence[str]) -> None:
        """Raise if the noised layers are others than in the first pass, before anything is added for them."""
        if self.order != list(expected):
            raise RuntimeError(
                f"ulr.ULR: the model must call the layers {', '.join(expected)} in a second forward as in the first, "
                f"got {', '.join(self.order)} (max_rows or memory='recompute' asks for a second forward)"
            )

    def expand_copies(
        self, func: Callable, args: tuple, kwargs: dict[str, Any], marks: list[tuple[Tensor, int]]
    ) -> tuple[tuple, dict[str, Any]]:
        """After the first noise of a late expansion: copies of tensors from before it, and sizes read before it.

        Whether the model means this shows in its outputs, which are compared before a pass expands late.
        """
        if not self._expand_late:
            return args, kwargs
        copies = next(iter(self._noises.values())).copies
        if func in RESHAPES:
            return _for_all_copies(args, copies, self._samples), kwargs
        clean = [t for t, bits in marks if bits == SAMPLE and t.dim()]  # a residual branch, a mask
        if not clean:
            return args, kwargs
        repeated = {id(t): t.repeat(copies, *(1 for _ in t.shape[1:])) for t in clean}
        self._mark(list(repeated.values()), SAMPLE)
        return _pytree.tree_map(lambda leaf: repeated.get(id(leaf), leaf), (args, kwargs))


RESHAPES = {Tensor.view, Tensor.reshape, torch.reshape}
SIZES = {Tensor.size, Tensor.shape.__get__, Tensor.__len__, Tensor.numel}  # type: ignore[attr-defined]


def _for_all_copies(args: tuple, copies: int, samples: int) -> tuple:
    """The arguments of a reshape, with the rows of all copies where they have the rows of one.

    Raises:
        CannotExpandLate: the first size can be read either way.
    """
    x, *sizes = args
    nested = len(sizes) == 1 and isinstance(sizes[0], tuple | list)
    shape = list(sizes[0] if nested else sizes)
    if not shape or not all(isinstance(size, int) for size in shape):
        return args  # a dtype
    if -1 not in shape:
        of_one = math.prod(shape) * copies == x.numel()
    else:
        of_one = shape[0] * copies == x.shape[0]
        if of_one and shape[0] == copies * samples:
            raise CannotExpandLate
    if of_one:
        shape[0] *= copies
    return x, *([shape] if nested else shape)


def _large_sigma(sigma: float | Tensor, clean: Tensor) -> float:
    """A scale of noise that is not small beside a layer's output."""
    size = float(clean.detach().to(torch.float32).abs().clamp(max=1e4).nan_to_num().median())
    return max(float(torch.as_tensor(sigma).max()), size or 1.0)
