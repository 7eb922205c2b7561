"""Parts of a data set with the same share of every class, chosen by position: no seed and no machine changes them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def _positions(labels: Sequence[Hashable]) -> list[int]:
    """The number of earlier samples of the same class, for each sample."""
    seen: dict[Hashable, int] = {}
    positions = []
    for label in labels:
        positions.append(seen.get(label, 0))
        seen[label] = positions[-1] + 1
    return positions


def first_of_each_class(labels: Sequence[Hashable], count: int) -> list[int]:
    """`count` samples: the first of each class, then the second ...; all, where there are no more or it is 0."""
    if not 0 < count < len(labels):
        return list(range(len(labels)))
    positions = _positions(labels)
    return sorted(sorted(range(len(labels)), key=positions.__getitem__)[:count])


def every_nth_of_each_class(labels: Sequence[Hashable], nth: int) -> tuple[list[int], list[int]]:
    """The samples that stay, and every `nth` of each class."""
    parts: tuple[list[int], list[int]] = ([], [])
    for sample, position in enumerate(_positions(labels)):
        parts[(position + 1) % nth == 0].append(sample)
    return parts
