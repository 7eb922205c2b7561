"""The folder of a run: made for a new one, never over another by accident, and one process's at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ulr_kernels.jobs import JobError


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep the run in a folder for this process, until the block or the process ends.

    Two processes on one run would mix its files. Some network file systems cannot lock a folder: there it is not kept.

    Raises:
        JobError: there is no such folder, or another process has it.
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise JobError(f"{folder} cannot be read: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise JobError(f"{folder}: another process works on the run there") from None
        except OSError:  # no such locks here
            pass
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def prepare(out: Path, mark: str, others: Sequence[str], overwrite: bool = False) -> Iterator[None]:
    """Make the folder of a new run, `held` in the block.

    Args:
        out: the folder.
        mark: the file whose presence shows that a run is there.
        others: a run's other files; those of an old run are removed, lest they be taken for the new one's.
        overwrite: replace a run that is there.

    Raises:
        JobError: it holds a run already and `overwrite` is not set, another process has it, or it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(f"out '{out}' cannot be used: {error}") from error
    with held(out):
        if (out / mark).exists() and not overwrite:
            raise JobError(f"{out} holds a run already: continue it with --resume {out}, or give --overwrite")
        if not os.access(out, os.W_OK):
            raise JobError(f"out '{out}' cannot be written")
        for name in (mark, *others):
            (out / name).unlink(missing_ok=True)
        yield
