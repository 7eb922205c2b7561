"""A counter by which the last block of a launch knows that it is the last one, and adds up what all have left."""

from __future__ import annotations

import torch
from torch import Tensor

from ulr_kernels.backends.capture import capturing

_counters: dict[tuple[torch.device, int], Tensor] = {}


def arrival_counter(device: torch.device, count: int = 2) -> Tensor:
    """int32, at least `count` of them, 0 between launches: of each stream its own, so that launches that share them
    follow one another."""
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if capturing(device):  # its memory belongs to the graph, which must set it to 0 itself
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    if (device, stream) not in _counters or _counters[device, stream].numel() < count:
        _counters[device, stream] = torch.zeros(count, dtype=torch.int32, device=device)
    return _counters[device, stream]
