"""Whether a CUDA graph is being captured: its arguments must live as long as its replays."""

from __future__ import annotations

import torch


def capturing(device: torch.device) -> bool:
    """Whether the device's current stream is being captured."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
