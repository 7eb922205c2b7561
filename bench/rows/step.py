"""A whole step of an MLP: the gradients of all its layers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import ulr_kernels as ulr
from bench import rivals
from bench.rows.row import SIGMA, Contestant, Row, normal, ours
from ulr_kernels.ops._op import Cost

MLP = (784, 256, 128, 10)


def layerwise_cost(sizes: tuple[int, ...], batch: int, copies: int) -> Cost:
    """For each layer: its clean product, its noise, the layers after it on all copies, its gradient."""
    layers = list(zip(sizes, sizes[1:], strict=False))
    size = flops = noise = 0
    for number, (inputs, features) in enumerate(layers):
        out = batch * features
        size += 4 * (batch * inputs + 3 * inputs * features + 2 * copies * out)
        flops += 2 * 2 * out * inputs  # the clean product, and the gradient's
        noise += 2 * copies // 2 * out  # made for the forward pass, and again for the gradient
        for k, n in layers[number + 1 :]:
            size += 4 * (k * n + 2 * copies * batch * n)
            flops += 2 * copies * batch * k * n
    return Cost(size, flops, noise)


def one_call(model: torch.nn.Sequential, copies: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The same step as one op, which is handed the model's layers."""
    layers = [module for module in model if isinstance(module, torch.nn.Linear)]
    weights, biases = [layer.weight.detach() for layer in layers], [layer.bias.detach() for layer in layers]
    buffers = [torch.zeros_like(w) for w in weights], [torch.zeros_like(b) for b in biases]
    keys = torch.arange(len(layers), device=weights[0].device)
    settings = {"copies": copies, "antithetic": True, "injection": "layerwise", "baseline": "clean"}
    return lambda x, y: ulr.ops.noisy_mlp_step(*buffers, x, y, weights, biases, SIGMA, keys, **settings)


def step_row(batch: int, copies: int, device: str = "cpu", names=(None,)) -> Row:
    """Gradients of all layers of the MLP by layer-wise noise, antithetic, relative to the clean loss."""
    source = rivals.generator(device)
    loss_fn = functools.partial(F.cross_entropy, reduction="none")
    model, theirs = rivals.mlp(MLP).to(device), rivals.mlp(MLP, rivals.NoisyLinear).to(device)

    @functools.cache
    def estimator() -> ulr.ULR:
        settings = {"injection": "layerwise", "noise": "logits", "baseline": "clean"}
        return ulr.ULR(model, sigma=SIGMA, copies=copies, antithetic=True, seed=0, **settings)

    def make(i: int) -> tuple:
        y = torch.arange(batch, device=device) * 7 % MLP[-1]
        return normal(i, batch, MLP[0], device=device), y

    return Row(
        name=f"ULR step, MLP, batch {batch}, {copies} copies",
        inputs=make,
        contestants={
            **ours(lambda x, y: estimator().backward(x, y, loss_fn), names),
            **{
                f"{name}, one call": contestant
                for name, contestant in ours(one_call(model, copies), names).items()
                if contestant.backend != "triton"
            },
            "authors' way": Contestant(lambda x, y: rivals.authors_step(theirs, x, y, loss_fn, SIGMA, copies, source)),
            "backpropagation": Contestant(lambda x, y: rivals.backprop_step(model, x, y, loss_fn)),
        },
        cost=layerwise_cost(MLP, batch, copies),
        memory=True,
    )
