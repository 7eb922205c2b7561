"""The job of `ulr replay`: base weights and a log become tuned weights, without data and without a forward pass."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from ulr_kernels.dispatch import BackendError, use_backend
from ulr_kernels.finetune import trajectory, weights
from ulr_kernels.finetune.job import build, named_parameters
from ulr_kernels.finetune.settings import Settings
from ulr_kernels.jobs import JobError


def replay(
    base: str, log: Path, *, until: int | None = None, revert: int = 0, backend: str | None = None, threads: int = 0
) -> tuple[dict[str, Tensor], trajectory.Trajectory]:
    """The tuned parameters of a run after some of its steps: bitwise those that the run had, on any back end.

    They are made on the run's device; on the CPU where that is a GPU and there is none here.

    Args:
        base: the model that the run began with, as `models.build` takes it.
        log: the run's log.
        until: steps to take; by default all.
        revert: steps to take back from the end instead. The weights are rebuilt from the base, which is exact; undoing
            a step in place would not be, because it was rounded.
        backend: `torch`, `cpp`, `cuda` or `triton`; by default the fastest.
        threads: of torch on the CPU; 0 leaves torch's choice.

    Returns:
        The parameters by name, and the steps taken.

    Raises:
        JobError: the log is damaged or has too few steps, the base is another model, or the back end is absent.
    """
    if threads < 0:
        raise JobError(f"threads must be at least 0, got {threads}")
    torch.set_num_threads(threads or torch.get_num_threads())
    if revert:
        steps = len(trajectory.read(log).updates)
        if until is not None:
            raise JobError("give --until or --revert, not both")
        if not 0 < revert <= steps:
            raise JobError(f"revert must be between 1 and {steps}, the steps in the log, got {revert}")
        until = steps - revert
    run = trajectory.read(log, until)
    settings = run.header.settings
    own = Settings.of_log(log, settings["run"])
    if not torch.cuda.is_available():  # the bits are the same on a CPU
        own = dataclasses.replace(own, device="cpu")
    loaded = build(own, len(settings["classes"]), settings["calibration"], base)
    parameters = named_parameters(loaded.model)
    if trajectory.weights_digest(parameters) != run.header.weights:
        raise JobError(f"'{base}' is not the model that {log} began with: its weights are others")
    try:
        with use_backend(backend) if backend else contextlib.nullcontext():
            run.replay(parameters)
    except (BackendError, ValueError) as error:
        raise JobError(str(error)) from error
    tuned = (name for names in run.header.rule.names for name in names)
    return {name: parameters[name] for name in tuned}, run


def write(base: str, log: Path, out: Path, **options) -> str:
    """`replay` into a file, as `weights.save` writes it; a line that says what it holds.

    Raises:
        JobError: as `replay`, or `out` is in no folder or is one; nothing has been written.
        OSError: `out` cannot be written.
    """
    if not out.parent.is_dir():
        raise JobError(f"out '{out}': no folder {out.parent}")
    if out.is_dir():
        raise JobError(f"out '{out}' must be a file, it is a folder")
    parameters, run = replay(base, log, **options)
    steps = len(run.updates)
    weights.save(out, parameters, run.header.weights, steps)
    cut = (
        f"; {run.rest} bytes after them are of a step that was cut" if run.rest and options.get("until") is None else ""
    )
    return f"{out}: {len(parameters)} tensors after {steps} steps, digest {trajectory.weights_digest(parameters)}{cut}"
