"""The order of a run's samples: a function of seed and epoch, so that resuming needs no record of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ulr_kernels import noise_contract

# Keeps the keys of shuffles apart from those of the training.
_STREAM = noise_contract.site_id("ulr_kernels.recipes.order")


def permutation(seed: int, epoch: int, count: int) -> Tensor:
    """The samples of an epoch in their order, int64 `[count]`, on the CPU."""
    key = noise_contract.fold_in(noise_contract.fold_in(seed, _STREAM), epoch)
    return torch.randperm(count, generator=torch.Generator().manual_seed(key))
