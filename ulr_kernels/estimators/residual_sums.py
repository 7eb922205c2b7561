"""Sums of layers' outputs: noise on one term is noise on the sum, and so on every other term.

Where a residual branch and its shortcut both end in a layer, one noise serves both: it is injected once, and the same
eps is the score of both layers' gradients (arXiv 2305.08960, residual blocks). That is one pass instead of two
layer-wise, and half the noise jointly. The same holds for a sum of embeddings.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


@dataclasses.dataclass(eq=False)
class Term:
    """The output of a layer, or a sum of such outputs."""

    tensor: Callable[[], Tensor | None]  # a weak reference to the output or the sum
    shape: torch.Size
    layer: str  # a layer whose output is in it
    feature_dim: int  # of the output
    version: int  # of the tensor when it was noted, which shows a change in place
    uses: int = 0  # the number of functions that have read it
    whole: bool = True  # no term of the sum is used elsewhere too

    @property
    def used_once(self) -> bool:
        """One function has read it, and nothing else can: the model has not returned it, nor kept it."""
        return self.uses == 1 and self.whole and self.tensor() is None


class ResidualSums:
    """Terms and their sums, in the order of a forward."""

    def __init__(self) -> None:
        self._terms: dict[int, Term] = {}
        self._sums: list[tuple[Term, Term, Term]] = []

    def output(self, tensor: Tensor, layer: str, feature_dim: int) -> Term:
        """Note that a layer has returned a tensor."""
        term = Term(weakref.ref(tensor), tensor.shape, layer, feature_dim, tensor._version)
        self._terms[id(tensor)] = term
        return term

    def _term(self, value: object) -> Term | None:
        term = self._terms.get(id(value))
        return term if term is not None and term.tensor() is value else None  # else another with the id of a dead one

    def read(self, tensors: list[Tensor]) -> list[Term]:
        """Note that a function has read tensors; returns the terms among them."""
        found = [term for term in map(self._term, tensors) if term is not None]
        for term in found:
            term.uses += 1
        return found

    def add(self, first: Term, second: Term, result: Tensor) -> None:
        """Note that two terms were added up."""
        if first is second or first.feature_dim != second.feature_dim or first.shape != second.shape:
            return
        for term in (first, second):
            if term.tensor() is result:  # written in place: the term itself is gone
                term.tensor = _dead
        self._sums.append((first, second, self.output(result, first.layer, first.feature_dim)))

    def returned_unchanged(self, result: object, tensors: list[Tensor]) -> bool:
        """Whether a function returned its argument as it was, as dropout does in eval mode."""
        term = self._term(result)
        unchanged = term is not None and isinstance(result, Tensor) and term.version == result._version
        return unchanged and any(result is t for t in tensors)

    def shared_noise(self, calls: Mapping[str, int]) -> dict[str, str]:
        """layer -> the first called layer of its sum, which gets the noise of them all, for the other layers. The
        model has returned, and its outputs are still held.

        `calls`: the trained layers in the order of their first call, and how often each is called; a layer that is
        called again has several outputs, and keeps its own noise.
        """
        source = {layer: layer for layer in calls}
        order = {layer: index for index, layer in enumerate(calls)}
        for first, second, total in self._sums:
            once = calls[first.layer] == 1 == calls[second.layer]
            if not (first.used_once and second.used_once and once):
                total.whole = False
                continue
            earlier, later = sorted((source[first.layer], source[second.layer]), key=order.__getitem__)
            source = {layer: earlier if own == later else own for layer, own in source.items()}
        return {layer: own for layer, own in source.items() if layer != own}


def _dead() -> None:
    """A reference to a tensor that is there no more."""
