"""A counter by which the last block of a launch knows that it is the last one, and adds up what all have left."""

from __future__ import annotations

import torch
from torch import Tensor

_tickets: dict[tuple[torch.device, int], Tensor] = {}


def ticket(device: torch.device) -> Tensor:
    """int32, 0 between launches: one for each stream, so that launches that share it follow one another."""
    if device.type != "cuda":
        return torch.zeros(2, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():  # its memory belongs to the graph, which must set it to 0 itself
        return torch.zeros(2, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    if (device, stream) not in _tickets:
        _tickets[device, stream] = torch.zeros(2, dtype=torch.int32, device=device)
    return _tickets[device, stream]
