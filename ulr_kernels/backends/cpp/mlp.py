"""A whole step of an MLP on the CPU: each pass in one call of the library, then the gradients' ops.

oneDNN makes the clean product of the first noised layer once for all copies; csrc/cpu/noisy_mlp.cpp computes the rest
of a pass, up to the losses. If one layer is noised, its gradient needs the losses alone. If all layers are noised, each
copy has its own inputs, and a tile's gradients are added while its activations are in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ulr_kernels import products
from ulr_kernels.backends import _native
from ulr_kernels.backends.cpp import elementwise, linear
from ulr_kernels.backends.cpp.tiles import store, sums_of
from ulr_kernels.baselines import loss_weights
from ulr_kernels.ops._losses import ACTIVATIONS, LOSSES, activate_, losses_of
from ulr_kernels.ops.noise_dot import NoiseDot
from ulr_kernels.ops.noise_score import NoiseScore
from ulr_kernels.ops.noisy_mlp_step import MlpStep

TILE = 2**18  # elements of a tile's widest activation, all copies: they stay in the second-level caches


class _Model:
    """The layers of a call, and the parts that all passes share."""

    def __init__(self, a: MlpStep) -> None:
        self.a = a
        self.biases: Sequence[Tensor | None] = a.biases or [None] * len(a.weights)
        self.keys = a.keys.contiguous()
        self.target = a.target.float().contiguous() if a.loss == "squared" else a.target.contiguous()

    def product(self, layer: int, x: Tensor) -> Tensor:
        """x W^T + b in fp32, with no noise."""
        weight, bias = self.a.weights[layer], self.biases[layer]
        weight = weight.float() if products.dense(weight) else weight.float().contiguous()
        return products.linear(x.float(), weight, bias if bias is None else bias.float())

    def clean(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Without noise: the input of each layer, and its product."""
        inputs, products = [x], [self.product(0, x)]
        for layer in range(1, len(self.a.weights)):
            inputs.append(activate_(products[-1].to(x.dtype, copy=True), self.a.activation))
            products.append(self.product(layer, inputs[-1]))
        return inputs, products

    def run(
        self,
        first: int,
        noised: int,
        product: Tensor,
        outputs: Sequence[Tensor | None],
        losses: Tensor,
        rows: slice,
    ) -> None:
        """Run the layers from `first` on for some samples; the first `noised` of these layers get noise.

        Args:
            product: of layer `first`, without noise.
            outputs: a buffer for the output of each layer, or None where it is not needed.
            losses: `[C, R]`, written.
            rows: the samples.
        """
        a = self.a
        layers = zip(a.weights[first:], self.biases[first:], outputs, strict=True)
        tensors = (losses, product, self.target[rows], a.sigma[first:], *(t for layer in layers for t in layer))
        numbers = (
            noised,
            ACTIVATIONS.index(a.activation),
            LOSSES.index(a.loss),
            _native.float_bits(a.label_smoothing),
            _native.DTYPES[a.x.dtype],
        )
        noise = _native.noise_view(a.noise(self.keys[first:], rows.start))
        _native.launch_cpu("noisy_mlp", noise, tensors, numbers)


def noisy_mlp_step(losses: Tensor, a: MlpStep) -> None:
    model, x = _Model(a), a.x
    count, rows, all_rows = len(a.weights), x.shape[0], slice(0, x.shape[0])
    clean = None
    if not a.joint or a.baseline == "clean":
        inputs, products = model.clean(x)
        if a.baseline == "clean":
            clean = losses_of(products[-1].to(x.dtype), a.target, a.loss, a.label_smoothing)
    weight_sums, bias_sums = [sums_of(g) for g in a.grad_weights], [sums_of(g) for g in a.grad_biases]
    into_sums = a._replace(grad_weights=weight_sums, grad_biases=bias_sums)

    if a.joint:
        widest = a.copies * max(weight.shape[0] for weight in a.weights)
        step = -(-rows // -(-rows * widest // TILE))  # even tiles
        for start in range(0, rows, step):
            tile = slice(start, min(start + step, rows))
            size = tile.stop - tile.start
            outputs = [x.new_empty(a.copies, size, weight.shape[0]) for weight in a.weights[:-1]]
            model.run(0, count, model.product(0, x[tile]), [*outputs, None], losses[0, :, tile], tile)
            of_tile = None if clean is None else clean[tile]
            weight = loss_weights(losses[0, :, tile], of_tile, a.baseline, a.antithetic)
            weight *= size / rows  # the weights are of the mean over all samples
            for layer, values in enumerate((x[tile], *outputs)):
                linear.noisy_linear_grad_(into_sums.gradient(layer, values, weight, tile.start))
    else:
        for layer in range(count):
            model.run(layer, 1, products[layer], [None] * (count - layer), losses[layer], all_rows)
            if a.guides is not None:
                _guided(into_sums, layer, inputs[layer], losses[layer], clean)
                continue
            weight = loss_weights(losses[layer], clean, a.baseline, a.antithetic)
            linear.noisy_linear_grad_(into_sums.gradient(layer, inputs[layer], weight))
    for gradient, sums in zip((*a.grad_weights, *a.grad_biases), (*weight_sums, *bias_sums), strict=True):
        store(sums, gradient)


def _guided(a: MlpStep, layer: int, x: Tensor, losses: Tensor, clean: Tensor | None) -> None:
    """Add a layer's gradients with its guide; `x` is the layer's input."""
    guide, (coefficient, shift), delta, dots, support = a.guide(layer)
    noise, sigma = a.noise(a.keys[layer]), a.sigma[layer]
    elementwise.noise_dot(dots, NoiseDot(guide, sigma, a.copies, -1, noise))
    weight = loss_weights(losses - shift - coefficient * dots, clean, a.baseline, a.antithetic)
    scores = guide.new_empty(guide.shape)
    elementwise.noise_score(scores, NoiseScore(weight, sigma, list(guide.shape), -1, noise))
    scores += guide * (coefficient / len(x))
    delta.copy_(scores).mul_(len(x))
    if support is not None:
        scores *= support
    products.add_outer_(a.grad_weights[layer], scores, x.float().contiguous())
    if a.biases:
        a.grad_biases[layer].add_(scores.sum(0))
