"""Perturbing and updating all parameters of a language model, beside passes over the same memory."""

from __future__ import annotations

import torch
from torch import Tensor

import ulr_kernels as ulr
from bench import rivals
from bench.rows.noise import fill
from bench.rows.row import Contestant, Row, key_of, ours, shaped
from ulr_kernels.ops._op import OPS

SCALE = 1e-3
BUFFER = 2**20  # values: noise that a cache holds


def language_model(layers: int, width: int, inner: int, grouped: int, vocabulary: int) -> list[tuple[int, ...]]:
    """Shapes of a transformer's parameters: grouped-query attention, gated feed-forward, tied embeddings."""
    layer = [(width, width), (grouped, width), (grouped, width), (width, width)]
    layer += [(inner, width), (inner, width), (width, inner), (width,), (width,)]
    return [(vocabulary, width), *layer * layers, (width,)]


SHAPES = language_model(30, 576, 1536, 192, 49152)  # 134.5M, as SmolLM2's


def parameters(i: int, shapes: list[tuple[int, ...]], device: str) -> tuple:
    """The list, a key for each tensor, and the scale."""
    key = key_of(i, device)
    tensors = [torch.full(shape, 0.1, device=device) for shape in shapes]
    return tensors, ulr.ops.fold_in(key, torch.arange(len(shapes), device=device)), torch.tensor(SCALE, device=device)


def one_pass(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.mul_(1.0)


def perturb_row(dist: str, shapes: list[tuple[int, ...]] = SHAPES, device: str = "cpu", names=(None,)) -> Row:
    source = rivals.generator(device)

    def eager(tensors: list[Tensor], keys: Tensor, scale: Tensor) -> None:
        for tensor in tensors:
            z = torch.normal(0.0, 1.0, tensor.shape, generator=source, device=device)
            tensor.add_(z, alpha=SCALE)

    return Row(
        name=f"perturb_ {dist} {sum(torch.Size(s).numel() for s in shapes) / 1e6:.1f}M",
        inputs=lambda i: parameters(i, shapes, device),
        contestants={
            **ours(lambda tensors, keys, scale: ulr.ops.perturb_(tensors, keys, scale, dist=dist), names),
            "mul_": Contestant(lambda tensors, keys, scale: one_pass(tensors)),
            **({"eager normal, add_": Contestant(eager)} if dist == "normal" else {}),
        },
        cost=OPS["perturb_"].floor([shaped(*shape) for shape in shapes], None, None),
        dist=dist,
    )


def combine_row(probes: int, shapes: list[tuple[int, ...]] = SHAPES, device: str = "cpu", names=(None,)) -> Row:
    """Beside the least that the work can be split into: each probe's noise, kept in cache, and one pass."""
    coefficients = torch.full((probes,), SCALE, device=device)
    count = sum(torch.Size(shape).numel() for shape in shapes)

    def noise_and_pass(tensors: list[Tensor], keys: Tensor, scale: Tensor) -> None:
        out = torch.empty(BUFFER // 1024, 1024, device=device)
        for _ in range(probes * count // BUFFER):
            fill(out, keys[0], "normal")
        one_pass(tensors)

    return Row(
        name=f"combine_ {probes} probes {count / 1e6:.1f}M",
        inputs=lambda i: parameters(i, shapes, device),
        contestants={
            **ours(lambda tensors, keys, scale: ulr.ops.combine_(tensors, keys, coefficients), names),
            "noise of each probe, one pass": Contestant(noise_and_pass),
        },
        cost=OPS["combine_"].floor([shaped(*shape) for shape in shapes], None, coefficients, [], [], []),
    )
