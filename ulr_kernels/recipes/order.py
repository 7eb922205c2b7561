"""The order in which a run meets its samples: a function of seed and epoch, so that resuming needs no record of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ulr_kernels import contract

_STREAM = contract.site_id("ulr_kernels.recipes.order")  # keeps the keys of shuffles apart from those of the training


def permutation(seed: int, epoch: int, count: int) -> Tensor:
    """The samples of an epoch in their order, int64 `[count]`, on the CPU."""
    key = contract.fold_in(contract.fold_in(seed, _STREAM), epoch)
    return torch.randperm(count, generator=torch.Generator().manual_seed(key))
