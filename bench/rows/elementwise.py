"""Noise on any tensor, and the gradients of parameters that act feature by feature."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import ulr_kernels as ulr
from bench import rivals
from bench.rows.row import SIGMA, Contestant, Row, compiled, key_of, kind_of, normal, ours, shaped
from ulr_kernels.ops._op import OPS


def add_row(
    shape: tuple[int, ...], feature_dim: int, copies: int, dtype: torch.dtype, device: str = "cpu", names=(None,)
) -> Row:
    """y = x + sigma eps for copies that share x."""
    source = rivals.generator(device)

    def eager(x: Tensor, key: Tensor) -> Tensor:
        noise = torch.empty(copies, *shape, dtype=dtype, device=device).normal_(generator=source)
        return x + SIGMA * noise

    def compilable(x: Tensor) -> Tensor:
        return x + SIGMA * torch.randn(copies, *shape, dtype=dtype, device=device)

    fused = compiled(compilable)
    return Row(
        name=f"noise_add {kind_of(dtype)} {'x'.join(map(str, shape))}, {copies} copies",
        inputs=lambda i: (normal(i, *shape, device=device).to(dtype), key_of(i, device)),
        contestants={
            **ours(lambda x, key: ulr.ops.noise_add(x, SIGMA, key, feature_dim=feature_dim, copies=copies), names),
            "eager": Contestant(eager),
            "torch.compile": Contestant(lambda x, key: fused(x)),
        },
        cost=OPS["noise_add"].floor(shaped(*shape, dtype=dtype), None, None, feature_dim, copies, True, False),
        kind=kind_of(dtype),
        memory=True,
    )


def noise_dot_row(
    shape: tuple[int, ...], feature_dim: int, copies: int, dtype: torch.dtype, device: str = "cpu", names=(None,)
) -> Row:
    """sigma <eps_c, x> of each sample, for antithetic copies; rivals make the first half's noise in memory."""
    source = rivals.generator(device)
    positions = torch.Size(shape[1:]).numel() // shape[feature_dim]
    how = {"feature_dim": feature_dim, "copies": copies, "antithetic": True, "positions": positions}

    def dots(noise: Tensor, x: Tensor) -> Tensor:
        half = SIGMA * torch.einsum("cbi,bi->cb", noise.flatten(2), x.flatten(1)).float()
        return torch.cat([half, -half])

    def eager(x: Tensor, key: Tensor) -> Tensor:
        return dots(torch.empty(copies // 2, *shape, dtype=dtype, device=device).normal_(generator=source), x)

    fused = compiled(lambda x: dots(torch.randn(copies // 2, *shape, dtype=dtype, device=device), x))
    return Row(
        name=f"noise_dot {kind_of(dtype)} {'x'.join(map(str, shape))}, {copies} copies",
        inputs=lambda i: (normal(i, *shape, device=device).to(dtype), key_of(i, device)),
        contestants={
            **ours(lambda x, key: ulr.ops.noise_dot(x, SIGMA, key, **how), names),
            "eager": Contestant(eager),
            "torch.compile": Contestant(lambda x, key: fused(x)),
        },
        cost=OPS["noise_dot"].floor(shaped(*shape, dtype=dtype), None, None, copies, feature_dim, True),
        kind=kind_of(dtype),
        memory=True,
    )


def dot_row(
    shape: tuple[int, ...], feature_dim: int, copies: int, dtype: torch.dtype, device: str = "cpu", names=(None,)
) -> Row:
    """Weight and bias of a normalisation layer, antithetic copies that share x; rivals have kept half of the noise."""
    source = rivals.generator(device)
    cols = shape[feature_dim]
    axis = feature_dim % len(shape)
    positions = torch.Size(shape[1:]).numel() // cols
    over = tuple(i for i in range(len(shape)) if i != axis)

    def make(i: int) -> tuple:
        x = normal(2 * i, *shape, device=device).to(dtype)
        loss_weight = normal(2 * i + 1, copies, shape[0], device=device) / (copies * shape[0])
        return torch.zeros(cols, device=device), torch.zeros(cols, device=device), x, loss_weight, key_of(i, device)

    def run(gw: Tensor, gb: Tensor, x: Tensor, lw: Tensor, key: Tensor) -> None:
        ulr.ops.scale_shift_grad_(
            gw, gb, x, lw, SIGMA, key, feature_dim=feature_dim, positions=positions, antithetic=True
        )

    def keep(gw: Tensor, gb: Tensor, x: Tensor, lw: Tensor, key: Tensor) -> Tensor:
        return torch.empty(copies // 2, *shape, dtype=dtype, device=device).normal_(generator=source)

    def sums(x: Tensor, half: Tensor, lw: Tensor) -> tuple[Tensor, Tensor]:
        pairs = (lw[: copies // 2] - lw[copies // 2 :]).to(dtype) / SIGMA
        score = torch.einsum("cb,cb...->b...", pairs, half)
        return (score * x).sum(over), score.sum(over)

    def rival(function: Callable) -> Callable:
        return lambda gw, gb, x, lw, key, kept: function(x, kept, lw)

    buffers = shaped(cols), shaped(cols)
    return Row(
        name=f"scale_shift_grad_ {kind_of(dtype)} {'x'.join(map(str, shape))}, {copies} copies",
        inputs=make,
        contestants={
            **ours(run, names),
            "eager, half kept": Contestant(rival(sums), keep),
            "torch.compile": Contestant(rival(compiled(sums)), keep),
        },
        cost=OPS["scale_shift_grad_"].floor(
            *buffers, None, shaped(*shape, dtype=dtype), shaped(copies, shape[0]), None, None, feature_dim, True, True
        ),
        kind=kind_of(dtype),
        memory=True,
    )
