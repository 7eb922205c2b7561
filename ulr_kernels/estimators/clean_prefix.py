"""A cache of the part of a forward before its first noise, which chunks of copies share."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree


class CachedTensor(NamedTuple):
    """A tensor that a function has returned, held weakly: once the model drops it, its shape alone is left."""

    tensor: weakref.ref[Tensor]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def now(self) -> Tensor:
        """The tensor; if it is gone, one of its shape that takes no memory, as nothing but its shape can be read."""
        tensor = self.tensor()
        if tensor is None:
            return torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)
        return tensor


class CleanPrefixCache:
    """The results of the functions of samples before the first noise, in their order, with their marks.

    Later forwards take these results instead of running the functions: tensors that were alive at the noise, which are
    all that the rest of the model can read, and placeholders. They must call the same functions.

    Attributes:
        complete: a forward has come to its first noise.
    """

    def __init__(self) -> None:
        self.complete = False
        self._results: list[tuple[Callable, Any, int]] = []
        self._next = 0

    def add(self, func: Callable, result: Any, marks: int) -> None:
        """Add a function's result."""

        def weakly(leaf: Any) -> Any:
            is_tensor = isinstance(leaf, Tensor)
            return CachedTensor(weakref.ref(leaf), leaf.shape, leaf.dtype, leaf.device) if is_tensor else leaf

        self._results.append((func, _pytree.tree_map(weakly, result), marks))

    def finish(self) -> bool:
        """Note that a forward has come to its first noise. False: it has called fewer functions than the first one."""
        if not self.complete:
            self.complete = True

            def is_cached(leaf: Any) -> bool:
                return isinstance(leaf, CachedTensor)

            def now(leaf: Any) -> Any:
                return leaf.now() if is_cached(leaf) else leaf

            self._results = [(f, _pytree.tree_map(now, r, is_leaf=is_cached), marks) for f, r, marks in self._results]
        elif self._next != len(self._results):
            return False
        self._next = 0
        return True

    def next_result(self, func: Callable) -> tuple[Any, int] | None:
        """The result and marks of the next function; None where the first forward called another one."""
        if self._next == len(self._results) or self._results[self._next][0] != func:
            return None
        self._next += 1
        return self._results[self._next - 1][1:]
