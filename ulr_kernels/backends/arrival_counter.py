"""Arrival counter: the last block of a launch to arrive adds up the partial sums of all."""

from __future__ import annotations

import torch
from torch import Tensor

from ulr_kernels.backends.capture import capturing

_counters: dict[tuple[torch.device, int], Tensor] = {}


def arrival_counter(device: torch.device, count: int = 2) -> Tensor:
    """int32 counters, at least `count` of them, which are 0 between launches.

    Each stream has its own, so that launches with the same counters run one after another.
    """
    if device.type != "cuda" or capturing(device):  # a graph owns this memory, and must set it to 0 itself
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    if (device, stream) not in _counters or _counters[device, stream].numel() < count:
        _counters[device, stream] = torch.zeros(count, dtype=torch.int32, device=device)
    return _counters[device, stream]
