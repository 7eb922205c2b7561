"""How much memory the work needs: the peak of this process, or of the CUDA device; and keeping what was freed."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

import torch


def keep_freed() -> None:
    """Let this process keep memory that it frees, for its next allocation.

    By default glibc returns large blocks to the kernel. Each training step would fault its activations in again, page
    by page: about a quarter of a step's time. Other C libraries have no such setting and need none.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(parameter, 2**30) or mallopt(parameter, 2**25)  # older glibc takes no more


def give_back() -> None:
    """Return what is freed to the system: what `keep_freed` keeps in pieces too small for the next work to use.

    torch asks for aligned blocks, and glibc leaves a small one beside each; once these are in use the large ones
    cannot be joined, and work on blocks of ever other sizes takes new memory, step by step.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak(device: torch.device) -> None:
    """Forget earlier peaks, where the system allows it, so that other work does not hide what training needs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def current(device: torch.device) -> float:
    """MiB: what is allocated on a CUDA device now, else this process's resident size."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    return _status("VmRSS") or peak(device)


def peak(device: torch.device) -> float:
    """MiB: the peak allocated on a CUDA device, else the peak resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # of ru_maxrss
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _status(field: str) -> float | None:
    """MiB: what Linux says of this process; None elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) / 2**10
    return None
