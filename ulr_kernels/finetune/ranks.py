"""The ranks that torchrun starts: how they find one another, and how they stop."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
from collections.abc import Iterator

import torch
import torch.distributed as dist

from ulr_kernels.jobs import JobError
from ulr_kernels.optim import WorkerError


@contextlib.contextmanager
def joined(timeout: int) -> Iterator[bool]:
    """For the block, make the default process group of the ranks that torchrun, or what sets its variables, started.

    The group is of gloo on a GPU too. What ranks exchange is a few numbers a step, and these pass the CPU anyway; NCCL
    would take memory of the GPU for its buffers, and where a rank does not answer it ends the process.

    Args:
        timeout: seconds that a rank waits for another, at least 1.

    Returns:
        Whether there is one: a process by itself has none.

    Raises:
        JobError: a variable is missing or nonsense, or this torch cannot do it.
        WorkerError: the ranks did not meet in time.
    """
    if timeout < 1:
        raise JobError(f"timeout must be at least 1, got {timeout}")
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        yield False
        return
    if not dist.is_available():
        raise JobError(f"{size} ranks need a torch with torch.distributed")
    # torchrun ends the other ranks by SIGTERM where one has died: then they, too, say what is kept.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        try:
            dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout))
        except ValueError as error:
            raise JobError(f"{size} ranks cannot meet: {_first_line(error)}") from error
        except RuntimeError as error:
            raise WorkerError(
                f"rank {rank} of {size} did not meet the others in {timeout} s: {_first_line(error)}"
            ) from error
        try:
            yield True
        finally:
            dist.destroy_process_group()
    finally:
        signal.signal(signal.SIGTERM, before)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def use_own_device() -> None:
    """One CUDA device a rank, or as few ranks on one as can be."""
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
