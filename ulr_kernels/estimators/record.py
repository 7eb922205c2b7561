"""A record of a forward, by which forwards are compared: two numbers for each sample of all that layers read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

OUTPUTS = "outputs"  # the name of the model's outputs in a record


class Entry(NamedTuple):
    """A tensor of a forward, in short."""

    name: str  # the layer that reads it
    rows: Tensor  # fp32 `[copies * samples, 2]`: two projections of each sample's part
    clean: bool  # no function showed that it depends on noise
    size: int  # the number of elements that a sample has


class Record:
    """The tensors of a forward, in short. Two forwards that differ also differ in two projections of each tensor.

    Args:
        samples: rows of the batch in this forward, all copies of it together.

    Attributes:
        entries: the inputs of layers, and the outputs of the model, in their order.
        begins: the number of entries from before the first noise.
        constants: the results of functions of parameters alone: their names, and fp32 `[1, 2]`.
    """

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self.entries: list[Entry] = []
        self.begins = 0
        self.constants: list[tuple[str, Tensor]] = []

    def add(self, name: str, x: Tensor, clean: bool, copies: int = 1) -> None:
        """Record a tensor with samples first; `copies`: how many of it there would be in all, if it holds one.

        An output `[steps, samples, ...]`, as spiking networks stack their time steps, has them second.
        """
        samples = self._samples // copies
        if name == OUTPUTS and x.dim() > 2 and x.shape[1] == samples:
            if x.shape[0] == samples:
                return  # either may count the samples
            x = x.transpose(0, 1)
        if x.dim() and x.numel() and x.shape[0] % samples == 0:
            rows = _projected(x, samples).repeat(copies, 1)
            self.entries.append(Entry(name, rows, clean, x.numel() // samples))

    def add_copies(self, records: Sequence[Record]) -> None:
        """Record the tensors of forwards of one copy each as those of one forward of them all."""
        for entries in zip(*(record.entries for record in records), strict=True):
            rows = torch.cat([entry.rows for entry in entries])
            self.entries.append(entries[0]._replace(rows=rows))

    def add_constant(self, name: str, x: Tensor) -> None:
        """Record the result of a function of parameters alone."""
        if x.numel():
            self.constants.append((name, _projected(x, 1)))

    def changed_constant(self, other: Record) -> str | None:
        """The name of a function of parameters alone that has another result in the other forward."""
        for (name, mine), (_, theirs) in zip(self.constants, other.constants, strict=False):
            if not _close(mine, theirs):
                return name
        return None


def _projected(x: Tensor, rows: int) -> Tensor:
    """Two projections of each of so many parts of a tensor: fp32 `[rows, 2]`."""
    flat = torch.nan_to_num(x.detach().reshape(rows, -1).to(torch.float32))
    place = torch.arange(flat.shape[1], device=x.device, dtype=torch.float32)
    return flat @ torch.stack([torch.cos(place), torch.sin(place + place * 0.5)], 1)


def _close(mine: Tensor, theirs: Tensor) -> bool:
    return mine.shape == theirs.shape and bool((mine - theirs).norm() <= 1e-4 * mine.norm())


def felt(noisy: Record, clean: Record, rows: Tensor, share: float = 0.0) -> set[str]:
    """The layers whose inputs at some rows differ between two forwards, which they must not.

    Args:
        noisy, clean: the records.
        rows: bool `[copies * samples]`.
        share: of the change of the other rows, by which these may change.
    """
    found = set()
    for mine, theirs in zip(noisy.entries, clean.entries, strict=False):
        change = mine.rows - theirs.rows
        if change[rows].norm() > share * change[~rows].norm() + 1e-5 * theirs.rows.norm():
            found.add(mine.name)
    return found


def hidden(noisy: Record, clean: Record) -> bool:
    """Whether a tensor that no function showed to depend on noise does depend on it."""
    pairs = zip(noisy.entries, clean.entries, strict=False)
    return any(mine.clean and not _close(theirs.rows, mine.rows) for mine, theirs in pairs)


def alike(mine: Record, expected: Record, copies: int) -> bool:
    """Whether two forwards with the same noise are equal from there on but for rounding, which may flip a threshold
    here and there: by less than 5 % of what distinguishes the copies."""

    def close(a: Tensor, b: Tensor) -> bool:
        apart = (b - b.roll(len(b) // copies, 0)).norm()
        return a.shape == b.shape and bool((a - b).norm() <= 0.05 * apart + 1e-4 * b.norm())

    pairs = mine.entries[mine.begins :], expected.entries[expected.begins :]
    return len(pairs[0]) == len(pairs[1]) and all(close(a.rows, b.rows) for a, b in zip(*pairs, strict=True))


def most_alike(mine: Tensor, expected: Tensor) -> bool:
    """Whether the rows of two matrices are equal for at least half of the samples, to 1 %: rounding may flip a
    threshold in a few samples, and depends on who shares the forward."""
    change, size = (mine - expected).norm(dim=1), expected.norm(dim=1)
    return bool((change <= 0.01 * (size + size.mean())).double().mean() >= 0.5)


def other_outputs(part: Record, whole: Record, samples: int) -> bool:
    """Whether a forward of the first samples alone has other outputs of the same sizes than one of all.

    Sizes may differ, as those of texts that the model cuts to the longest one.
    """
    pairs = (
        (mine.rows, theirs.rows[:samples])
        for mine, theirs in zip(part.entries, whole.entries, strict=False)
        if mine.name == theirs.name == OUTPUTS and mine.size == theirs.size
    )
    return not all(most_alike(*pair) for pair in pairs)


def same_outputs(mine: Record, other: Record, samples: int) -> bool:
    """Whether two forwards have the same outputs for the first copy but for rounding, which may flip a threshold."""

    def outputs(record: Record) -> list[Tensor]:
        return [entry.rows[:samples] for entry in record.entries if entry.name == OUTPUTS]

    pairs = zip(outputs(mine), outputs(other), strict=False)
    return all(bool((a - b).norm() <= 0.05 * b.norm()) for a, b in pairs)
