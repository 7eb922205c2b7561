"""Parts of tensors, for the providers that go through a product tile by tile."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def halves(tensor: Tensor | None, antithetic: bool) -> tuple[Tensor | None, Tensor | None]:
    """The copies with the noise as it is, and those with the noise negated."""
    if tensor is None or not antithetic:
        return tensor, None
    half = tensor.shape[0] // 2
    return tensor[:half], tensor[half:]


def narrow(tensor: Tensor, *index: slice) -> Tensor:
    """tensor[index]; faster in the usual case that an index takes the whole axis."""
    for axis, part in enumerate(index):
        if (size := part.stop - part.start) < tensor.shape[axis]:
            tensor = tensor.narrow(axis, part.start, size)
    return tensor


def part(tensor: Tensor | None, *index: slice) -> Tensor | None:
    return None if tensor is None else narrow(tensor, *index)


def row_tiles(copies: int, rows: int, limit: int, positions: int) -> Iterator[tuple[slice, slice]]:
    """Copies and rows of each tile: whole copies, or rows of one copy that are whole samples or within one sample."""
    if rows <= limit:
        step = max(1, limit // rows)
        for copy in range(0, copies, step):
            yield slice(copy, min(copy + step, copies)), slice(0, rows)
        return
    step = limit // positions * positions or limit
    for copy in range(copies):
        start = 0
        while start < rows:
            sample_end = rows if positions <= limit else start // positions * positions + positions
            stop = min(start + step, sample_end)
            yield slice(copy, copy + 1), slice(start, stop)
            start = stop


def sums_of(buffer: Tensor) -> Tensor:
    """An fp32 buffer for the sums of tiles, so that a buffer of another dtype is rounded once."""
    return buffer if buffer.dtype == torch.float32 else torch.zeros_like(buffer, dtype=torch.float32)


def store(sums: Tensor | None, buffer: Tensor | None) -> None:
    """Add the sums of `sums_of` to their buffer, once all tiles are done."""
    if sums is not None and buffer is not None and sums is not buffer:
        buffer.add_(sums)
