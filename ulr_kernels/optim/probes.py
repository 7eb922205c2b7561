"""The probes of a step, and which of them one forward evaluates together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from ulr_kernels.optim.probing import Draws


class Probe(NamedTuple):
    """One evaluation of the loss: at W + sign * sigma * eps(draw); at W itself where sign is 0."""

    draw: int
    sign: int


class Probed(NamedTuple):
    """What the losses of a step's probes say: the loss to report, and the coefficients of `Update`."""

    loss: Tensor
    coefficients: Tensor


class Together(NamedTuple):
    """Probes that one forward evaluates, and their places among those of the step."""

    draws: Draws
    sign: int
    places: list[int]


def together(probes: Sequence[Probe], most: int) -> Iterator[Together]:
    """The forwards of a step's probes, with at most so many in each.

    Probes that come as all plus ones, then all minus ones, are taken in pairs: a pair's noise is made once.
    """
    half = len(probes) // 2
    if most > 1 and half and list(probes[half:]) == [Probe(probe.draw, -probe.sign) for probe in probes[:half]]:
        for start in range(0, half, most // 2):
            places = [*range(start, min(start + most // 2, half))]
            draws = Draws(probes[start].draw, 2 * len(places), antithetic=True)
            yield Together(draws, 1, places + [half + place for place in places])
        return
    start = 0
    while start < len(probes):
        first, count = probes[start], 1
        while count < most and probes[start + count : start + count + 1] == [Probe(first.draw + count, first.sign)]:
            count += 1
        yield Together(Draws(first.draw, count), first.sign, [*range(start, start + count)])
        start += count
