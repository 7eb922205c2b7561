"""A whole step of an MLP on the CPU: the ops of its layers, a tile of samples after another.

All copies of a tile's samples go through all layers while their activations are in the cache. The gradient of a layer
that is noised alone needs nothing of a tile but its losses, so it is one product over the whole batch; where all layers
are noised, each copy has an input of its own, and a tile's gradients are added while it is there.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ulr_kernels.backends.cpp import linear, onednn
from ulr_kernels.backends.cpp.tiles import store, sums_of
from ulr_kernels.baselines import loss_weights
from ulr_kernels.ops._losses import activate_, losses_of
from ulr_kernels.ops.noisy_linear_cross_entropy_ import as_mlp

TILE = 2**18  # elements of a tile's widest activation, all copies: they stay in the second-level caches


class _Model:
    """The layers of a call and the noise that all share."""

    def __init__(
        self,
        weights: list[Tensor],
        biases: list[Tensor],
        sigma: Tensor,
        keys: Tensor,
        activation: str,
        copies: int,
        *noise,
    ) -> None:
        self.weights = [w if onednn.dense(w) else w.contiguous() for w in weights]
        self.biases: Sequence[Tensor | None] = biases or [None] * len(weights)
        self.sigma, self.keys = sigma, keys
        self.activation, self.copies = activation, copies
        self.antithetic, self.dist, self.draw, self.row_offset = noise

    def noise(self, row: int) -> tuple:
        """What the ops are told of it after sigma and key, for the samples from `row` on."""
        return self.antithetic, self.dist, "iid", 1, self.draw, self.row_offset + row, 0

    def layer(self, layer: int, x: Tensor, row: int, noised: bool) -> Tensor:
        """The output of a layer, activated where another one follows, `[copies, R, N]` where it is noised."""
        weight, bias = self.weights[layer], self.biases[layer]
        if noised:
            like = x.new_empty(self.copies, x.shape[-2], weight.shape[0], device="meta")
            spec = (self.sigma[layer], self.keys[layer], self.copies, *self.noise(row))
            y = linear.noisy_linear(like, x, weight, bias, *spec)
        else:
            flat = x.reshape(-1, x.shape[-1])
            y = onednn.linear(flat, weight, bias).view(*x.shape[:-1], weight.shape[0])
        return y if layer == len(self.weights) - 1 else activate_(y, self.activation)

    def clean_inputs(self, x: Tensor) -> list[Tensor]:
        """The input of each layer without noise, and the outputs."""
        inputs = [x]
        for layer in range(len(self.weights)):
            inputs.append(self.layer(layer, inputs[-1], 0, False))
        return inputs


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
    baseline: str,
    dist: str,
    *at: int,
) -> None:
    model = _Model(weights, biases, sigma, keys, activation, copies, antithetic, dist, *at)
    layers, rows = range(len(weights)), x.shape[0]
    inputs = model.clean_inputs(x) if injection == "layerwise" or baseline == "clean" else [x]
    clean = losses_of(inputs[-1], target, loss) if baseline == "clean" else None
    widest = copies * max(weight.shape[0] for weight in weights)
    step = -(-rows // -(-rows * widest // TILE))  # even tiles
    tiles = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    weight_sums, bias_sums = [sums_of(g) for g in grad_weights], [sums_of(g) for g in grad_biases]

    def add_gradient(layer: int, a: Tensor, loss_weight: Tensor, row: int) -> None:
        into = weight_sums[layer], bias_sums[layer] if biases else None, None
        linear.noisy_linear_grad_(*into, a, loss_weight, sigma[layer], keys[layer], *model.noise(row))

    if injection == "layerwise":
        for layer in layers:
            for tile in tiles:
                value = inputs[layer][tile]
                for following in layers[layer:]:
                    value = model.layer(following, value, tile.start, following == layer)
                losses[layer, :, tile] = losses_of(value, target[tile], loss)
            add_gradient(layer, inputs[layer], loss_weights(losses[layer], clean, baseline, antithetic), 0)
    else:
        for tile in tiles:
            values = [x[tile]]
            for layer in layers:
                values.append(model.layer(layer, values[-1], tile.start, True))
            losses[0, :, tile] = losses_of(values[-1], target[tile], loss)
            of_tile = None if clean is None else clean[tile]
            share = (tile.stop - tile.start) / rows  # the weights are of the mean over all samples
            weight = loss_weights(losses[0, :, tile], of_tile, baseline, antithetic) * share
            for layer in layers:
                add_gradient(layer, values[layer], weight, tile.start)
    for gradient, sums in zip((*grad_weights, *grad_biases), (*weight_sums, *bias_sums), strict=True):
        store(sums, gradient)


def noisy_linear_cross_entropy_(losses: Tensor, *args) -> None:
    noisy_mlp_step(losses[None], *as_mlp(*args))
