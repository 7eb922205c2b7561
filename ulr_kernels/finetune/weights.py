"""Tuned weights in a safetensors file: only those that the run has changed, with what they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from ulr_kernels.finetune.trajectory import weights_digest
from ulr_kernels.jobs import JobError, checkpoint


def save(path: Path, parameters: Mapping[str, Tensor], base: str, steps: int) -> None:
    """Write tuned parameters, whole or not at all.

    Args:
        path: the file.
        parameters: by name.
        base: `weights_digest` of the model before the first step.
        steps: updates that led here.

    Raises:
        OSError: it cannot be written; a file of that name from before is intact.
    """
    tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
    facts = {"base": base, "steps": steps, "digest": weights_digest(tensors)}
    # One entry: safetensors writes several in any order, and equal weights should be equal files.
    checkpoint.write_atomically(path, safetensors.torch.save(tensors, {"ulr": json.dumps(facts)}))


def load(path: Path) -> dict[str, Tensor]:
    """Read what `save` wrote.

    Raises:
        JobError: no such file, or damaged, or something else.
    """
    metadata, tensors = checkpoint.read(path, "weights")
    if "ulr" not in metadata:
        raise JobError(f"{path}: must be tuned weights as finetune writes them, got other safetensors")
    if json.loads(metadata["ulr"])["digest"] != weights_digest(tensors):
        raise JobError(f"{path}: damaged: its content does not match its digest")
    return tensors
