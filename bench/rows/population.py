"""Steps of a population: low-rank members beside the ports of EGGROLL, full-rank ones beside EvoX."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ulr_kernels as ulr
from bench import rivals
from bench.rows.row import Contestant, Row, key_of, normal, ours, shaped
from ulr_kernels.ops._op import OPS, Cost

SIGMA = 1e-3
LAYERS = 3


def eggroll_row(width: int, population: int, rank: int, rows: int, device: str = "cpu", names=(None,)) -> Row:
    """A step of a population: the forward of all members, each on rows of its own, and the update of the weight."""

    def make(i: int) -> tuple:
        x = normal(2 * i, population, rows, width, device=device)
        return x, normal(2 * i + 1, width, width, device=device) / width**0.5, key_of(i, device)

    def step(x: Tensor, w: Tensor, key: Tensor) -> None:
        y = ulr.ops.perturbed_linear(x, w, None, SIGMA, key, copies=population, antithetic=True, rank=rank)
        fitness = rivals.fitness(y)
        plus, minus = ((fitness - fitness.mean()) / fitness.std()).chunk(2)
        ulr.ops.combine_([w], key[None], 1e-6 * (plus - minus), rank=rank)

    contestants = ours(step, names)
    contestants["plain forward, F.linear"] = Contestant(lambda x, w, key: F.linear(x.flatten(0, 1), w))
    if device == "cpu":
        contestants["plain forward, oneDNN"] = Contestant(
            lambda x, w, key: rivals.onednn_linear(x.flatten(0, 1), w, None)
        )
    if rivals.installed(rivals.PACKAGES["torcheggroll"]):
        contestants["torcheggroll"] = Contestant(functools.partial(_torcheggroll, population, rank))
    if rivals.installed(rivals.PACKAGES["eggroll-es"]):
        contestants["eggroll-es"] = Contestant(functools.partial(_eggroll_es, population, rank))
    x, weight = shaped(population, rows, width), shaped(width, width)
    forward = OPS["perturbed_linear"].floor(x, weight, None, None, None, population, True, rank)
    update = Cost(8 * width * width, population * rank * width * width, population // 2 * rank * 2 * width)
    return Row(
        name=f"EGGROLL step, width {width}, population {population}, rank {rank}, {rows} rows a member",
        inputs=make,
        contestants=contestants,
        cost=Cost(forward.bytes + update.bytes, forward.flops + update.flops, forward.noise + update.noise),
    )


def _torcheggroll(population: int, rank: int, x: Tensor, w: Tensor, key: Tensor) -> None:
    """The package's stateless functions, which its optimiser consists of, with rows of each member's own."""
    from torcheggroll.es import compute_es_gradient, generate_noise_for_shapes

    noise = generate_noise_for_shapes({"weight": tuple(w.shape)}, {"weight": rank}, population, SIGMA, 0, w.device)
    y = torch.vmap(F.linear)(x, w + noise["weight"])
    w += 1e-6 * compute_es_gradient(noise, rivals.fitness(y))["weight"]


def _eggroll_es(population: int, rank: int, x: Tensor, w: Tensor, key: Tensor) -> None:
    """The package's sampler and update as its trainer runs them: a member at a time."""
    from eggroll.core import EggrollConfig, LowRankNoiser, evolve_step

    config = EggrollConfig(population_size=population, rank=rank, sigma=SIGMA, lr=1e-6, device=str(w.device))
    members = LowRankNoiser({"weight": w.shape}, config).sample_perturbations(population // 2)
    layer = nn.Linear(*w.shape, bias=False, device="meta")
    y = [
        torch.func.functional_call(layer, {"weight": w + member["weight"]}, own)
        for own, member in zip(x, members, strict=True)
    ]
    w.copy_(evolve_step({"weight": w}, members, rivals.fitness(torch.stack(y)), config)["weight"])


def full_rank_row(width: int, population: int, rows: int, names=(None,)) -> Row:
    """A step on a network of three linear layers: every member's losses on the same rows, and the update. No pairs
    (EvoX has none), and the same loss."""

    def make(i: int) -> tuple:
        return normal(i, rows, width, device="cpu"), torch.arange(rows) * 7 % width

    def optimizer(x: Tensor, targets: Tensor) -> ulr.optim.ES:
        return ulr.optim.ES(network(width), lr=1e-6, sigma=SIGMA, population=population, antithetic=False)

    def step(x: Tensor, targets: Tensor, optimizer: ulr.optim.ES) -> None:
        optimizer.step_batch(x, targets, losses)

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    contestants = {
        label: Contestant(mine.run, optimizer, backend=mine.backend) for label, mine in ours(step, names).items()
    }
    if rivals.installed(rivals.PACKAGES["EvoX"]):
        contestants["EvoX"] = Contestant(
            lambda x, targets, workflow: workflow.step(), functools.partial(_evox, width, population)
        )
    x, weight = shaped(population, rows, width), shaped(width, width)
    forward = OPS["perturbed_linear"].floor(x, weight, None, None, None, population)
    update = Cost(8 * width * width, 0, population * width * width)
    return Row(
        name=f"full-rank population step, {LAYERS} layers of width {width}, population {population}, {rows} rows",
        inputs=make,
        contestants=contestants,
        cost=Cost(*(LAYERS * (a + b) for a, b in zip(*map(dataclasses.astuple, (forward, update)), strict=True))),
        in_cache=True,
    )


def network(width: int) -> nn.Sequential:
    layers = [nn.Linear(width, width) for _ in range(LAYERS)]
    return nn.Sequential(layers[0], *(module for layer in layers[1:] for module in (nn.Tanh(), layer)))


def _evox(width: int, population: int, x: Tensor, targets: Tensor) -> Any:
    """Its virtual population, which is its least costly: noise made where it is used, from seeds."""
    from evox.algorithms.so.es_variants.virtual_es import VirtualES
    from evox.problems.neuroevolution.virtual_problem import VirtualProblem
    from evox.workflows import StdWorkflow

    model = network(width).requires_grad_(False)
    weights = list(model.parameters())
    shapes, centre = [tuple(w.shape) for w in weights], torch.cat([w.flatten() for w in weights])
    workflow = StdWorkflow(
        VirtualES(shapes, population, centre, 1e-6, SIGMA),
        VirtualProblem(model, [(x, targets)], nn.CrossEntropyLoss(reduction="none")),
    )
    workflow.init_step()
    return workflow
