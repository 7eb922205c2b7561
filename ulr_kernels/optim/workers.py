"""Many workers: ranks share the probes and micro-batches of a step, exchange their losses, and take the same step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class WorkerError(RuntimeError):
    """A rank did not answer, or is not where the others are. No weight has been changed by the step."""


class Workers:
    """The ranks of a process group, by what each evaluates.

    `probe_ranks` ranks that follow one another share the probes of the same micro-batches; each such block of ranks has
    micro-batches of its own. Micro-batch j of block b counts as number `j * blocks + b` (as torch's DistributedSampler
    deals samples), and losses are summed in that order on every rank: the weights stay bitwise the same on all of
    them, and as in one process that accumulates the same micro-batches in that order.

    What a rank sends in a step, `bytes_sent` in all: 12 bytes, and 4 for each loss: of its probes and micro-batches,
    and after `accumulate_batch` of their samples.

    Args:
        group: a process group of gloo or NCCL; None for the default one. Its time-out is how long a rank waits for
            another (`torch.distributed.init_process_group(timeout=...)`).
        probe_ranks: ranks that share one micro-batch; a divisor of the group's size.

    Raises:
        ValueError: an argument breaks these rules.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, probe_ranks: int = 1) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if probe_ranks < 1 or self.size % probe_ranks:
            raise ValueError(f"ulr.optim.Workers: 'probe_ranks' must divide the {self.size} ranks, got {probe_ranks}")
        self.probe_ranks = probe_ranks
        self.blocks = self.size // probe_ranks
        self.bytes_sent = 0

    def own(self, probes: int) -> range:
        """The places of the probes that this rank evaluates."""
        return self._places(self.rank, probes)

    def _places(self, rank: int, probes: int) -> range:
        share = rank % self.probe_ranks
        return range(share * probes // self.probe_ranks, (share + 1) * probes // self.probe_ranks)

    def exchange(self, losses: Sequence[Tensor], step: int) -> Tensor:
        """The losses of all micro-batches, in their order.

        Args:
            losses: of this rank's micro-batches, fp32 `[probes, samples]` each; only its own probes' rows count.
            step: where this rank is.

        Returns:
            fp32 `[micro-batches, probes, samples]`, bitwise the same on every rank.

        Raises:
            WorkerError: a rank did not answer in time or has gone, or ranks are at different steps or have different
                numbers of micro-batches.
        """
        count, probes, samples = len(losses), *losses[0].shape
        header = torch.tensor([step & 0x7FFFFFFF, count, probes * samples], dtype=torch.int32, device="cpu")
        own = self.own(probes)
        mine = losses[0].new_zeros(count, -(-probes // self.probe_ranks), samples)
        mine[:, : len(own)] = torch.stack(list(losses))[:, own]
        try:
            # Headers first: ranks whose losses differ in size must not meet in one exchange.
            headers = self._gather(header.to(mine.device))
            wrong = [rank for rank, other in enumerate(headers) if not torch.equal(other.cpu(), header)]
            parts = [] if wrong else self._gather(mine)
        except RuntimeError as error:
            raise WorkerError(
                f"ulr.optim: rank {self.rank} of {self.size} did not hear from the others at step {step}; its weights "
                "are those before that step"
            ) from error
        if wrong:
            raise WorkerError(
                "ulr.optim: all ranks must be at one step with as many micro-batches and losses of each, got "
                f"{header.tolist()} on rank {self.rank}, {headers[wrong[0]].tolist()} on rank {wrong[0]}"
            )
        self.bytes_sent += header.nbytes + mine.nbytes
        result = mine.new_empty(count, self.blocks, probes, samples)
        for rank, part in enumerate(parts):
            places = self._places(rank, probes)
            result[:, rank // self.probe_ranks, places] = part[:, : len(places)]
        return result.flatten(0, 1)

    def _gather(self, mine: Tensor) -> list[Tensor]:
        received = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(received, mine, group=self.group)
        return received
