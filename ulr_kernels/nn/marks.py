"""Marks of tensors: what each of them depends on, as the modes that watch a forward note it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ulr_kernels.nn.batch import tensors

SAMPLE, NOISED = 1, 2  # marks of a tensor: it depends on the batch, on some layer's noise
NODES, GRAPHS, EDGES = 4, 8, 16  # how nodes belong together: by numbers of nodes, of graphs, by neither
STRUCTURE = NODES | GRAPHS | EDGES


class Marked:
    """Base of modes that mark tensors, by storage, so that views and writes in place are seen."""

    _marks: dict[int, int]

    def marks(self, tensor: Tensor) -> int:
        """The marks of a tensor; 0 for a constant."""
        return self._marks.get(storage(tensor), 0)

    def _mark(self, value: Any, bits: int) -> None:
        """Note what tensors depend on; memory that is used again gets the marks of what it now holds."""
        for tensor in (value,) if isinstance(value, Tensor) else tensors(value):
            if bits:
                self._marks[storage(tensor)] = bits
            elif self._marks:
                self._marks.pop(storage(tensor), None)


def flat(values: Iterable) -> list[Tensor]:
    """The tensors in arguments; quicker than a tree of any depth."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += flat(value)
    return found


def storage(tensor: Tensor) -> int:
    """The address of a tensor's memory; id(tensor) where it has none, as empty tensors all share address 0."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError):  # tensors without storage: inside vmap, sparse
        return id(tensor)
