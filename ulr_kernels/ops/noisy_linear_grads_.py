"""noisy_linear_grads_: the likelihood-ratio gradients of many linear layers, in one launch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ulr_kernels.ops import _linear
from ulr_kernels.ops._linear import values
from ulr_kernels.ops._op import Check, Cost, Op, Sample, register, sigma_tensor
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


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    def v(seed: int, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return values(seed, *shape, device=device, dtype=dtype)

    def f(seed: int, *shape: int) -> Tensor:
        return v(seed, *shape, dtype=torch.float32)

    def key(value: int) -> Tensor:
        return torch.tensor(value, device=device)

    shapes = ((13, 20), (150, 70), (5, 9))
    weights = [f(i, n, k) for i, (n, k) in enumerate(shapes)]
    biases = [f(10 + i, n) for i, (n, _) in enumerate(shapes)]
    xs = [v(20, 6, 20), v(21, 4, 7, 70), v(22, 12, 9)]
    loss = [f(30, 4, 6), f(31, 4, 7), f(32, 2, 6)]
    sigmas = [f(40).abs() + 0.2, f(41, 150).abs() + 0.2, f(42).abs() + 0.2]
    keys = [key(11), key(-12), key(13)]
    all_ = (weights, biases, xs, loss, sigmas, keys)
    by_position = {"positions": [1, 1, 2]}
    yield Sample("three", all_, by_position)
    yield Sample("pairs", all_, {"antithetic": True, "dist": "laplace", **by_position})
    yield Sample("signs", all_, {"dist": "rademacher", "antithetic": True, **by_position})
    yield Sample("sobol", all_, {"sampler": "sobol", **by_position})
    offsets = {"draw": 7, "row_offset": [0, 3, 1000], "col_offset": [0, 37, 5]}
    yield Sample("offsets", all_, {**offsets, **by_position})
    halves = [w.to(dtype) for w in weights]
    yield Sample("same-dtype", (halves, [biases[0], None, biases[2].to(dtype)], *all_[2:]), by_position)
    yield Sample("numbers", (*all_[:4], [0.5, 0.25, 2], keys), by_position)
    yield Sample("alone", tuple(part[:1] for part in all_))

    yield Sample("none", ([], [], [], [], [], []), error="'xs' must hold at least one layer's input, got none")
    yield Sample("short", (*all_[:5], keys[:2]), by_position, error="'keys' must have 3 entries, one per layer, got 2")
    yield Sample("few-positions", all_, {"positions": [1]}, error="'positions' must have 3 entries")
    mixed = [xs[0].double(), *xs[1:]]
    yield Sample("dtypes", (*all_[:2], mixed, *all_[3:]), by_position, error="must be float")
    yield Sample("layer", all_, error="layer 2: 'loss_weight' must be")
    for name, sigma in (("zero", 0.0), ("nan", math.nan)):
        scales = [*sigmas[:2], sigma]
        error = f"layer 2: 'sigma' must be finite and positive, got {sigma}"
        yield Sample(f"sigma-{name}", (*all_[:4], scales, keys), by_position, error=error)
    if device == "cpu":  # tensors on a GPU are not read
        scales = [sigmas[0], -sigmas[1], sigmas[2]]
        yield Sample("sigma-negative", (*all_[:4], scales, keys), by_position, error="layer 1: 'sigma' must be finite")
    twice = [weights[0], weights[1], weights[1][:5, :9]]
    yield Sample("overlap", (twice, *all_[1:]), by_position, error=r"'grad_weights\[1\]' must not overlap")


register(
    Op(
        name="noisy_linear_grads_",
        schema="(Tensor(a!)[] grad_weights, Tensor(b!)[] grad_biases, Tensor[] xs, Tensor[] loss_weights, "
        "Tensor[] sigmas, Tensor[] keys, bool antithetic=False, str dist='normal', str sampler='iid', "
        "int[] positions=[], int draw=0, int[] row_offset=[], int[] col_offset=[]) -> ()",
        function=noisy_linear_grads_,
        check=check,
        reference=reference,
        samples=samples,
        cost=cost,
        mutates=(0, 1),
        autocast=(2,),
    )
)
