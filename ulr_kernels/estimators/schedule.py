"""The order of a step's work: its passes, the samples of each, and their copies, so that memory is bounded.

No split changes a gradient: a sample's noise is named by its place in the batch and by its copy, not by the samples
that share its forward, and gradients add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ulr_kernels.estimators.allocation import groups
from ulr_kernels.estimators.settings import Settings
from ulr_kernels.nn.affects import NoiseRows
from ulr_kernels.nn.batch import Batch


class Pass(NamedTuple):
    """Noise on some layers or weights, for which a step runs the model and adds their gradients."""

    layers: tuple[str, ...]  # those that get a gradient from noise on their outputs
    weights: tuple[str, ...]  # names of the parameters that have noise themselves
    copies: int  # of each sample
    shared_noise: Mapping[str, str]  # layer -> the layer whose noise it has (`residual_sums.py`)
    noise_rows: NoiseRows  # layer -> the rows of noise that a sample has in each of its calls
    sampler: str = "iid"
    hidden: bool = False  # some functions are hidden: all that is computed after the first noise may depend on it
    # The attributes below are decided, which happens just before the pass first runs (`plan.settle`).
    settled: bool = False
    expand_late: bool = False  # the layers before the first noise run on one copy only
    reuses_prefix: bool = False  # chunks of copies share the results from before the first noise (`clean_prefix.py`)
    shared_inputs: bool = False  # the noised layers read the same in all copies
    one_copy_per_forward: bool = False  # the functions of the noised weights cannot be split by copy
    max_rows: int | None = None  # the most rows, copies times samples, of one forward; None: all
    max_samples: int | None = None  # the most samples of one forward; None: all


class Part(NamedTuple):
    """Some samples in one pass: all their copies, whose losses are compared with one another."""

    pass_: Pass  # its `copies` is the number of copies of these samples
    rows: slice | Tensor  # their places in the whole batch
    batch: Batch  # the samples


def schedule(
    passes: Iterator[Pass], batch: Batch, settings: Settings, spreads: Callable[[], Tensor | None]
) -> Iterator[Part]:
    """All parts of a step, in their order.

    Args:
        passes: in the order in which they run.
        batch: all samples.
        settings: "neyman" allocation gives samples different numbers of copies.
        spreads: fp64 `[samples]` on the CPU, how far noise moves each sample's loss; None until a pass has shown it.
    """
    for pass_ in passes:
        known = None if pass_.weights else spreads()  # all samples of a copy share noise on weights
        if settings.allocation == "even" or known is None:
            for rows in parts_of(batch.samples, pass_.max_samples):
                yield Part(pass_, rows, batch.part(rows, rows.start))
            continue
        # A single draw has no baseline; it needs none where a pair of equal inputs cancels it, as for weights.
        cancels = settings.antithetic and pass_.shared_inputs and not settings.learn_sigma
        first = 0
        for samples, copies in groups(
            known, pass_.copies, settings.copies_per_draw * (1 if cancels else 2), settings.copies_per_draw
        ):
            many = len(samples) > 1  # a model may treat a single row differently, as `squeeze` does
            of_group = pass_._replace(
                copies=copies,
                expand_late=pass_.expand_late and many,
                reuses_prefix=pass_.reuses_prefix and many,
            )
            for rows in parts_of(len(samples), pass_.max_samples):
                yield Part(of_group, samples[rows], batch.part(samples[rows], first + rows.start))
            first += len(samples)


def parts_of(samples: int, most: int | None) -> list[slice]:
    """Samples in parts of about the same size, which is at most `most`."""
    count = 1 if most is None else -(-samples // most)
    edges = [samples * part // count for part in range(count + 1)]
    return [slice(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]


def chunks_of(copies: int, samples: int, rows: int | None, copies_per_draw: int) -> list[tuple[int, int]]:
    """The copies of a part in chunks of at most `rows` rows: the first draw of each, and its number of copies.

    A draw makes `copies_per_draw`: an antithetic chunk holds pairs, the copies of its draws, then their negatives.
    """
    if rows is None:
        return [(0, copies)]
    draws, total = max(1, rows // (copies_per_draw * samples)), copies // copies_per_draw
    return [(draw, copies_per_draw * min(draws, total - draw)) for draw in range(0, total, draws)]


def in_order(chunks: Sequence[Tensor], antithetic: bool) -> Tensor:
    """The losses of chunks, `[copies of the chunk, samples, ...]` each, in the order of a single chunk."""
    if len(chunks) == 1:
        return chunks[0]
    if not antithetic:
        return torch.cat(list(chunks))
    halves = [chunk.unflatten(0, (2, -1)) for chunk in chunks]
    return torch.cat(halves, 1).flatten(0, 1)


def of_chunk(weights: Tensor, draw: int, copies: int, antithetic: bool) -> Tensor:
    """The weights of a chunk's copies among those of all copies."""
    if copies == weights.shape[0]:
        return weights
    if not antithetic:
        return weights[draw : draw + copies]
    return weights.unflatten(0, (2, -1))[:, draw : draw + copies // 2].flatten(0, 1)
