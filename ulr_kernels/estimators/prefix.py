"""The part of a forward in front of the first noise: chunks of copies share it, so it runs for the first one only."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree


class Made(NamedTuple):
    """A tensor that a function has returned, which is forgotten when the model forgets it."""

    tensor: weakref.ref[Tensor]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def now(self) -> Tensor:
        """It; or if it is gone one of its shape that takes no memory, as only its shape can be asked for again."""
        tensor = self.tensor()
        if tensor is None:
            return torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)
        return tensor


class Prefix:
    """What functions of samples have returned in front of the first noise, in their order, and with their marks.

    The next forwards are handed these results instead of running the functions: tensors that were alive at the noise,
    which are all that the rest of the model can read, and placeholders.

    Attributes:
        complete: the noise has been reached.
    """

    def __init__(self) -> None:
        self.complete = False
        self._results: list[tuple[Any, int]] = []
        self._next = 0

    def remember(self, result: Any, marks: int) -> None:
        def weakly(leaf: Any) -> Any:
            return Made(weakref.ref(leaf), leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf

        self._results.append((_pytree.tree_map(weakly, result), marks))

    def reached(self) -> None:
        """A forward has come to its first noise."""
        if not self.complete:
            self.complete = True
            is_made = {"is_leaf": lambda leaf: isinstance(leaf, Made)}
            self._results = [
                (
                    _pytree.tree_map(lambda leaf: leaf.now() if isinstance(leaf, Made) else leaf, result, **is_made),
                    marks,
                )
                for result, marks in self._results
            ]
        elif self._next != len(self._results):
            raise RuntimeError("ulr.ULR: the model must call the same functions in each forward, got fewer of them")
        self._next = 0

    def recall(self) -> tuple[Any, int] | None:
        """The next function's result and marks; None behind the last."""
        if not self.complete or self._next == len(self._results):
            return None
        self._next += 1
        return self._results[self._next - 1]
