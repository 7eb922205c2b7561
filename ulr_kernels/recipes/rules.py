"""Rules that settings of every job must keep, each refused in one line that names the option."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ulr_kernels.recipes import RecipeError


def one_of(settings: Any, option: str, choices: Sequence[str]) -> None:
    if getattr(settings, option) not in choices:
        raise RecipeError(f"{_typed(option)} must be one of {', '.join(choices)}, got '{getattr(settings, option)}'")


def at_least(settings: Any, option: str, least: int) -> None:
    if getattr(settings, option) < least:
        raise RecipeError(f"{_typed(option)} must be at least {least}, got {getattr(settings, option)}")


def positive(settings: Any, option: str) -> None:
    value = getattr(settings, option)
    if not (math.isfinite(value) and value > 0):
        raise RecipeError(f"{_typed(option)} must be positive, got {value}")


def not_negative(settings: Any, option: str) -> None:
    value = getattr(settings, option)
    if not (math.isfinite(value) and value >= 0):
        raise RecipeError(f"{_typed(option)} must be at least 0, got {value}")


def below_one(settings: Any, option: str) -> None:
    if not 0 <= getattr(settings, option) < 1:
        raise RecipeError(f"{_typed(option)} must be in [0, 1), got {getattr(settings, option)}")


def key(settings: Any, option: str) -> None:
    if not -(2**63) <= getattr(settings, option) < 2**64:
        raise RecipeError(f"{_typed(option)} must be in [-2^63, 2^64), got {getattr(settings, option)}")


def device(name: str) -> torch.device:
    """The device of that name, which must be here."""
    if name not in ("cpu", "cuda"):
        raise RecipeError(f"device must be cpu or cuda, got '{name}'")
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device 'cuda' is absent: this torch sees no CUDA device")
    return torch.device(name)


def _typed(option: str) -> str:
    """As the user types it."""
    return option.replace("_", "-")
