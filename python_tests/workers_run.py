"""The program of the ranks of test_workers.py: python workers_run.py FOLDER JOB..., under torchrun's variables."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from small_models import cross_entropy, filled
from torch import nn

import ulr_kernels as ulr
from ulr_kernels.finetune import trajectory
from ulr_kernels.optim import EGGROLL, MeZO, Workers

SECONDS = 20  # of the group's time-out; ranks start apart where a machine is busy
X = ulr.noise((8, 6), 5)
Y = torch.arange(8) % 3
PARTS = [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]


def network() -> nn.Module:
    return filled(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 4)))


def loss_on(model: nn.Module, part: slice):
    return lambda: F.cross_entropy(model(X[part]), Y[part])


def mezo(model: nn.Module, **more) -> MeZO:
    return MeZO(model, lr=0.05, eps=1e-2, probes=3, momentum=0.5, **more)


def accumulate(optimizer, model, parts) -> None:
    for part in parts:
        optimizer.accumulate(loss_on(model, part))


def whole(optimizer, model: nn.Module, steps: int) -> list:
    """The same run in one process."""
    updates = []
    for _ in range(steps):
        accumulate(optimizer, model, PARTS)
        optimizer.step()
        updates.append(optimizer.last_update)
    return updates


def save(folder: Path, model: nn.Module, **more) -> None:
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.save({"weights": weights, **more}, folder / f"rank{dist.get_rank()}.pt")


# --- jobs ----------------------------------------------------------------------------------------------------


def split(folder: Path, probe_ranks: int) -> None:
    """Five steps; the probes of a micro-batch shared by so many ranks."""
    model = network()
    workers = Workers(probe_ranks=probe_ranks)
    optimizer = mezo(model, workers=workers)
    block = workers.rank // probe_ranks
    for _ in range(5):
        accumulate(optimizer, model, PARTS[block :: workers.blocks])
        optimizer.step()
    save(folder, model, sent=workers.bytes_sent)


def population(folder: Path) -> None:
    """Members of one forward, shared by ranks."""
    model = network()
    workers = Workers(probe_ranks=dist.get_world_size())
    optimizer = EGGROLL(model, 0.1, 0.05, population=10, workers=workers)
    for _ in range(3):
        optimizer.step_batch(X, Y, cross_entropy, chunk=4)
    save(folder, model, sent=workers.bytes_sent)


def unlike(folder: Path) -> None:
    """Ranks that take different forwards, or have different values; micro-batches with different forwards."""
    model, rank = network(), dist.get_rank()
    workers = Workers(probe_ranks=2)
    optimizer = EGGROLL(model, 0.1, 0.05, population=10, workers=workers)

    def uneven() -> None:
        optimizer.forget()
        for chunk in (2, 4):
            optimizer.accumulate_batch(X, Y, cross_entropy, chunk)

    errors = []
    for call in (
        lambda: optimizer.step_batch(X, Y, cross_entropy, chunk=2 + 2 * rank),
        lambda: workers.agree({"name": "one", "place": rank}),
        uneven,
    ):
        try:
            call()
        except (ulr.optim.WorkerError, ValueError) as failure:
            errors.append(str(failure))
    save(folder, model, errors=errors)


def dies(folder: Path) -> None:
    """Rank 1 is gone before the third step; the other one must say so, with the weights of the second."""
    model = network()
    optimizer = mezo(model, workers=Workers())
    error = ""
    for step in range(3):
        if dist.get_rank() == 1 and step == 2:
            os._exit(0)
        accumulate(optimizer, model, PARTS[dist.get_rank() :: 2])
        try:
            optimizer.step()
        except ulr.optim.WorkerError as failure:
            error = str(failure)
    save(folder, model, error=error, steps=optimizer.steps)
    os._exit(0)  # the group cannot be left in order


def late(folder: Path) -> None:
    """Rank 0 has run for three steps and kept a log; rank 1 joins with the base weights, and catches up from it."""
    model = network()
    optimizer = mezo(model, workers=Workers())
    log = folder / "run.log"
    if dist.get_rank() == 0:
        alone = network()
        base = trajectory.weights_digest(dict(model.named_parameters()))
        writer = trajectory.Writer.create(log, trajectory.Header(optimizer.rule, 3, base, {}))
        for update in whole(mezo(alone), alone, 3):
            writer.append(update, 0.0)
            optimizer.apply(update)
        writer.close()
    error = ""
    accumulate(optimizer, model, PARTS[dist.get_rank() :: 2])
    try:
        optimizer.step()
    except ulr.optim.WorkerError as failure:
        error = str(failure)
    if dist.get_rank() == 1:
        for update in trajectory.read(log).updates:
            optimizer.apply(update)
    optimizer.forget()
    accumulate(optimizer, model, PARTS[dist.get_rank() :: 2])
    optimizer.step()
    save(folder, model, error=error)


IMAGES = ulr.noise((24, 50), 6).view(3, 8, 2, 5, 5)  # three whole batches
LABELS = torch.arange(24).view(3, 8) % 3
ESTIMATORS = {
    "layerwise-mean": {},
    "layerwise-clean": {"baseline": "clean"},
    "joint-mean": {"injection": "joint"},
    "joint-clean": {"injection": "joint", "baseline": "clean"},
    "learnt-sigma": {"injection": "joint", "learn_sigma": True, "max_rows": 32},
    "sobol": {"sampler": "sobol", "baseline": "clean", "antithetic": False, "dist": "laplace"},
    "unequal": {"learn_sigma": True},
    "guided": {"preset": "best"},
    "unequal-guided": {"guide": "feedback", "injection": "joint", "max_rows": 16},
}


def image_network() -> nn.Module:
    return filled(nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3)))


def estimator(model: nn.Module, case: str) -> ulr.ULR:
    return ulr.ULR(model, sigma=0.3, seed=5, **{"copies": 8, **ESTIMATORS[case]})


class Heated(nn.Module):
    """Cross-entropy with a learnt temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.heat = nn.Parameter(torch.tensor(1.5))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return cross_entropy(outputs * self.heat, targets)


def gradients(estimator: ulr.ULR, loss_fn: Heated) -> list[torch.Tensor]:
    return [p.grad.clone() for p in (*estimator.model.parameters(), *estimator.parameters(), loss_fn.heat)]


def guides(estimator: ulr.ULR) -> dict[str, torch.Tensor]:
    """B of each layer's guide; none where there is no guide."""
    return {} if estimator._guides is None else {name: b.clone() for (name, _), b in estimator._guides.weights()}


def shares(case: str) -> list[slice]:
    """The parts of a batch that two ranks have."""
    first = 3 if "unequal" in case else 4
    return [slice(0, first), slice(first, 8)]


def replicas(folder: Path) -> None:
    """Three batches; the gradients of the first wait for those of the second."""
    results = {}
    for case in ESTIMATORS:
        model = nn.parallel.DistributedDataParallel(image_network())
        ours, part, loss_fn = estimator(model, case), shares(case)[dist.get_rank()], Heated()
        losses, by_step = [], []
        for step, (x, y) in enumerate(zip(IMAGES, LABELS, strict=True)):
            with model.no_sync() if step == 0 else contextlib.nullcontext():
                losses.append(ours.backward(x[part], y[part], loss_fn))
            by_step.append(gradients(ours, loss_fn))
        results[case] = {"gradients": by_step, "losses": torch.stack(losses), "guides": guides(ours)}
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")


def lengths(folder: Path) -> None:
    """Guides of ranks that pad their texts to lengths of their own, which change from step to step."""
    model = nn.parallel.DistributedDataParallel(filled(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))))
    ours, rank = ulr.ULR(model, copies=8, preset="best"), dist.get_rank()
    for step in range(3):
        x = ulr.noise((2, 1 + (step + rank) % 3, 6), 7 + step)
        ours.backward(x, None, lambda outputs, _: outputs.square().mean((1, 2)))
    found = [p.grad for p in ours.model.parameters()]
    torch.save({"gradients": found, "state": ours.state_dict()["guides"]}, folder / f"rank{rank}.pt")


class Trunk(nn.Module):
    """With an axis that two ranks cannot halve, a convolution, and a vector that is sharded too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)
        self.norm = nn.LayerNorm(8)
        self.table = nn.Embedding(7, 6)

    def forward(self, ids):
        return self.down(torch.tanh(self.norm(self.up(self.table(ids)))))


def sharded(folder: Path, kind: str) -> None:
    """FSDP2 or tensor parallelism: the losses of probes, and the weights after a known update."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = filled(Trunk())
    if kind == "fsdp":
        fully_shard(model.up, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        plan = {
            "up": ColwiseParallel(output_layouts=_replicated()),
            "down": RowwiseParallel(input_layouts=_replicated()),
        }
        parallelize_module(model, mesh, plan)
    results = {}
    for rank in (None, 2):
        optimizer = MeZO(model, lr=0.5, eps=1e-1, probes=2, rank=rank, momentum=0.5)
        optimizer.accumulate(lambda: F.cross_entropy(model(torch.arange(7)), torch.arange(7) % 5))
        results[f"losses{rank}"] = optimizer._losses[0].clone()
        optimizer.apply(known(rank))
    full = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    if dist.get_rank() == 0:
        torch.save({"weights": {n: p.detach().clone() for n, p in full.items()}, **results}, folder / "rank0.pt")


def known(rank: int | None) -> ulr.optim.Update:
    coefficients = torch.tensor([0.01, -0.02])
    return ulr.optim.Update(0, ulr.fold_in(0, 7 + (rank or 0)), coefficients, (ulr.optim.Group(0.5, 0.1, 0.01),))


def _replicated():
    from torch.distributed.tensor import Replicate

    return Replicate()


JOBS = {
    "batches": lambda folder: split(folder, 1),
    "probes": lambda folder: split(folder, 2),
    "population": population,
    "unlike": unlike,
    "dies": dies,
    "late": late,
    "replicas": replicas,
    "lengths": lengths,
    "fsdp": lambda folder: sharded(folder, "fsdp"),
    "tensor": lambda folder: sharded(folder, "tensor"),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=SECONDS))
    for job in sys.argv[2:]:
        folder = Path(sys.argv[1]) / job
        folder.mkdir(exist_ok=True)
        JOBS[job](folder)
    dist.destroy_process_group()
