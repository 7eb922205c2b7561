"""noisy_linear_grads_: the likelihood-ratio gradients of many linear layers, in one launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ulr_kernels.ops import _linear
from ulr_kernels.ops._op import Check, Cost, Op, register, sigma_tensor
from ulr_kernels.ops.noisy_linear_grad_ import check_gradient, sizes_of
from ulr_kernels.ops.noisy_linear_grad_ import cost as cost_of_one


def noisy_linear_grads_(
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
        row_offset, col_offset: of each layer, as in `noisy_linear`; none: 0 for all.

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above, or a buffer overlaps another
            argument; nothing has been written.
    """
    if not xs:
        Check("noisy_linear_grads_").fail("xs", "hold at least one layer's input", "none")
    biases = [xs[0].new_empty(0) if bias is None else bias for bias in grad_biases]
    scales = [
        sigma_tensor(f"noisy_linear_grads_: layer {layer}", sigma, xs[0].device, zero=False)
        for layer, sigma in enumerate(sigmas)
    ]
    lists = (list(grad_weights), biases, list(xs), list(loss_weights), scales, list(keys))
    places = (list(positions), draw, list(row_offset), list(col_offset))
    torch.ops.ulr.noisy_linear_grads_.default(*lists, antithetic, dist, sampler, *places)


def calls(
    grad_weights: list[Tensor],
    grad_biases: list[Tensor],
    xs: list[Tensor],
    loss_weights: list[Tensor],
    sigmas: list[Tensor],
    keys: list[Tensor],
    antithetic: bool,
    dist: str,
    sampler: str,
    positions: list[int],
    draw: int,
    row_offset: list[int],
    col_offset: list[int],
) -> Iterator[tuple]:
    """The arguments of `noisy_linear_grad_` for one layer after another."""
    for layer, (weight, bias) in enumerate(zip(grad_weights, grad_biases, strict=True)):
        own = (xs[layer], loss_weights[layer], sigmas[layer], keys[layer], antithetic, dist, sampler)
        at = (positions[layer] if positions else 1, draw, *(o[layer] if o else 0 for o in (row_offset, col_offset)))
        yield weight, bias if bias.numel() else None, None, *own, *at


def check(grad_weights, grad_biases, xs, loss_weights, sigmas, keys, antithetic, dist, sampler, *places) -> None:
    rules = Check("noisy_linear_grads_")
    positions, draw, row_offset, col_offset = places
    lists = {
        "grad_weights": grad_weights,
        "grad_biases": grad_biases,
        "loss_weights": loss_weights,
        "sigmas": sigmas,
        "keys": keys,
    }
    offsets = {"positions": positions, "row_offset": row_offset, "col_offset": col_offset}
    count = len(xs)
    for argument, given in (*lists.items(), *((name, numbers) for name, numbers in offsets.items() if numbers)):
        if len(given) != count:
            rules.fail(argument, f"have {count} entries, one per layer", len(given))
    for layer, x in enumerate(xs):
        rules.dtype(f"xs[{layer}]", x, (xs[0].dtype,))
        rules.device("xs[0]", xs[0].device, **{f"xs[{layer}]": x})
    arguments = (grad_weights, grad_biases, xs, loss_weights, sigmas, keys, antithetic, dist, sampler, *places)
    for layer, call in enumerate(calls(*arguments)):
        check_gradient(Check(f"noisy_linear_grads_: layer {layer}"), *call)


def reference(*args) -> None:
    for weight, bias, _, x, loss_weight, sigma, key, *spec in calls(*args):
        sizes = sizes_of(weight, bias, x, loss_weight)
        _linear.gradient_reference(weight, bias, None, x, loss_weight, sigma, sizes, key, *spec)


def cost(*args) -> Cost:
    each = [cost_of_one(*call) for call in calls(*args)]
    return Cost(sum(c.bytes for c in each), sum(c.flops for c in each), sum(c.noise for c in each))


register(
    Op(
        name="noisy_linear_grads_",
        schema="(Tensor(a!)[] grad_weights, Tensor(b!)[] grad_biases, Tensor[] xs, Tensor[] loss_weights, "
        "Tensor[] sigmas, Tensor[] keys, bool antithetic=False, str dist='normal', str sampler='iid', "
        "int[] positions=[], int draw=0, int[] row_offset=[], int[] col_offset=[]) -> ()",
        function=noisy_linear_grads_,
        check=check,
        reference=reference,
        cost=cost,
        mutates=(0, 1),
        autocast=(2,),
    )
)
