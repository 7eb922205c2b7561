"""A forward in which some layers are noised."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from ulr_kernels import ops
from ulr_kernels.estimators.meeting import NOISED, SAMPLE, Meeting, flat
from ulr_kernels.estimators.prefix import Prefix
from ulr_kernels.estimators.reach import Weights
from ulr_kernels.nn.call import Call, Known, Noise
from ulr_kernels.nn.local import RowsCall
from ulr_kernels.optim.probing import Probing


class Replay(NamedTuple):
    """What a second pass knows: it adds each layer's gradients when it comes to it, so that nothing is kept.

    Attributes:
        weights: what each row counts.
        log_sigma: layer -> its learnt ln sigma.
        order: the layers of the first pass's noised calls. The last one's output is of no more use.
    """

    weights: Weights
    log_sigma: Mapping[str, Tensor]
    order: Sequence[str]


class Kept(NamedTuple):
    """A noised call that is kept for its gradient: its layer, its number among that layer's, from 0, and it."""

    layer: str
    number: int
    call: Call


class Finished(BaseException):
    """All gradients of a replay have been added: the rest of the forward need not run. No model shall catch it."""


class NoisedPass(Meeting):
    """A forward in which some layers are noised.

    Args:
        layers: id(parameter) -> the name of its layer.
        parameters: the model's.
        inputs: the model's input.
        noises: the noise of each noised layer; all with the same number of copies.
        riders: layer -> the noised layer whose noise is the score of its gradient too.
        samples: of one copy.
        cut: the model is given one copy, and the first noised call makes the others.
        keep: remember the calls, and what they read, for their gradients.
        replay: add the gradients now.
        probing: makes the noise of weights, if any have some.
        prefix: what earlier forwards of this pass have found in front of the noise, or is to be found for later ones.
        noisy: of a layer and the number of its call, bool `[copies * samples]` or `[copies * samples * rows]`, on the
            model's device: those rows that get the noise, the others going on as they are; None for all. Only where the
            model is given all copies, and nothing is replayed.

    Attributes:
        order: the layers of the noised calls, in their order.
        calls: these calls, where they are kept.
    """

    def __init__(
        self,
        layers: Mapping[int, str],
        parameters: Iterable[Tensor],
        inputs: Any,
        noises: Mapping[str, Noise],
        riders: Mapping[str, str],
        samples: int,
        *,
        cut: bool,
        keep: bool,
        replay: Replay | None,
        probing: Probing | None,
        prefix: Prefix | None,
        noisy: Callable[[str, int], Tensor] | None,
    ) -> None:
        super().__init__(layers, parameters, inputs)
        self._noises = noises
        self._riders = riders
        self._samples = samples
        self._cut, self._keep, self._replay = cut, keep, replay
        self.probing = probing
        self._prefix = prefix  # until the noise is reached
        self._noisy = noisy
        self._counts: dict[str, int] = {}  # by which the keys of a layer's calls differ
        self._numbers: collections.Counter[str] = collections.Counter()
        self.order: list[str] = []
        self.calls: list[Kept] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = flat(args) + flat(kwargs.values())
        if self.probing is None or not any(id(tensor) in self.probing.sites for tensor in given):
            return super().__torch_function__(func, types, args, kwargs)
        if (result := self._shown(func, args, kwargs)) is not NotImplemented:
            return result
        bits = NOISED
        for tensor in given:
            bits |= self.marks(tensor)
        result = self.probing.__torch_function__(func, types, args, kwargs)
        self._mark(result, bits)
        return result

    def noises_outputs(self, given: list[Tensor]) -> bool:
        if self.probing is not None and any(id(t) in self.probing.sites for t in given):
            return False  # some have noise themselves
        layers = {self._layers[id(p)] for t in given if (owned := self.origin(t)) for p in owned.parameters}
        return any(self._riders.get(layer, layer) in self._noises for layer in layers)

    def met(self, call: Call) -> tuple[Tensor, int]:
        layer = self.trained_layer(call)
        lead = self._riders.get(layer, layer) if layer is not None else None
        noise = self._noises.get(lead) if lead is not None else None
        if layer is None or noise is None:
            return call.clean(), 0
        if self._prefix is not None:
            self._prefix.reached()
            self._prefix = None
        count = self._counts.get(layer, -1) + (not call.time)  # the first time step begins a call
        self._counts[layer] = count
        key = ops.fold_in(noise.key, count) if count else noise.key
        if call.time is not None:
            key = ops.fold_in(key, call.time)
        shared = not any(self.marks(x) & NOISED for x in call.given)
        if isinstance(call, RowsCall):
            x_copies = call.inputs[0].shape[0] // self._samples
        else:
            x_copies = 1 if shared and self._cut else noise.copies
        number = self._numbers[layer]
        self._numbers[layer] += 1
        self.order.append(layer)
        if self._keep:
            self.calls.append(Kept(layer, number, call))
        noise = noise._replace(key=key.to(call.inputs[0].device))
        rides, known = lead != layer, self._known(layer, number)
        last = self._replay is not None and len(self.order) == len(self._replay.order)
        silent = rides or last  # nobody reads the last one's noise
        result = call.noised(noise, self._samples, x_copies, shared=shared, rides=silent, known=known)
        if last:
            raise Finished
        if self._noisy is not None and not rides:
            noisy, rows = self._noisy(layer, number), list(result.shape)
            if len(rows) > 1:
                rows[call.feature_dim] = 1
            noisy = noisy.repeat_interleave(math.prod(rows) // len(noisy)).view(rows)
            result.copy_(torch.where(noisy, result, call.forward(*call.inputs)))  # it may be what the model writes into
        return result, 0 if rides else NOISED

    def recalled(self, bits: int) -> tuple[Any, int] | None:
        return self._prefix.recall() if self._prefix is not None and bits & SAMPLE else None

    def returned(self, result: Any, bits: int) -> None:
        if self._prefix is not None and bits & SAMPLE:
            self._prefix.remember(result, bits)

    def _known(self, layer: str, number: int) -> Known | None:
        if self._replay is None:
            return None
        self.check_order(self._replay.order[: len(self.order)])
        return Known(self._replay.weights.of(layer, number), self._replay.log_sigma.get(layer))

    def check_order(self, expected: Sequence[str]) -> None:
        """Raise if the noised layers are others than in the first pass, before anything is added for them."""
        if self.order != list(expected):
            raise RuntimeError(
                f"ulr.ULR: the model must call the layers {', '.join(expected)} in a second forward as in the first, "
                f"got {', '.join(self.order)} (max_rows or memory='replay' asks for a second forward)"
            )

    def prepare(
        self, func: Callable, args: tuple, kwargs: dict[str, Any], marks: list[tuple[Tensor, int]]
    ) -> tuple[tuple, dict[str, Any]]:
        """Behind the cut: copies of what was made before it, where it meets noise; and sizes read before it.

        Whether this is what the model means shows in its outputs, which are compared before a cut is made.
        """
        if not self._cut:
            return args, kwargs
        copies = next(iter(self._noises.values())).copies
        if func in RESHAPES:
            return _of_all_copies(args, copies), kwargs
        clean = [t for t, bits in marks if bits == SAMPLE and t.dim()]  # a residual branch, a mask
        if not clean:
            return args, kwargs
        repeated = {id(t): t.repeat(copies, *(1 for _ in t.shape[1:])) for t in clean}
        self._mark(list(repeated.values()), SAMPLE)
        return _pytree.tree_map(lambda leaf: repeated.get(id(leaf), leaf), (args, kwargs))


RESHAPES = {Tensor.view, Tensor.reshape, torch.reshape}


def _of_all_copies(args: tuple, copies: int) -> tuple:
    """The arguments of a reshape, with as many rows as all copies have, where they say how many one has."""
    x, *sizes = args
    nested = len(sizes) == 1 and isinstance(sizes[0], tuple | list)
    shape = list(sizes[0] if nested else sizes)
    if not shape or not all(isinstance(size, int) for size in shape):
        return args  # a dtype
    rows_of_one = shape[0] * copies == x.shape[0]
    if rows_of_one or (-1 not in shape and math.prod(shape) * copies == x.numel()):
        shape[0] *= copies
    return x, *([shape] if nested else shape)
