"""Filling a tensor with noise, beside the generators that people use."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

import ulr_kernels as ulr
from bench import rivals
from bench.rows.row import Contestant, Row, key_of, ours, threads_text
from ulr_kernels import dispatch
from ulr_kernels.ops._op import OPS, NoiseSpec
from ulr_kernels.ops.noise import Noise


def fill(out: Tensor, key: Tensor, dist: str) -> None:
    """The op without the allocation of its result, which `tensor.normal_()` does not have either."""
    dispatch.lookup("noise", out.device)(out, Noise(list(out.shape), NoiseSpec(key, dist=dist)))


def laplace_(out: Tensor, source: torch.Generator) -> Tensor:
    """Unit-variance Laplace noise in eager torch, by the inverse of its distribution function."""
    uniform = out.uniform_(-1, 1, generator=source)
    return torch.log1p(-uniform.abs()).mul_(0.5**0.5).copysign_(uniform)


def noise_row(
    dist: str, size: int, device: str = "cpu", threads: int | None = None, in_cache: bool = False, names=(None,)
) -> Row:
    source = rivals.generator(device)
    eager = {
        "normal": {"tensor.normal_": lambda out, key: out.normal_(generator=source)},
        "laplace": {"eager inverse CDF": lambda out, key: laplace_(out, source)},
        "rademacher": {"tensor.bernoulli_": lambda out, key: out.bernoulli_(generator=source)},
    }[dist]
    contestants = ours(lambda out, key: fill(out, key, dist), names)
    if threads and threads > 1:
        contestants["ulr, one thread"] = Contestant(contestants["ulr"].run, threads=1)
    contestants |= {name: Contestant(run) for name, run in eager.items()}
    if dist == "normal" and threads == 1:
        philox = numpy.random.Generator(numpy.random.Philox(0))
        contestants["numpy Philox"] = Contestant(
            lambda out, key: philox.standard_normal(out=out.numpy(), dtype=numpy.float32)
        )
    return Row(
        name=f"{dist} fill 2^{size.bit_length() - 1}" + ", in cache" * in_cache + threads_text(threads),
        inputs=lambda i: (torch.empty(size // 1024, 1024, device=device), key_of(i, device)),
        contestants=contestants,
        cost=OPS["noise"].floor(None, [size]),
        dist=dist,
        threads=threads,
        in_cache=in_cache,
    )


def randn_row(size: int, device: str = "cpu", threads: int | None = None, names=(None,)) -> Row:
    source = rivals.generator(device)
    return Row(
        name=f"ulr.noise 2^{size.bit_length() - 1}" + threads_text(threads),
        inputs=lambda i: (key_of(i, device),),
        contestants={
            **ours(lambda key: ulr.noise((size // 1024, 1024), key), names),
            "torch.randn": Contestant(lambda key: torch.randn(size // 1024, 1024, generator=source, device=device)),
        },
        cost=OPS["noise"].floor(None, [size]),
        threads=threads,
    )
