"""The gradients of all layers of a model in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

import ulr_kernels as ulr
from bench.rows.row import SIGMA, Contestant, Row, key_of, kind_of, normal, ours, shaped
from ulr_kernels.ops._op import OPS


def grouped_row(
    layers: int, width: int, batch: int, copies: int, dtype: torch.dtype, device: str = "cpu", names=(None,)
) -> Row:
    """Equal layers, copies sharing each one's input, antithetic; the rival launches one gradient after another."""
    sigma = torch.tensor(SIGMA, device=device)
    keys = [key_of(layer, device) for layer in range(layers)]
    grads = [torch.zeros(width, width, device=device) for _ in range(layers)]
    biases = [torch.zeros(width, device=device) for _ in range(layers)]

    def make(i: int) -> tuple[Tensor, Tensor]:
        return normal(i, batch, width, device=device, dtype=dtype), normal(i + 1, copies, batch, device=device)

    def grouped(x: Tensor, loss: Tensor) -> None:
        each = ([x] * layers, [loss] * layers, [sigma] * layers, keys)
        ulr.ops.foreach_noisy_linear_grad_(grads, biases, *each, antithetic=True)

    def one_by_one(x: Tensor, loss: Tensor) -> None:
        for buffer, bias, key in zip(grads, biases, keys, strict=True):
            ulr.ops.noisy_linear_grad_(buffer, bias, x, loss, sigma, key, antithetic=True)

    x, loss = shaped(batch, width, dtype=dtype), shaped(copies, batch)
    empty = [shaped(width, width)] * layers, [shaped(width)] * layers
    each = ([x] * layers, [loss] * layers, [shaped()] * layers, [shaped(dtype=torch.int64)] * layers)
    return Row(
        name=f"gradients of {layers} layers {width} x {width}, batch {batch}, {copies} copies, {kind_of(dtype)}",
        inputs=make,
        contestants={
            **ours(grouped, tuple(name for name in names if name != "triton")),
            "one launch a layer": Contestant(one_by_one),
        },
        cost=OPS["foreach_noisy_linear_grad_"].floor(*empty, *each, True, "normal", "iid", [], 0, [], []),
        kind=kind_of(dtype),
    )
