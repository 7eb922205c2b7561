"""The folder of a run: made for a new one, never over another by accident."""

from __future__ import annotations

import os
from pathlib import Path

from ulr_kernels.recipes import RecipeError


def prepare(out: Path, mark: str, overwrite: bool = False) -> None:
    """Make the folder of a new run.

    Args:
        out: the folder.
        mark: the file that tells that a run is there; an old one is removed.
        overwrite: replace a run that is there.

    Raises:
        RecipeError: it holds a run already and `overwrite` is not set, or it cannot be made.
    """
    if (out / mark).exists() and not overwrite:
        raise RecipeError(f"{out} holds a run already: continue it with --resume {out}, or give --overwrite")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / mark).unlink(missing_ok=True)
    except OSError as error:
        raise RecipeError(f"out '{out}' cannot be used: {error}") from error
    if not os.access(out, os.W_OK):
        raise RecipeError(f"out '{out}' cannot be written")
