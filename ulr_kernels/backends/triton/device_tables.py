"""Tables of a list's tensors in device memory, and the entry that each program of a launch works on.

The tables of the last lists are kept. Each stream has its own: a table is made, read and freed in the order of its
stream. A CUDA graph reads at every replay the memory that its capture used. So a capture takes a table of an earlier
call, which is then kept as long as the process runs. It cannot make one: that would be a copy from host memory, which
is gone at the next replay.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ulr_kernels.backends.capture import capturing
from ulr_kernels.dispatch import BackendError

Tables = tuple[Tensor, Tensor]
ListKey = tuple[torch.device, tuple[tuple[int, ...], ...], tuple[int, ...]]
LISTS = 64
_recent: dict[ListKey, dict[int, Tables]] = {}  # by stream; the most recent list comes last
_captured: dict[ListKey, Tables] = {}
_lock = threading.Lock()


def on_device(entries: tuple[tuple[int, ...], ...], programs: tuple[int, ...], device: torch.device) -> Tables:
    """The int64 `entries`, copied without waiting, and the entry of each program, int32; entry i has `programs[i]`.

    Raises:
        BackendError: the current stream is being captured, and no earlier call has made this list's tables.
    """
    key = (device, entries, programs)
    with _lock:
        if capturing(device):
            return _for_a_graph(key)
        by_stream = _recent.pop(key, {})
        _recent[key] = by_stream
        if len(_recent) > LISTS:
            del _recent[next(iter(_recent))]
        stream = _stream(device)
        if stream not in by_stream:
            by_stream[stream] = _made(*key)
        return by_stream[stream]


def _for_a_graph(key: ListKey) -> Tables:
    """Tables of any stream: the call that made them wrote to the same tensors, so replays come after it."""
    if key not in _captured:
        if not _recent.get(key):
            raise BackendError(
                "ulr::perturb_, ulr::combine_: before a CUDA graph captures Triton's kernels on a list of tensors, "
                "run the same call on the same tensors once"
            )
        _captured[key] = next(iter(_recent[key].values()))
    return _captured[key]


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _made(device: torch.device, entries: tuple[tuple[int, ...], ...], programs: tuple[int, ...]) -> Tables:
    table, counts = (_copied(torch.tensor(numbers, dtype=torch.int64), device) for numbers in (entries, programs))
    return table, torch.repeat_interleave(counts, output_size=sum(programs)).to(torch.int32)


def _copied(host: Tensor, device: torch.device) -> Tensor:
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
