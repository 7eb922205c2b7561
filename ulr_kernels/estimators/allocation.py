"""The copies of each sample in a pass: in proportion to how far noise moves its loss.

The variance of a batch's gradient is the sum over samples of s_i^2 / n_i, with n_i copies of sample i and s_i the
standard deviation of what one copy gives, which grows as the loss's own. For a given sum of the n_i it is least where
n_i is proportional to s_i (Neyman 1934; for forward learning: Ren et al., arXiv 2410.05966). Once a network is right
about most samples, few have any gradient to speak of.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ALLOCATIONS = ("even", "neyman")


class Group(NamedTuple):
    """Samples, by their places in the batch, that have the same number of copies."""

    samples: Tensor
    copies: int


def spread(losses: Tensor, antithetic: bool) -> Tensor:
    """The standard deviation of each sample's loss under noise, fp64 `[samples]`; of a pair half its difference counts.

    Args:
        losses: fp32 `[copies, samples]`, or `[copies, samples, losses]`, whose sum is the loss of a sample.
        antithetic: copies are pairs.
    """
    losses = losses.flatten(2).sum(2) if losses.dim() > 2 else losses
    if antithetic:
        plus, minus = losses.double().unflatten(0, (2, -1))
        return ((plus - minus) / 2).square().mean(0).sqrt()
    return losses.double().std(0) if len(losses) > 1 else torch.ones_like(losses[0])


def groups(spreads: Tensor, copies: int, least: int, copies_per_draw: int) -> list[Group]:
    """Groups of samples with the same number of copies, in proportion to their spreads.

    Numbers are rounded to halves and doubles of `copies`, so that there are few groups. Their mean over the samples is
    at most `copies`.

    Args:
        spreads: `[samples]`, on the CPU, independent of the noise of the copies that are given here: else there would
            be a bias.
        copies: of each sample on average.
        least: copies that a sample has at least.
        copies_per_draw: copies that a draw makes; all numbers are multiples of it.
    """
    spreads = torch.nan_to_num(spreads.double(), nan=0.0, posinf=0.0)
    count = len(spreads)
    sizes = _sizes(copies, least, copies_per_draw, count)
    if not spreads.any() or len(sizes) == 1:
        return [Group(torch.arange(count), copies)]
    table = torch.tensor(sizes, dtype=torch.float64)
    wanted = copies * spreads / spreads.mean()
    edges = (table[1:] * table[:-1]).sqrt()  # between two sizes the one that is nearer as a ratio

    def chosen(scale: float) -> Tensor:
        return torch.bucketize(wanted * scale, edges)

    low, high = 0.0, 2.0 * count
    for _ in range(24):  # the largest scale that keeps to the budget
        middle = (low + high) / 2
        low, high = (middle, high) if table[chosen(middle)].sum() <= copies * count else (low, middle)
    which, more = chosen(low), chosen(high)
    left = copies * count - table[which].sum()
    for sample in spreads.argsort(descending=True).tolist():  # samples that are alike cross an edge together
        cost = table[more[sample]] - table[which[sample]]
        if 0 < cost <= left:
            which[sample], left = more[sample], left - cost
    found = (((which == place).nonzero().flatten(), size) for place, size in enumerate(sizes))
    return [Group(samples, size) for samples, size in found if len(samples)]


def _sizes(copies: int, least: int, copies_per_draw: int, samples: int) -> list[int]:
    """Possible numbers: `copies`, its halves down to `least`, its doubles up to the number of all samples together."""
    sizes = [copies]
    while (half := sizes[0] // 2 // copies_per_draw * copies_per_draw) > least:
        sizes.insert(0, half)
    if least < sizes[0]:
        sizes.insert(0, least)
    while sizes[-1] * 2 <= copies * samples:
        sizes.append(sizes[-1] * 2)
    return sizes
