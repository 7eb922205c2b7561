"""foreach_noisy_linear_grad_: the likelihood-ratio gradients of many linear layers, in one launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ulr_kernels.ops import _linear
from ulr_kernels.ops._linear import LinearGradient
from ulr_kernels.ops._op import Check, Cost, NoiseSpec, Op, register, sigma_tensor
from ulr_kernels.ops.noisy_linear_grad_ import cost as cost_of_one


def foreach_noisy_linear_grad_(
    grad_weights: Sequence[Tensor],
    grad_biases: Sequence[Tensor | None],
    xs: Sequence[Tensor],
    loss_weights: Sequence[Tensor],
    sigmas: Sequence[float | Tensor],
    keys: Sequence[Tensor],
    *,
    antithetic: bool = False,
    dist: str = "normal",
    sampler: str = "iid",
    positions: Sequence[int] = (),
    draw: int = 0,
    row_offset: Sequence[int] = (),
    col_offset: Sequence[int] = (),
    width: Sequence[int] = (),
) -> None:
    """`noisy_linear_grad_` (ULR, arXiv 2305.08960, Theorem 1) for each of the layers, in one launch on a CUDA device.

        grad_weights[l] += sum over c, r of  loss_weights[l][c, r // positions] * score / sigma_l  (outer)  xs[l][c, r]

    The gradients of small layers fill a device only together, and each launch costs as much as a small one takes.

    Args:
        grad_weights: a buffer `[N_l, K_l]` for each layer, fp32 or x's dtype, any strides.
        grad_biases: a buffer `[N_l]` for each, likewise; None (or an empty tensor) where a layer has no bias.
        xs: of each layer `[R_l, K_l]`, shared by the copies, or `[C_l, R_l, K_l]`; all of one dtype.
        loss_weights: of each layer `[C_l, R_l // positions_l]`, fp32.
        sigmas: of each layer the noise scale, > 0: a float, or fp32 `[]` or `[N_l]`.
        keys: of each layer's noise, int64 scalar tensors.
        antithetic, dist, sampler, draw: as in `noisy_linear`, for all layers.
        positions: of each layer, rows per sample; none: 1 for all.
        row_offset, col_offset, width: of each layer, as in `noisy_linear`; none: 0 for all.

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above, or a buffer overlaps another
            argument; nothing has been written.
    """
    if not xs:
        Check("foreach_noisy_linear_grad_").fail("xs", "hold at least one layer's input", "none")
    biases = [xs[0].new_empty(0) if bias is None else bias for bias in grad_biases]
    scales = [
        sigma_tensor(f"foreach_noisy_linear_grad_: layer {layer}", sigma, xs[0].device, zero=False)
        for layer, sigma in enumerate(sigmas)
    ]
    lists = (list(grad_weights), biases, list(xs), list(loss_weights), scales, list(keys))
    places = (list(positions), draw, list(row_offset), list(col_offset), list(width))
    torch.ops.ulr.foreach_noisy_linear_grad_.default(*lists, antithetic, dist, sampler, *places)


class LinearGradients(NamedTuple):
    """Arguments of foreach_noisy_linear_grad_. Positions and offsets may be empty; an empty bias stands for None."""

    grad_weights: list[Tensor]
    grad_biases: list[Tensor]
    xs: list[Tensor]
    loss_weights: list[Tensor]
    sigmas: list[Tensor]
    keys: list[Tensor]
    antithetic: bool
    dist: str
    sampler: str
    positions: list[int]
    draw: int
    row_offset: list[int]
    col_offset: list[int]
    width: list[int]

    def layers(self) -> Iterator[LinearGradient]:
        """The arguments of `noisy_linear_grad_` for one layer after another."""
        ones, zeros = [1] * len(self.xs), [0] * len(self.xs)
        offsets = (self.row_offset or zeros, self.col_offset or zeros, self.width or zeros)
        places = zip(self.positions or ones, *offsets, strict=True)
        biases = (bias if bias.numel() else None for bias in self.grad_biases)
        layers = zip(self.grad_weights, biases, self.xs, self.loss_weights, self.sigmas, self.keys, places, strict=True)
        for weight, bias, x, loss_weight, sigma, key, (positions, *offsets) in layers:
            noise = NoiseSpec(key, self.antithetic, self.dist, self.sampler, positions, self.draw, *offsets)
            yield LinearGradient(weight, bias, None, x, loss_weight, sigma, noise)


def check(a: LinearGradients) -> None:
    rules = Check("foreach_noisy_linear_grad_")
    for argument in ("grad_weights", "grad_biases", "loss_weights", "sigmas", "keys"):
        if len(given := getattr(a, argument)) != len(a.xs):
            rules.fail(argument, f"have {len(a.xs)} entries, one per layer", len(given))
    for argument in ("positions", "row_offset", "col_offset", "width"):
        if len(given := getattr(a, argument)) not in (0, len(a.xs)):
            rules.fail(argument, f"have {len(a.xs)} entries, one per layer", len(given))
    for layer, x in enumerate(a.xs):
        rules.dtype(f"xs[{layer}]", x, (a.xs[0].dtype,))
        rules.device("xs[0]", a.xs[0].device, **{f"xs[{layer}]": x})
    for layer, gradient in enumerate(a.layers()):
        _linear.check_gradient(Check(f"foreach_noisy_linear_grad_: layer {layer}"), gradient)


def reference(a: LinearGradients) -> None:
    for layer in a.layers():
        _linear.gradient_reference(layer)


def cost(a: LinearGradients) -> Cost:
    each = [cost_of_one(layer) for layer in a.layers()]
    return Cost(sum(c.bytes for c in each), sum(c.flops for c in each), sum(c.noise for c in each))


SCHEMA = (
    "(Tensor(a!)[] grad_weights, Tensor(b!)[] grad_biases, Tensor[] xs, Tensor[] loss_weights, "
    "Tensor[] sigmas, Tensor[] keys, bool antithetic=False, str dist='normal', str sampler='iid', "
    "int[] positions=[], int draw=0, int[] row_offset=[], int[] col_offset=[], int[] width=[]) -> ()"
)
register(Op(foreach_noisy_linear_grad_, SCHEMA, LinearGradients, check, reference, cost, autocast=(2,)))
