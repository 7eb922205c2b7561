"""The probes of a step, and their grouping into forwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from ulr_kernels.nn.perturbed import WeightDraws


class Probe(NamedTuple):
    """One evaluation of the loss: at W + sign * sigma * eps(draw); at W itself where sign is 0."""

    draw: int
    sign: int


class Probed(NamedTuple):
    """The result of a step's probes: the loss to report, and the coefficients of `Update`."""

    loss: Tensor
    coefficients: Tensor


class ProbeBatch(NamedTuple):
    """Probes that one forward evaluates."""

    draws: WeightDraws  # of their noise
    sign: int  # of all of them; 0 without noise
    places: list[int]  # of each among the probes of the step


def group_probes(probes: Sequence[Probe], most: int) -> Iterator[ProbeBatch]:
    """The forwards of a step's probes, with at most `most` in each.

    Probes that come as all plus ones, then all minus ones, are taken in pairs: a pair's noise is made once.
    """
    half = len(probes) // 2
    if most > 1 and half and list(probes[half:]) == [Probe(probe.draw, -probe.sign) for probe in probes[:half]]:
        for start in range(0, half, most // 2):
            places = [*range(start, min(start + most // 2, half))]
            draws = WeightDraws(probes[start].draw, 2 * len(places), antithetic=True)
            yield ProbeBatch(draws, 1, places + [half + place for place in places])
        return
    start = 0
    while start < len(probes):
        first, count = probes[start], 1
        while count < most and probes[start + count : start + count + 1] == [Probe(first.draw + count, first.sign)]:
            count += 1
        yield ProbeBatch(WeightDraws(first.draw, count), first.sign, [*range(start, start + count)])
        start += count
