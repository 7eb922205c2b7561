"""A rank of test_serving.py: python serving_run.py RANK STORE OUT. A tensor-parallel block of two ranks."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from small_models import v
from torch import Tensor, nn

from ulr_kernels.optim import Shard, WorkerExtension

HIDDEN, INNER, RANKS = 8, 12, 2
SEEDS, COEFFICIENTS, SIGMA = [3, 2**63 + 5, -7], [0.5, -0.25, 0.125], 0.1


class Block(nn.Module):
    """Queries and values, merged into one weight; a second layer, split by columns; a norm, whole on all ranks.

    `rank` of `ranks`: which part of it.
    """

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        super().__init__()
        own = slice(rank * INNER // ranks, (rank + 1) * INNER // ranks)
        query, value, out = v(1, INNER, HIDDEN), v(2, INNER, HIDDEN), v(3, HIDDEN, INNER)
        self.merged = nn.Parameter(torch.cat([query[own], value[own]]).bfloat16())
        self.out = nn.Parameter(out[:, own].bfloat16().contiguous())
        self.bias = nn.Parameter(v(4, INNER)[own].clone())
        self.norm = nn.Parameter(v(5, HIDDEN))
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        query, value = (x.float() @ self.merged.float().T).chunk(2, -1)
        sums = ((query + self.bias).tanh() * value) @ self.out.float().T
        if self.ranks > 1:
            dist.all_reduce(sums)
        return sums * self.norm

    def shards(self, rank: int) -> dict[str, list[Shard]]:
        """Also those of the whole block, which has one rank."""
        size = INNER // self.ranks
        first = rank * size
        return {
            "merged": [Shard("query", first, 0, 0, size), Shard("value", first, 0, size, 2 * size)],
            "out": [Shard("out", col=first)],
            "bias": [Shard("bias", col=first)],
        }


class Worker(WorkerExtension):
    def __init__(self, model: Block, rank: int) -> None:
        self.model_runner, self.rank = types.SimpleNamespace(model=model), rank

    def shards(self) -> Mapping[str, Sequence[Shard]]:
        return self.model_runner.model.shards(self.rank)


def run(rank: int, ranks: int) -> list[dict[str, Tensor]]:
    """The weights while they are perturbed, when they are restored, after an update, and the block's output then."""
    model = Block(rank, ranks)
    worker, found = Worker(model, rank), []

    def keep() -> None:
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})

    keep()
    worker.perturb(SEEDS[0], SIGMA)
    keep()
    worker.restore()
    keep()
    worker.update(SEEDS, COEFFICIENTS)
    keep()
    with torch.no_grad():
        found.append({"y": model(v(9, 2, HIDDEN))})
    return found


def main(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    torch.save(run(rank, RANKS), f"{out}{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
