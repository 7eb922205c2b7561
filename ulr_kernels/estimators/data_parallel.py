"""Data-parallel ranks: their micro-batches are slices of one whole batch, and their gradients are averaged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ulr_kernels.nn.batch import Batch
from ulr_kernels.nn.call import gradient_buffer


class DataParallelBatch:
    """The whole batch of a `DistributedDataParallel`: each rank has a micro-batch of it, in the order of the ranks.

    A rank's noise is its slice of the whole batch's, so that ranks have different noise, and all together that of one
    process with the whole batch. The ranks must have one seed and be at one step. A lost rank shows as an error of the
    process group.
    """

    def __init__(self, model: nn.parallel.DistributedDataParallel) -> None:
        self._model = model  # `no_sync()` sets a flag there

    def locate(self, batch: Batch, device: torch.device) -> Batch:
        """This rank's micro-batch, with its place in the whole batch. Sizes may differ, so the ranks exchange them."""
        group = self._model.process_group
        own = torch.tensor(batch.samples, device=device)
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, own, group=group)
        sizes = torch.stack(gathered).tolist()
        return batch.located(sum(sizes[: dist.get_rank(group)]), batch.samples * len(sizes) / sum(sizes))

    def union(self, values: Iterable[Any]) -> set[Any]:
        """The values, which can be hashed and pickled, of all ranks."""
        group = self._model.process_group
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, list(values), group=group)
        return {value for of_rank in gathered for value in of_rank}

    def sum_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Make each tensor its sum over the ranks."""
        kinds: dict[tuple, list[torch.Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for of_kind in kinds.values():  # one exchange, not one for each tensor
            flat = torch.cat([tensor.flatten() for tensor in of_kind])
            dist.all_reduce(flat, group=self._model.process_group)
            parts = flat.split([tensor.numel() for tensor in of_kind])
            for tensor, part in zip(of_kind, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def average(self, parameters: Iterable[torch.Tensor]) -> None:
        """Make `.grad` the mean over the ranks, unless inside `no_sync()`.

        As in DistributedDataParallel this is all of `.grad`: the part that earlier calls averaged is the same on all
        ranks and stays; the part that they left under `no_sync()` is averaged now.
        """
        if not self._model.require_backward_grad_sync:
            return
        gradients = [gradient_buffer(parameter) for parameter in parameters if parameter.requires_grad]
        for gradient in gradients:
            gradient.div_(dist.get_world_size(self._model.process_group))
        self.sum_(gradients)
