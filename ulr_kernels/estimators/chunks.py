"""How a pass is split so that its memory is bounded: its samples into parts, the copies of a part into chunks.

Neither changes a gradient: a sample's noise is named by its place in the batch and by its copy, not by who shares its
forward, and gradients add up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def parts_of(samples: int, most: int | None) -> list[slice]:
    """Samples in parts of about the same size, which is at most `most`."""
    count = 1 if most is None else -(-samples // most)
    edges = [samples * part // count for part in range(count + 1)]
    return [slice(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]


def chunks_of(copies: int, samples: int, rows: int | None, by_draw: int) -> list[tuple[int, int]]:
    """The copies of a part in chunks of at most `rows` rows: the first draw of each, and its number of copies.

    A draw makes `by_draw` copies: an antithetic chunk holds pairs, the copies of its draws, then their negatives.
    """
    if rows is None:
        return [(0, copies)]
    draws, total = max(1, rows // (by_draw * samples)), copies // by_draw
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
    if copies == weights.shape[0]:
        return weights
    if not antithetic:
        return weights[draw : draw + copies]
    return weights.unflatten(0, (2, -1))[:, draw : draw + copies // 2].flatten(0, 1)
