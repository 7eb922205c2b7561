"""noise_score: the weighted score, a stand-in for an output's gradient, from noise that is made again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ulr_kernels import noise_contract
from ulr_kernels.ops import _linear
from ulr_kernels.ops._axes import axes_of
from ulr_kernels.ops._linear import Sizes
from ulr_kernels.ops._op import NOISE_SCHEMA, Check, Cost, NoiseSpec, Op, Output, key_and_sigma, register


def noise_score(
    shape: Sequence[int],
    loss_weight: Tensor,
    sigma: float | Tensor,
    key: int | Tensor,
    *,
    feature_dim: int = -1,
    antithetic: bool = False,
    dist: str = "normal",
    sampler: str = "iid",
    positions: int = 1,
    draw: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
    width: int = 0,
) -> Tensor:
    """The score of ULR (arXiv 2305.08960, Theorem 1), weighted by the losses and summed over the copies:

        s = sum over c of  loss_weight[c, row // positions] * score_c / sigma

    It replaces the output's gradient of a module whose input all copies share: apply the module's own
    Jacobian to it, transposed (an embedding: `grad.index_add_(0, ids, s)`; a transposed convolution: its weight
    gradient; both branches of a residual sum: the same s). The noise is that of `noise_add` and of every noisy
    forward with the same key, draw and offsets. A module with an input for each copy takes one call a copy: that
    copy's row of `loss_weight` and `draw + c` (antithetic second half: the first half's draw, `-loss_weight`).

    Args:
        shape: of one copy of the module's output.
        loss_weight: `[C, R // positions]`, fp32, R the rows of `shape`: the weight of each copy of each sample,
            (L - baseline) / (C * samples) for a mean.
        sigma: noise scale, > 0: a float, or fp32 `[]` or `[N]`, N the size of the feature axis.
        key: of the noise site: an integer in [-2^63, 2^64) or an int64 scalar tensor.
        feature_dim: as in `noise_add`.
        antithetic, dist, sampler, draw, row_offset, col_offset, width: as in `noise_add`.
        positions: rows per sample; must divide R. On the CPU a weight for each row, `[C, R]`, is taken too.

    Returns:
        fp32 of `shape`, contiguous.

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above.
    """
    key, sigma = key_and_sigma("noise_score", key, sigma, loss_weight.device)
    which = (feature_dim, antithetic, dist, sampler, positions, draw, row_offset, col_offset, width)
    return torch.ops.ulr.noise_score.default(loss_weight, sigma, key, list(shape), *which)


class NoiseScore(NamedTuple):
    """Arguments of noise_score."""

    loss_weight: Tensor
    sigma: Tensor
    shape: list[int]
    feature_dim: int
    noise: NoiseSpec


def check(a: NoiseScore) -> Output:
    rules = Check("noise_score")
    if any(size < 0 for size in a.shape):
        rules.fail("shape", "have sizes of at least 0", list(a.shape))
    rows, cols, _ = axes_of(rules, "shape", a.shape, a.feature_dim)
    _linear.check_loss_weight(rules, a.loss_weight, rows, a.noise.positions)
    draws = rules.copies(a.loss_weight.shape[0], a.noise.antithetic)
    _linear.check_sigma(rules, "sigma", a.sigma, cols, (torch.float32,))
    rules.device("loss_weight", a.loss_weight.device, sigma=a.sigma, key=a.noise.key)
    rules.noise(a.noise, rows, cols, draws)
    return Output(a.shape, torch.float32)


def reference(out: Tensor, a: NoiseScore) -> None:
    rows, cols, axis = axes_of(Check("noise_score"), "shape", a.shape, a.feature_dim)
    weights = _linear.weights_of_rows(a.loss_weight, rows)
    total = out.new_zeros(rows, cols)
    for copy, eps in _linear.copies_of_noise(a.noise, Sizes(a.loss_weight.shape[0], rows, 0, cols, True)):
        total += weights[copy, :, None] * noise_contract.score(eps, a.noise.dist)
    moved = out.movedim(axis, -1)
    moved.copy_((total / a.sigma).view(moved.shape))


def cost(a: NoiseScore) -> Cost:
    size = torch.Size(a.shape).numel()
    return Cost(4 * (size + a.loss_weight.numel()), 0, a.noise.draws(a.loss_weight.shape[0]) * size)


SCHEMA = (
    "(Tensor loss_weight, Tensor sigma, Tensor key, SymInt[] shape, int feature_dim=-1, "
    f"bool antithetic=False, {NOISE_SCHEMA}) -> Tensor"
)
register(Op(noise_score, SCHEMA, NoiseScore, check, reference, cost))
