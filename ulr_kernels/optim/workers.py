"""Many workers: ranks share the probes and micro-batches of a step, exchange their losses, and take the same step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    # Its functions have the default group of the time of their import as default arguments, and torch's optimisers
    # import it. Imported after init_process_group it would keep the group, and gloo's threads, beyond
    # destroy_process_group: such a thread can abort a process that ends.
    import torch.distributed.nn  # noqa: F401


class WorkerError(RuntimeError):
    """A rank did not answer, or is at another step than the others. The step has changed no weight."""


class Workers:
    """The ranks of a process group, each with its part of the probes and micro-batches.

    `probe_ranks` ranks that follow one another share the probes of the same micro-batches, by whole forwards; each such
    block of ranks has micro-batches of its own. Micro-batch j of block b counts as number `j * blocks + b` (as torch's
    DistributedSampler deals samples), and losses are summed in that order on every rank: the weights stay bitwise the
    same on all of them, and as in one process that accumulates the same micro-batches in that order.

    In a step a rank sends 16 bytes, and 4 for each loss of its probes and micro-batches, `bytes_sent` in all. ES sends
    8 for each, and with `shaping="group"` 4 for each sample. Where every rank has left parameters unused, it sends a
    byte for each parameter too: those that no rank has used stay as they are.

    A loss that draws random numbers draws the same ones in all forwards of a micro-batch on one rank. Ranks that share
    probes must begin each micro-batch with equal generators: seed them alike.

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

    def batches(self, count: int) -> range:
        """The numbers of the micro-batches that this rank evaluates, of `count` in a step."""
        return range(self.rank // self.probe_ranks, count, self.blocks)

    def own(self, forwards: int) -> range:
        """The numbers of the forwards of a micro-batch that this rank evaluates, of `forwards`."""
        return self._share(self.rank, forwards)

    def _share(self, rank: int, forwards: int) -> range:
        share = rank % self.probe_ranks
        return range(share * forwards // self.probe_ranks, (share + 1) * forwards // self.probe_ranks)

    def exchange(
        self, losses: Sequence[Tensor], forwards: Sequence[Sequence[int]], step: int, unused: Sequence[bool]
    ) -> tuple[Tensor, list[bool]]:
        """The losses of all micro-batches, in their order, and the parameters that no rank has used.

        Args:
            losses: of this rank's micro-batches, `[probes, columns]` each; only its own forwards' rows count.
            forwards: of a micro-batch: the rows of each.
            step: where this rank is.
            unused: of each parameter, whether this rank has not used it.

        Returns:
            The losses `[micro-batches, probes, columns]`, bitwise the same on every rank, and whether each parameter
            was used by no rank.

        Raises:
            WorkerError: a rank did not answer in time or has gone, or ranks are at different steps or have different
                numbers of micro-batches, losses, or probes in a forward.
        """
        count, probes, columns = len(losses), *losses[0].shape
        shares = [
            [row for forward in self._share(rank, len(forwards)) for row in forwards[forward]]
            for rank in range(self.probe_ranks)
        ]
        own = shares[self.rank % self.probe_ranks]
        mine = losses[0].new_zeros(count, max(map(len, shares)), columns)
        mine[:, : len(own)] = torch.stack(list(losses))[:, own]
        # Headers first: ranks whose losses differ in size must not meet in one exchange. How many probes a forward has
        # at most says which rank has which.
        # A negative count says that the rank has left parameters unused.
        sizes = [step & 0x7FFFFFFF, count, probes * columns, max(map(len, forwards))]
        header = torch.tensor(sizes, dtype=torch.int32, device="cpu")
        sent = header.clone()
        sent[1] *= -1 if any(unused) else 1
        lost = f"at step {step}; its weights are those before that step"
        headers = self.gather(sent, lost)
        for rank, other in enumerate(headers):
            if not torch.equal(other.abs(), header):
                raise WorkerError(
                    "ulr.optim: all ranks must be at one step with as many micro-batches, losses of each and probes in "
                    f"a forward, got {sizes} on rank {self.rank}, {other.tolist()} on rank {rank}"
                )
        result = mine.new_empty(count, self.blocks, probes, columns)
        for rank, part in enumerate(self.gather(mine, lost)):
            rows = shares[rank % self.probe_ranks]
            result[:, rank // self.probe_ranks, rows] = part[:, : len(rows)]
        if all(other[1] < 0 for other in headers):
            mask = torch.tensor(unused, dtype=torch.uint8, device=losses[0].device)
            unused = torch.stack(self.gather(mask, lost)).amin(0).bool().tolist()
        else:
            unused = [False] * len(unused)
        return result.flatten(0, 1), list(unused)

    def agree(self, values: Mapping[str, object]) -> None:
        """Check that all ranks have the same values, as their `repr` tells.

        Raises:
            WorkerError: they differ, or a rank did not answer in time or has gone.
        """
        mine = torch.tensor([_digest(value) for value in values.values()], device="cpu")
        for rank, other in enumerate(self.gather(mine, "when all were to agree")):
            for name, same in zip(values, (other == mine).tolist(), strict=True):
                if not same:
                    raise WorkerError(
                        f"ulr.optim: all ranks must have the same {name}, got {values[name]!r} on rank {self.rank} and "
                        f"another on rank {rank}"
                    )

    def gather(self, mine: Tensor, when: str) -> list[Tensor]:
        """The tensors of all ranks, of one shape and dtype, in their order.

        Raises:
            WorkerError: a rank did not answer in time or has gone; the message ends with `when`.
        """
        sent = mine.to({"gloo": "cpu", "nccl": "cuda"}.get(dist.get_backend(self.group), mine.device))
        received = [torch.empty_like(sent) for _ in range(self.size)]
        try:
            dist.all_gather(received, sent, group=self.group)
            received = [other.to(mine.device) for other in received]
        except RuntimeError as error:
            raise WorkerError(
                f"ulr.optim: rank {self.rank} of {self.size} did not hear from the others {when}"
            ) from error
        self.bytes_sent += sent.nbytes
        return received


def _digest(value: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little", signed=True)
