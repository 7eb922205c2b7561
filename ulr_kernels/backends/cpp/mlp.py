"""A whole step of an MLP on the CPU: each pass in one call of the library, then the gradients' ops.

csrc/cpu/noisy_mlp.cpp takes a pass from the first noised layer's clean product, which oneDNN makes once for all copies,
to the losses. The gradient of a layer that is noised alone needs nothing of its pass but those; where all layers are
noised, each copy has an input of its own, and a tile's gradients are added while its activations are in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ulr_kernels import onednn
from ulr_kernels.backends import _native
from ulr_kernels.backends.cpp import linear
from ulr_kernels.backends.cpp.tiles import store, sums_of
from ulr_kernels.baselines import loss_weights
from ulr_kernels.ops._losses import ACTIVATIONS, LOSSES, activate_, losses_of

TILE = 2**18  # elements of a tile's widest activation, all copies: they stay in the second-level caches


class _Model:
    """The layers of a call, and what all passes share."""

    def __init__(
        self,
        x: Tensor,
        target: Tensor,
        weights: list[Tensor],
        biases: list[Tensor],
        sigma: Tensor,
        keys: Tensor,
        activation: str,
        loss: str,
        label_smoothing: float,
        *noise,
    ) -> None:
        self.weights = weights
        self.biases: Sequence[Tensor | None] = biases or [None] * len(weights)
        self.sigma, self.keys = sigma, keys.contiguous()
        self.activation, self.dtype = activation, x.dtype
        self.loss, self.label_smoothing = loss, label_smoothing
        self.target = target.float().contiguous() if loss == "squared" else target.contiguous()
        self.antithetic, self.dist, self.draw, self.row_offset = noise

    def product(self, layer: int, x: Tensor) -> Tensor:
        """x W^T + b in fp32, with no noise."""
        weight, bias = self.weights[layer], self.biases[layer]
        weight = weight.float() if onednn.dense(weight) else weight.float().contiguous()
        return onednn.linear(x.float(), weight, bias if bias is None else bias.float())

    def clean(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Without noise: the input of each layer, and its product."""
        inputs, products = [x], [self.product(0, x)]
        for layer in range(1, len(self.weights)):
            inputs.append(activate_(products[-1].to(self.dtype, copy=True), self.activation))
            products.append(self.product(layer, inputs[-1]))
        return inputs, products

    def noise(self, row: int) -> tuple:
        """What the ops are told of it after sigma and key, for the samples from `row` on."""
        return self.antithetic, self.dist, "iid", 1, self.draw, self.row_offset + row, 0

    def run(
        self,
        first: int,
        noised: int,
        product: Tensor,
        outputs: Sequence[Tensor | None],
        losses: Tensor,
        rows: slice,
    ) -> None:
        """The layers from `first` on for some samples, of which the first `noised` layers get noise: their losses
        `[C, R]`, and what each but the last hands on, where there is a place for it."""
        layers = zip(self.weights[first:], self.biases[first:], outputs, strict=True)
        tensors = (losses, product, self.target[rows], self.sigma[first:], *(t for layer in layers for t in layer))
        antithetic, *which = self.noise(rows.start)
        spec = _native.noise_spec(self.keys[first:], *which, width=0, antithetic=antithetic)
        numbers = (
            noised,
            ACTIVATIONS.index(self.activation),
            LOSSES.index(self.loss),
            _native.float_bits(self.label_smoothing),
            _native.DTYPES[self.dtype],
        )
        views = tuple(None if t is None else _native.view(t) for t in tensors)
        _native.launcher("cpp", "noisy_mlp")(spec, views, numbers, threads=torch.get_num_threads())


def noisy_mlp_step(
    losses: Tensor,
    grad_weights: list[Tensor],
    grad_biases: list[Tensor],
    x: Tensor,
    target: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    sigma: Tensor,
    keys: Tensor,
    copies: int,
    antithetic: bool,
    injection: str,
    activation: str,
    loss: str,
    label_smoothing: float,
    baseline: str,
    dist: str,
    *at: int,
) -> None:
    model = _Model(x, target, weights, biases, sigma, keys, activation, loss, label_smoothing, antithetic, dist, *at)
    count, rows, all_rows = len(weights), x.shape[0], slice(0, x.shape[0])
    joint = injection == "joint"
    clean = None
    if not joint or baseline == "clean":
        inputs, products = model.clean(x)
        if baseline == "clean":
            clean = losses_of(products[-1].to(x.dtype), target, loss, label_smoothing)
    weight_sums, bias_sums = [sums_of(g) for g in grad_weights], [sums_of(g) for g in grad_biases]

    def add_gradient(layer: int, a: Tensor, loss_weight: Tensor, row: int) -> None:
        into = weight_sums[layer], bias_sums[layer] if biases else None, None
        linear.noisy_linear_grad_(*into, a, loss_weight, sigma[layer], keys[layer], *model.noise(row))

    if joint:
        widest = copies * max(weight.shape[0] for weight in weights)
        step = -(-rows // -(-rows * widest // TILE))  # even tiles
        for start in range(0, rows, step):
            tile = slice(start, min(start + step, rows))
            size = tile.stop - tile.start
            outputs = [x.new_empty(copies, size, weight.shape[0]) for weight in weights[:-1]]
            model.run(0, count, model.product(0, x[tile]), [*outputs, None], losses[0, :, tile], tile)
            of_tile = None if clean is None else clean[tile]
            weight = loss_weights(losses[0, :, tile], of_tile, baseline, antithetic)
            weight *= size / rows  # the weights are of the mean over all samples
            for layer, a in enumerate((x[tile], *outputs)):
                add_gradient(layer, a, weight, tile.start)
    else:
        for layer in range(count):
            model.run(layer, 1, products[layer], [None] * (count - layer), losses[layer], all_rows)
            add_gradient(layer, inputs[layer], loss_weights(losses[layer], clean, baseline, antithetic), 0)
    for gradient, sums in zip((*grad_weights, *grad_biases), (*weight_sums, *bias_sums), strict=True):
        store(sums, gradient)
