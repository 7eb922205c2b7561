"""Tables of a list's tensors in device memory, and the entry that each program of a launch works on."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=64)
def on_device(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """int64, copied without waiting; the same list is not copied again, so that a graph holds no copy."""
    host = torch.tensor(rows, dtype=torch.int64)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@functools.lru_cache(maxsize=64)
def owners(programs: tuple[int, ...], device: torch.device) -> Tensor:
    """int32: the entry that each program works on, of entries that take so many."""
    counts = on_device((programs,), device)[0]
    return torch.repeat_interleave(counts, output_size=sum(programs)).to(torch.int32)
