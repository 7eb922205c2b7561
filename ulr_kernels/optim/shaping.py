"""From the losses of a population to the weights of its members: shaping, which sets the scale of a step.

Every function takes fp32 losses `[members, samples]` (one column where a member has one loss) and returns fp32 weights
`[members]`, ascending with the loss: the gradient estimate is their sum with the members' noise, over members * sigma.
Means are taken in fp64, so that equal losses weigh nothing at all: a deviation would blow up what rounding leaves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TINY = 1e-8  # against division by 0 where all members have one loss


def none(losses: Tensor) -> Tensor:
    """The mean loss of each member less the mean of all: a constant leaves the gradient as it is and adds variance."""
    means = losses.double().mean(1)
    return (means - means.mean()).float()


def zscore(losses: Tensor) -> Tensor:
    """(L - mean) / standard deviation over the population (Salimans et al., arXiv 1703.03864; EGGROLL)."""
    means = losses.double().mean(1)
    return ((means - means.mean()) / (means.std(correction=0) + TINY)).float()


def rank(losses: Tensor) -> Tensor:
    """Centred ranks in [-0.5, 0.5] (Salimans et al., arXiv 1703.03864, 2.1); equal losses share their mean rank.

    A member whose loss is NaN has failed, and is ranked with the worst; the losses of the others still count.
    """
    means = losses.double().mean(1)
    means = means.where(means == means, math.inf)
    ordered = means.sort().values
    below = torch.searchsorted(ordered, means)
    up_to = torch.searchsorted(ordered, means, right=True)
    ranks = (below + up_to - 1).to(torch.float32) / 2
    return ranks / (len(means) - 1) - 0.5


def group(losses: Tensor) -> Tensor:
    """Group-relative: z-scores among the members' losses on the same sample, averaged over samples.

    A sample that is hard for every member then says as much as an easy one (the advantage of GRPO, arXiv 2402.03300,
    4.1.2, with the members of the population as the group that answers one question).
    """
    losses = losses.double()
    deviation = losses.std(0, correction=0) + TINY
    return ((losses - losses.mean(0)) / deviation).mean(1).float()


SHAPINGS = {"none": none, "zscore": zscore, "rank": rank, "group": group}
