"""A whole step of a model: the gradients of all its layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ulr_kernels as ulr
from bench import rivals
from bench.rows.row import SIGMA, Contestant, Row, normal, ours
from ulr_kernels.ops._op import Cost
from ulr_kernels.recipes import models

MLP = (784, 256, 128, 10)


class Layer(NamedTuple):
    """Of one sample: numbers that a layer reads and writes, its weights, and its multiply-adds."""

    inputs: int
    weights: int
    outputs: int
    products: int


def layers_of(model: nn.Sequential, x: Tensor) -> list[Layer]:
    """The linear layers and convolutions of a model, for samples like those of x."""
    layers = []
    for module in model:
        inputs, x = x, module(x)
        if isinstance(module, nn.Linear | nn.Conv2d):
            weights = module.weight.numel()
            products = weights * x[0, 0].numel()  # of a convolution: at each pixel
            layers.append(Layer(inputs[0].numel(), weights, x[0].numel(), products))
    return layers


def layerwise_cost(layers: Sequence[Layer], batch: int, copies: Sequence[int]) -> Cost:
    """For each layer: its clean product, its noise, the layers after it on all copies, its gradient."""
    size = flops = noise = 0
    for number, (layer, count) in enumerate(zip(layers, copies, strict=True)):
        size += 4 * (batch * layer.inputs + 3 * layer.weights + 2 * count * batch * layer.outputs)
        flops += 2 * 2 * batch * layer.products  # the clean product, and the gradient's
        noise += 2 * count // 2 * batch * layer.outputs  # made for the forward pass, and again for the gradient
        for later in layers[number + 1 :]:
            size += 4 * (later.weights + 2 * count * batch * later.outputs)
            flops += 2 * count * batch * later.products
    return Cost(size, flops, noise)


def one_call(model: nn.Sequential, copies: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The same step as one op on the model's layers."""
    layers = [module for module in model if isinstance(module, nn.Linear)]
    weights, biases = [layer.weight.detach() for layer in layers], [layer.bias.detach() for layer in layers]
    buffers = [torch.zeros_like(w) for w in weights], [torch.zeros_like(b) for b in biases]
    keys = torch.arange(len(layers), device=weights[0].device)
    settings = {"copies": copies, "antithetic": True, "injection": "layerwise", "baseline": "clean"}
    return lambda x, y: ulr.ops.noisy_mlp_step(*buffers, x, y, weights, biases, SIGMA, keys, **settings)


def plain_contestants(model: nn.Sequential, copies: int) -> dict[str, Contestant]:
    """The careful way, eagerly and in a CUDA graph of what torch.compile makes of it (without a GPU: compiled only)."""
    parameters = [p.detach() for p in model.parameters()]

    def run(step: Callable) -> Contestant:
        return Contestant(lambda x, y: step(parameters, x, y, SIGMA, copies))

    graph = torch.compile(rivals.plain_step, dynamic=False, mode="reduce-overhead")
    return {"eager, product repeated": run(rivals.plain_step), "torch.compile, CUDA graph": run(graph)}


def step_row(batch: int, copies: int, device: str = "cpu", names=(None,), plain: bool = False) -> Row:
    """Gradients of all layers of the MLP by layer-wise noise, antithetic, relative to the clean loss.

    `plain`: beside `plain_contestants` too.
    """
    source = rivals.generator(device)
    loss_fn = functools.partial(F.cross_entropy, reduction="none")

    def by_layer(outputs: Tensor, targets: Tensor) -> Tensor:
        return loss_fn(outputs, targets)

    model, theirs = rivals.mlp(MLP).to(device), rivals.mlp(MLP, rivals.NoisyLinear).to(device)

    @functools.cache
    def estimator() -> ulr.ULR:
        settings = {"injection": "layerwise", "noise": "outputs", "baseline": "clean"}
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
                f"{name}, layer by layer": contestant  # as for a loss that the estimator does not know
                for name, contestant in ours(lambda x, y: estimator().backward(x, y, by_layer), names).items()
            },
            **{
                f"{name}, one call": contestant
                for name, contestant in ours(one_call(model, copies), names).items()
                if contestant.backend != "triton"
            },
            "authors' way": Contestant(lambda x, y: rivals.authors_step(theirs, x, y, loss_fn, SIGMA, copies, source)),
            **(plain_contestants(model, copies) if plain else {}),
            "backpropagation": Contestant(lambda x, y: rivals.backprop_step(model, x, y, loss_fn)),
        },
        cost=layerwise_cost(layers_of(model, normal(0, 1, MLP[0], device=device)), batch, [copies] * 3),
        memory=True,
    )


VGG_COPIES = (100, 200, 400, 800, 400, 200, 100, 50)  # of the layers in turn


def vgg_row(share: int, autocast: bool, batch: int = 100) -> Row:
    """Gradients of all layers of VGG-8 on 32 x 32 images, with a share of the copies: time is proportional to them.

    `autocast`: ours computes in bf16, the rival in fp32 as before.
    """
    source, loss_fn = rivals.generator("cpu"), functools.partial(F.cross_entropy, reduction="none")
    last = torch.channels_last
    model = models.build("vgg8", (3, 32, 32), 10, 0, torch.device("cpu")).to(memory_format=last)
    theirs = rivals.as_noisy(model)
    copies = [count // share // 2 * 2 for count in VGG_COPIES]
    names = [name for name, module in model.named_children() if isinstance(module, nn.Linear | nn.Conv2d)]

    @functools.cache
    def estimator() -> ulr.ULR:
        by_layer = dict(zip(names, copies, strict=True))
        return ulr.ULR(model, sigma=SIGMA, copies=by_layer, baseline="clean")

    def step(x: Tensor, y: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            estimator().backward(x, y, loss_fn)

    def rival(at_once: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, y: rivals.authors_step(theirs, x, y, loss_fn, SIGMA, copies, source, at_once)

    def make(i: int) -> tuple:
        x = normal(i, batch, 3, 32, 32, device="cpu").to(memory_format=last)
        return x, torch.arange(batch) * 7 % 10

    return Row(
        name=f"ULR step, VGG-8{', bf16' * autocast}, batch {batch}, 1/{share} of {sum(VGG_COPIES)} copies",
        inputs=make,
        contestants={
            "ulr": Contestant(step),
            **{f"authors' way, {n} copies at once": Contestant(rival(n)) for n in (2, 8, max(copies))},
        },
        cost=layerwise_cost(layers_of(model, make(0)[0][:1]), batch, copies),
        kind="bf16" if autocast else "fp32",
        memory=True,
    )
