"""Learning rates over a run."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "constant")


def learning_rate(first: float, schedule: str, done: float) -> float:
    """The learning rate when a share `done` (0 to 1) of all steps is done; "cosine" goes from `first` to 0."""
    return first if schedule == "constant" else first * 0.5 * (1 + math.cos(math.pi * done))
