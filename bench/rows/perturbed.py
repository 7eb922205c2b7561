"""Weight noise: a layer of one perturbed weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import ulr_kernels as ulr
from bench import rivals
from bench.rows.conv import Sizes, operands, shapes, text_of
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
    contestants["eager"] = Contestant(lambda x, w, b, key: F.linear(x, rivals.perturbed(w, SIGMA, source), b))
    x, weight = shaped(rows, inputs, dtype=dtype), shaped(features, inputs, dtype=dtype)
    return Row(
        name=f"perturbed_linear {dist} {kind_of(dtype)} {rows}x{inputs}x{features}" + threads_text(threads),
        inputs=make,
        contestants=contestants,
        cost=OPS["perturbed_linear"].floor(x, weight, None, None, None),
        dist=dist,
        kind=kind_of(dtype),
        threads=threads,
    )


def perturbed_conv_row(
    sizes: Sizes, dist: str, dtype: torch.dtype = torch.float32, device: str = "cpu", names=(None,)
) -> Row:
    """The same of a convolution, 3 x 3 with padding 1."""
    source = rivals.generator(device)

    def run(x: Tensor, w: Tensor, b: Tensor, key: Tensor) -> Tensor:
        return ulr.ops.perturbed_conv2d(x, w, b, SIGMA, key, padding=1, dist=dist)

    contestants = ours(run, names)
    contestants["noiseless F.conv2d"] = Contestant(lambda x, w, b, key: F.conv2d(x, w, b, padding=1))
    contestants["eager"] = Contestant(
        lambda x, w, b, key: F.conv2d(x, rivals.perturbed(w, SIGMA, source), b, padding=1)
    )
    x, weight = shapes(sizes, dtype)
    return Row(
        name=f"perturbed_conv2d {dist} {kind_of(dtype)} {text_of(sizes, 1, False)}",
        inputs=lambda i: (*operands(i, sizes, dtype, device, False), key_of(i, device)),
        contestants=contestants,
        cost=OPS["perturbed_conv2d"].floor(x, weight, None, None, None, [1, 1], [1] * 4, [1, 1], 1),
        dist=dist,
        kind=kind_of(dtype),
    )


def perturbed_embedding_row(
    rows: int,
    table: tuple[int, int],
    dist: str,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    names=(None,),
) -> Row:
    """The same of an embedding: rows of a table."""
    source = rivals.generator(device)

    def make(i: int) -> tuple:
        ids = torch.arange(rows, device=device) * 7919 % table[0]
        return ids, normal(i, *table, device=device).to(dtype), key_of(i, device)

    contestants = ours(lambda ids, w, key: ulr.ops.perturbed_embedding(ids, w, SIGMA, key, dist=dist), names)
    contestants["noiseless F.embedding"] = Contestant(lambda ids, w, key: F.embedding(ids, w))
    contestants["eager"] = Contestant(lambda ids, w, key: F.embedding(ids, rivals.perturbed(w, SIGMA, source)))
    contestants["eager, rows alone"] = Contestant(lambda ids, w, key: rivals.perturbed(w[ids], SIGMA, source))
    return Row(
        name=f"perturbed_embedding {dist} {kind_of(dtype)} {rows} of {table[0]}x{table[1]}",
        inputs=make,
        contestants=contestants,
        cost=OPS["perturbed_embedding"].floor(
            torch.empty(rows, device="meta"), shaped(*table, dtype=dtype), None, None
        ),
        dist=dist,
        kind=kind_of(dtype),
    )
