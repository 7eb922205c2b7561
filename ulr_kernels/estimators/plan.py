"""What a batch of given shapes asks of the estimator: its passes, and the chunks of copies of a pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ulr_kernels.estimators.recording import Recording
from ulr_kernels.estimators.settings import Settings, fail


class Pass(NamedTuple):
    """One noised forward.

    Attributes:
        layers: those that get a gradient.
        riders: layer -> the layer whose noise serves it too (`estimators/sums.py`).
        cut: the layers before the first noise run on one copy only.
    """

    layers: tuple[str, ...]
    riders: Mapping[str, str]
    cut: bool


class Plan(NamedTuple):
    """The passes; and the noised layers with their site numbers."""

    passes: tuple[Pass, ...]
    layers: tuple[str, ...]
    sites: Tensor


def chunks_of(copies: int, samples: int, settings: Settings) -> list[tuple[int, int]]:
    """The copies of a pass in chunks of at most `max_rows` rows: the first draw of each, and its number of copies.

    An antithetic chunk holds pairs: the copies of its draws, then their negatives.
    """
    if settings.max_rows is None:
        return [(0, copies)]
    by_draw = 2 if settings.antithetic else 1  # copies that one draw makes
    draws = settings.max_rows // (by_draw * samples)
    if not draws:
        what = "a pair of copies" if settings.antithetic else "one copy"
        fail("max_rows", f"have room for {what} of the batch, {by_draw * samples} rows", settings.max_rows)
    total = copies // by_draw
    return [(draw, by_draw * min(draws, total - draw)) for draw in range(0, total, draws)]


def in_order(parts: Sequence[Tensor], antithetic: bool) -> Tensor:
    """The losses of chunks, `[copies of the chunk, samples]` each, as those of one pass."""
    if len(parts) == 1:
        return parts[0]
    if not antithetic:
        return torch.cat(list(parts))
    halves = [part.unflatten(0, (2, -1)) for part in parts]
    return torch.cat(halves, 1).flatten(0, 1)


def of_chunk(weights: Tensor, draw: int, copies: int, antithetic: bool) -> Tensor:
    """The weights of a chunk's copies among those of a pass."""
    if not antithetic:
        return weights[draw : draw + copies]
    return weights.unflatten(0, (2, -1))[:, draw : draw + copies // 2].flatten(0, 1)


def refuse_unreached(parameters: Sequence[Tensor], names: Mapping[int, str], recording: Recording) -> None:
    """Raise if a trained parameter gets no gradient, or not all of it."""
    problems = []
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if id(parameter) in recording.elsewhere:
            problems.append(f"{names[id(parameter)]} (used by {recording.elsewhere[id(parameter)]})")
        elif id(parameter) not in recording.reached:
            problems.append(f"{names[id(parameter)]} (met in no call)")
    if problems:
        fail(
            "model",
            "bring each trained parameter together with the samples in a function with one output, samples first, and "
            "a derivative in the parameter. Those that it does not can be frozen (requires_grad_(False)), or trained "
            "by noise on the weights (ulr.optim.MeZO), or left out of the model",
            ", ".join(problems),
        )
    if not recording.calls:
        fail("model", "have a trained parameter", "none")
