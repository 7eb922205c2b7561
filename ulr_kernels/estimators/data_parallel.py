"""Data-parallel ranks: their micro-batches are slices of one whole batch, and their gradients are averaged."""

from __future__ import annotations

from collections.abc import Iterable

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

    def sum_(self, tensors: list[torch.Tensor]) -> None:
        """Make each tensor its sum over the ranks."""
        for tensor in tensors:
            dist.all_reduce(tensor, group=self._model.process_group)

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make `.grad` the mean over the ranks, unless inside `no_sync()`.

        As in DistributedDataParallel this is all of `.grad`: the part that earlier calls averaged is the same on all
        ranks and stays; the part that they left under `no_sync()` is averaged now.
        """
        if not self._model.require_backward_grad_sync:
            return
        group = self._model.process_group
        kinds: dict[tuple, list[torch.Tensor]] = {}
        for parameter in parameters:
            if parameter.requires_grad:
                gradient = gradient_buffer(parameter)
                kinds.setdefault((gradient.dtype, gradient.device), []).append(gradient)
        for gradients in kinds.values():  # one exchange, not one for each parameter
            flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(dist.get_world_size(group))
            dist.all_reduce(flat, group=group)
            parts = flat.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
