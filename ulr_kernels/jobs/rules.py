"""Rules that the settings of a job must keep. Each is the text after "must" where a value breaks it, else None."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ulr_kernels.jobs import JobError

Rule = Callable[[Any], str | None]


def one_of(choices: Sequence[str]) -> Rule:
    return lambda value: None if value in choices else f"be one of {', '.join(choices)}"


def at_least(least: int) -> Rule:
    return lambda value: None if value >= least else f"be at least {least}"


def positive(value: float) -> str | None:
    return None if math.isfinite(value) and value > 0 else "be positive"


def not_negative(value: float) -> str | None:
    return None if math.isfinite(value) and value >= 0 else "be at least 0"


def below_one(value: float) -> str | None:
    return None if 0 <= value < 1 else "be in [0, 1)"


def seed(value: int) -> str | None:
    return None if -(2**63) <= value < 2**64 else "be in [-2^63, 2^64)"


def device(name: str) -> torch.device:
    """The device of that name, "cpu" or "cuda".

    Raises:
        JobError: this machine has no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise JobError("device 'cuda' is absent: this torch sees no CUDA device")
    return torch.device(name)
