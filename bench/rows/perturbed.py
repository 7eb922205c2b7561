"""Weight noise: a linear layer of one perturbed weight, and a step of a population of low-rank members."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ulr_kernels as ulr
from bench import rivals
from bench.rows.row import Contestant, Row, key_of, kind_of, normal, ours, shaped, threads_text
from ulr_kernels.ops._op import OPS, Cost

SIGMA = 1e-3


def perturbed_row(
    rows: int,
    inputs: int,
    features: int,
    dist: str = "normal",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    threads: int | None = None,
    names=(None,),
) -> Row:
    """One member: what each of MeZO's two forwards does to a layer."""
    source = rivals.generator(device)

    def make(i: int) -> tuple:
        x, weight = normal(3 * i, rows, inputs, device=device), normal(3 * i + 1, features, inputs, device=device)
        bias = normal(3 * i + 2, features, device=device)
        return x.to(dtype), (weight / inputs**0.5).to(dtype), bias.to(dtype), key_of(i, device)

    def run(x: Tensor, w: Tensor, b: Tensor, key: Tensor) -> Tensor:
        return ulr.ops.perturbed_linear(x, w, b, SIGMA, key, dist=dist)

    contestants = ours(run, names)
    contestants["noiseless F.linear"] = Contestant(lambda x, w, b, key: F.linear(x, w, b))
    if device == "cpu":
        contestants["noiseless oneDNN"] = Contestant(lambda x, w, b, key: rivals.onednn_linear(x, w, b))
    contestants["eager"] = Contestant(lambda x, w, b, key: rivals.perturbed_linear(x, w, b, SIGMA, source))
    x, weight = shaped(rows, inputs, dtype=dtype), shaped(features, inputs, dtype=dtype)
    return Row(
        name=f"perturbed_linear {dist} {kind_of(dtype)} {rows}x{inputs}x{features}" + threads_text(threads),
        inputs=make,
        contestants=contestants,
        cost=OPS["perturbed_linear"].cost(x, weight, None, None, None),
        dist=dist,
        kind=kind_of(dtype),
        threads=threads,
    )


def eggroll_row(
    width: int, population: int, rank: int, rows: int, device: str = "cpu", names=(None,), packages: bool = True
) -> Row:
    """A step of a population: the forward of all members, each on rows of its own, and the update of the weight."""

    def make(i: int) -> tuple:
        x = normal(2 * i, population, rows, width, device=device)
        return x, normal(2 * i + 1, width, width, device=device) / width**0.5, key_of(i, device)

    def step(x: Tensor, w: Tensor, key: Tensor) -> None:
        y = ulr.ops.perturbed_linear(x, w, None, SIGMA, key, members=population, antithetic=True, rank=rank)
        fitness = rivals.fitness(y)
        plus, minus = ((fitness - fitness.mean()) / fitness.std()).chunk(2)
        ulr.ops.combine_([w], key[None], 1e-6 * (plus - minus), rank=rank)

    contestants = ours(step, names)
    contestants["plain forward, F.linear"] = Contestant(lambda x, w, key: F.linear(x.flatten(0, 1), w))
    if device == "cpu":
        contestants["plain forward, oneDNN"] = Contestant(
            lambda x, w, key: torch.ops.mkldnn._linear_pointwise(x.flatten(0, 1), w, None, "none", [], "")
        )
    if packages:
        contestants["torcheggroll"] = Contestant(functools.partial(_torcheggroll, population, rank))
        contestants["eggroll-es"] = Contestant(functools.partial(_eggroll_es, population, rank))
    x, weight = shaped(population, rows, width), shaped(width, width)
    forward = OPS["perturbed_linear"].cost(x, weight, None, None, None, population, True, rank)
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
