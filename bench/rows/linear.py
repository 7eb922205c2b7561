"""The ops of a linear layer: forward, gradient, recompute."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import ulr_kernels as ulr
from bench import rivals
from bench.rows.row import SIGMA, Contestant, Row, compiled, key_of, kind_of, normal, ours, shaped, threads_text
from ulr_kernels.ops._op import OPS


def linear_row(
    rows: int,
    inputs: int,
    features: int,
    copies: int,
    dtype: torch.dtype,
    device: str = "cpu",
    threads: int | None = None,
    names=(None,),
) -> Row:
    source = rivals.generator(device)

    def make(i: int) -> tuple:
        x, weight = normal(3 * i, rows, inputs, device=device), normal(3 * i + 1, features, inputs, device=device)
        bias = normal(3 * i + 2, features, device=device)
        return x.to(dtype), (weight / inputs**0.5).to(dtype), bias.to(dtype), key_of(i, device)

    contestants = ours(lambda x, w, b, key: ulr.ops.noisy_linear(x, w, b, SIGMA, key, copies=copies), names)
    contestants["noiseless F.linear"] = Contestant(lambda x, w, b, key: F.linear(x, w, b))
    if device == "cpu":
        contestants["noiseless oneDNN"] = Contestant(lambda x, w, b, key: rivals.onednn_linear(x, w, b))
    if copies > 1:
        contestants["eager, input repeated"] = Contestant(
            lambda x, w, b, key: rivals.repeat_input(x, w, b, SIGMA, copies, source)
        )
    name = "eager, product repeated" if copies > 1 else "eager"
    contestants[name] = Contestant(lambda x, w, b, key: rivals.repeat_product(x, w, b, SIGMA, copies, source))
    eager = compiled(rivals.compilable)
    contestants["torch.compile"] = Contestant(lambda x, w, b, key: eager(x, w, b, SIGMA, copies))
    x, weight = shaped(rows, inputs, dtype=dtype), shaped(features, inputs, dtype=dtype)
    return Row(
        name=f"noisy_linear {kind_of(dtype)} {rows}x{inputs}x{features}"
        + (f", {copies} copies" if copies > 1 else "")
        + threads_text(threads),
        inputs=make,
        contestants=contestants,
        cost=OPS["noisy_linear"].floor(x, weight, None, None, None, copies, False),
        kind=kind_of(dtype),
        threads=threads,
        memory=copies > 1,
    )


def gradient_row(
    rows: int, inputs: int, features: int, copies: int, dtype: torch.dtype, device: str = "cpu", names=(None,)
) -> Row:
    """Antithetic copies that share x. The buffers are fp32; the rivals' results are not even added to them."""
    source = rivals.generator(device)

    def make(i: int) -> tuple:
        buffers = torch.zeros(features, inputs, device=device), torch.zeros(features, device=device)
        x, loss_weight = normal(2 * i, rows, inputs, device=device), normal(2 * i + 1, copies, rows, device=device)
        return *buffers, x.to(dtype), loss_weight / (copies * rows), key_of(i, device)

    def keep(repeat: bool, half: bool) -> Callable:
        def kept(gw: Tensor, gb: Tensor, x: Tensor, lw: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            noise = rivals.randn_like(torch.empty(0, features, device=device, dtype=dtype), copies // 2 * rows, source)
            return x.repeat(copies, 1) if repeat else x, noise if half else torch.cat([noise, -noise])

        return kept

    def rival(function: Callable) -> Callable:
        return lambda gw, gb, x, lw, key, kept: function(*kept, lw.to(dtype), SIGMA)

    def run(gw: Tensor, gb: Tensor, x: Tensor, lw: Tensor, key: Tensor) -> None:
        ulr.ops.noisy_linear_grad_(gw, gb, x, lw, SIGMA, key, antithetic=True)

    buffers = shaped(features, inputs), shaped(features)
    x, loss_weight = shaped(rows, inputs, dtype=dtype), shaped(copies, rows)
    return Row(
        name=f"gradient {kind_of(dtype)} {rows}x{inputs}x{features}, {copies} copies",
        inputs=make,
        contestants={
            **ours(run, names),
            "authors' way": Contestant(rival(rivals.authors_gradient), keep(repeat=True, half=False)),
            "eager, reduced first": Contestant(rival(rivals.reduced_gradient), keep(repeat=False, half=False)),
            "eager, half kept": Contestant(rival(rivals.paired_gradient), keep(repeat=False, half=True)),
            "torch.compile": Contestant(rival(compiled(rivals.reduced_gradient)), keep(repeat=False, half=False)),
        },
        cost=OPS["noisy_linear_grad_"].floor(*buffers, None, x, loss_weight, None, None, True),
        kind=kind_of(dtype),
        memory=True,
    )


def recompute_row(
    rows: int, inputs: int, features: int, copies: int, dtype: torch.dtype, device: str = "cpu", names=(None,)
) -> Row:
    """A second pass with known losses: the noised output and the gradient."""
    source = rivals.generator(device)
    gradient = gradient_row(rows, inputs, features, copies, dtype, device, names)

    def make(i: int) -> tuple:
        gw, gb, x, lw, key = gradient.inputs(i)
        weight, bias = normal(2 * i + 7, features, inputs, device=device), normal(2 * i + 8, features, device=device)
        return gw, gb, x, (weight / inputs**0.5).to(dtype), bias.to(dtype), lw, key

    def fused(gw, gb, x, w, b, lw, key):
        return ulr.ops.noisy_linear_recompute_(gw, gb, x, w, b, lw, SIGMA, key, antithetic=True)

    def apart(gw, gb, x, w, b, lw, key):
        y = ulr.ops.noisy_linear(x, w, b, SIGMA, key, copies=copies, antithetic=True)
        ulr.ops.noisy_linear_grad_(gw, gb, x, lw, SIGMA, key, antithetic=True)
        return y

    def eager(gw, gb, x, w, b, lw, key):
        clean = F.linear(x, w, b)
        half = rivals.randn_like(clean, copies // 2 * rows, source)
        y = clean + SIGMA * torch.cat([half, -half]).view(copies, rows, -1)
        return y, rivals.paired_gradient(x, half, lw.to(dtype), SIGMA)

    buffers = shaped(features, inputs), shaped(features)
    x, loss_weight = shaped(rows, inputs, dtype=dtype), shaped(copies, rows)
    weight = shaped(features, inputs, dtype=dtype)
    return Row(
        name=f"recompute {kind_of(dtype)} {rows}x{inputs}x{features}, {copies} copies",
        inputs=make,
        contestants={
            **ours(fused, names),
            "two ops": Contestant(apart, backend=names[0]),
            "eager, half kept": Contestant(eager),
        },
        cost=OPS["noisy_linear_recompute_"].floor(*buffers, None, x, weight, None, loss_weight, None, None, True),
        kind=kind_of(dtype),
    )
