"""The jobs of `ulr train`: a new run, or the rest of one, each with its checkpoints and its report."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ulr_kernels.jobs import JobError
from ulr_kernels.recipes.settings import Settings

try:
    import matplotlib  # noqa: F401  (needed at the very end: better refused at the start)

    from ulr_kernels.jobs import memory, run_folder
    from ulr_kernels.recipes import report
    from ulr_kernels.recipes.train import CHECKPOINT, Trainer, fit, restore
except ImportError as error:
    raise JobError(f"training needs the package {error.name}: pip install '.[train]'") from error


def train(settings: Settings, out: Path, command: str, overwrite: bool = False) -> None:
    """Train a model from the start and write its report.

    Args:
        settings: what the run is.
        out: its folder, made if need be.
        command: what the user typed, for the report.
        overwrite: replace a run that is there.

    Raises:
        JobError: the run cannot be made; nothing has been written.
        OSError, FloatingPointError: a file could not be written, or a loss is not finite; the last checkpoint is
            intact.
    """
    trainer = Trainer(settings)
    with run_folder.prepare(out, CHECKPOINT, report.FILES, overwrite):
        _finish(trainer, out, command)


def resume(folder: Path, command: str) -> None:
    """Continue the run in a folder, bitwise as if it had never stopped, and write its report. Raises as `train`."""
    with run_folder.held(folder):
        _finish(restore(folder), folder, command)


def _finish(trainer: Trainer, out: Path, command: str) -> None:
    trainer.commands.append(command)
    memory.keep_freed()
    fit(trainer, out)
    figures = report.figures(dataclasses.asdict(trainer.settings), trainer.history, trainer.commands)
    for path in report.write(out, figures, trainer.model):
        print(path)
