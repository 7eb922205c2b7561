"""Sums of layers' outputs: noise on one term is noise on the sum, and so on every other term.

Where a residual branch and its shortcut both end in a layer, one noise serves both: it is injected once, and the same
eps is the score of both layers' gradients (arXiv 2305.08960, residual blocks). That is one pass instead of two
layer-wise, and half the noise jointly. The same holds for a sum of embeddings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor


@dataclasses.dataclass(eq=False)
class Term:
    """The output of a layer, or a sum of such outputs."""

    tensor: Tensor  # the output or the sum
    layer: str  # a layer whose output is in it
    feature_dim: int  # of the output
    version: int  # of the tensor when it was noted, which shows a change in place
    uses: int = 0  # the number of functions that have read it
    whole: bool = True  # no term of the sum is used elsewhere too


class ResidualSums:
    """Terms and their sums, in the order of a forward."""

    def __init__(self) -> None:
        self._terms: dict[int, Term] = {}
        self._sums: list[tuple[Term, Term, Term]] = []

    def output(self, tensor: Tensor, layer: str, feature_dim: int) -> None:
        """Note that a layer has returned a tensor."""
        self._terms[id(tensor)] = Term(tensor, layer, feature_dim, tensor._version)

    def read(self, tensors: list[Tensor]) -> list[Term]:
        """Note that a function has read tensors; returns the terms among them."""
        found = [self._terms[id(t)] for t in tensors if id(t) in self._terms]
        for term in found:
            term.uses += 1
            if term.uses > 1:
                self._terms.pop(id(term.tensor), None)  # no longer needed, and possibly large
        return found

    def add(self, first: Term, second: Term, result: Tensor) -> None:
        """Note that two terms were added up."""
        if first is second or first.feature_dim != second.feature_dim or first.tensor.shape != second.tensor.shape:
            return
        total = Term(result, first.layer, first.feature_dim, result._version)
        self._terms[id(result)] = total
        self._sums.append((first, second, total))

    def passed_on(self, result: object, tensors: list[Tensor]) -> bool:
        """Whether a function returned its argument as it was, as dropout does in eval mode."""
        term = self._terms.get(id(result))
        return term is not None and term.version == term.tensor._version and any(result is t for t in tensors)

    def shared_noise(self, calls: Mapping[str, int]) -> dict[str, str]:
        """layer -> the first called layer of its sum, which gets the noise of them all, for the other layers.

        `calls`: the trained layers in the order of their first call, and how often each is called; a layer that is
        called again has several outputs, and keeps its own noise.
        """
        source = {layer: layer for layer in calls}
        order = {layer: index for index, layer in enumerate(calls)}
        for first, second, total in self._sums:
            once = calls[first.layer] == 1 == calls[second.layer]
            if not (first.uses == 1 == second.uses and first.whole and second.whole and once):
                total.whole = False
                continue
            earlier, later = sorted((source[first.layer], source[second.layer]), key=order.__getitem__)
            source = {layer: earlier if own == later else own for layer, own in source.items()}
        return {layer: own for layer, own in source.items() if layer != own}
