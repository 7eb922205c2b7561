"""Weight noise: a linear layer of one perturbed weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import ulr_kernels as ulr
from bench import rivals
from bench.rows.row import Contestant, Row, key_of, kind_of, normal, ours, shaped, threads_text
from ulr_kernels.ops._op import OPS

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
