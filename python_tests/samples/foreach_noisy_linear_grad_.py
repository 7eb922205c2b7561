"""Samples of foreach_noisy_linear_grad_."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from samples import HADAMARD, Sample, values


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
    at = {"draw": 2**16 - 1, "row_offset": [0, 3, 1000], "col_offset": [0, 37, 5], "width": [0, 200, 20]}
    yield Sample("hadamard", all_, {**HADAMARD, "antithetic": True, **at, **by_position})
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
