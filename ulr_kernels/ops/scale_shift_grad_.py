"""scale_shift_grad_: the likelihood-ratio gradient of a weight and a bias that act feature by feature."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ulr_kernels import noise_contract
from ulr_kernels.ops import _linear
from ulr_kernels.ops._axes import axes_of, matrix, one_copy
from ulr_kernels.ops._linear import Sizes
from ulr_kernels.ops._op import FLOATS, NOISE_SCHEMA, Check, Cost, NoiseSpec, Op, key_and_sigma, register
from ulr_kernels.ops.noise_add import check_copies


def scale_shift_grad_(
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    x: Tensor,
    loss_weight: Tensor,
    sigma: float | Tensor,
    key: int | Tensor,
    *,
    feature_dim: int = -1,
    shared: bool = True,
    antithetic: bool = False,
    dist: str = "normal",
    sampler: str = "iid",
    positions: int = 1,
    draw: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
    width: int = 0,
    grad_log_sigma: Tensor | None = None,
) -> None:
    """Add the gradients of ULR (arXiv 2305.08960, Theorem 1) for y = weight * x + bias, feature by feature.

    Raw sums over copies c and rows r (and over features, into a buffer that is one number):

        grad_weight    += sum of  loss_weight[c, r // positions] * score_cr / sigma * x[c, r]
        grad_bias      += sum of  loss_weight[c, r // positions] * score_cr / sigma
        grad_log_sigma += sum of  loss_weight[c, r // positions] * (eps_cr * score_cr - 1)

    For a normalisation layer x is the normalised input; for a gate, its other factor. The noise is that of
    `noise_add` with the same key, draw and offsets; it is made again, never stored. Where the copies share x, the sum
    over copies comes first. Sums are fp32, in an order that depends on the sizes alone.

    Args:
        grad_weight: `[N]`, N the size of the feature axis, or `[]`; fp32 or x's dtype; any strides; or None.
        grad_bias: likewise. One of the three buffers must be given.
        x: as in `noise_add`: shared by the copies or with a copy axis; only its shape counts where there is no
            grad_weight.
        loss_weight: `[C, R // positions]`, fp32, R the rows of one copy: the weight of each copy of each sample,
            (L - baseline) / (C * samples) for a mean.
        sigma: noise scale, > 0: a float, or fp32 `[]` or `[N]`.
        key: of the noise site: an integer in [-2^63, 2^64) or an int64 scalar tensor.
        feature_dim, shared: as in `noise_add`.
        antithetic, dist, sampler, draw, row_offset, col_offset, width: as in `noise_add`.
        positions: rows per sample; must divide R. On the CPU a weight for each row, `[C, R]`, is taken too.
        grad_log_sigma: `[]` or `[N]`, fp32 or x's dtype, or None; an error for Rademacher noise, which has no density.

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above, or a buffer overlaps another
            argument; nothing has been written.
    """
    key, sigma = key_and_sigma("scale_shift_grad_", key, sigma, x.device)
    which = (feature_dim, shared, antithetic, dist, sampler, positions, draw, row_offset, col_offset, width)
    torch.ops.ulr.scale_shift_grad_.default(grad_weight, grad_bias, grad_log_sigma, x, loss_weight, sigma, key, *which)


class ScaleShiftGradient(NamedTuple):
    """Arguments of scale_shift_grad_."""

    grad_weight: Tensor | None
    grad_bias: Tensor | None
    grad_log_sigma: Tensor | None
    x: Tensor
    loss_weight: Tensor
    sigma: Tensor
    feature_dim: int
    shared: bool
    noise: NoiseSpec

    @property
    def buffers(self) -> dict[str, Tensor | None]:
        return {"grad_weight": self.grad_weight, "grad_bias": self.grad_bias, "grad_log_sigma": self.grad_log_sigma}


def check(a: ScaleShiftGradient) -> None:
    rules, x = Check("scale_shift_grad_"), a.x
    rules.dtype("x", x, FLOATS)
    if a.loss_weight.dim() == 2:
        check_copies(rules, x, a.loss_weight.shape[0], a.shared)
    rows, cols, _ = axes_of(rules, "x", one_copy(x, a.shared), a.feature_dim)
    _linear.check_loss_weight(rules, a.loss_weight, rows, a.noise.positions)
    draws = rules.copies(a.loss_weight.shape[0], a.noise.antithetic)
    buffers = a.buffers
    if all(buffer is None for buffer in buffers.values()):
        rules.fail("grad_weight", "be given where grad_bias and grad_log_sigma are None", None)
    _linear.check_density(rules, a.grad_log_sigma, a.noise.dist)
    for name, buffer in buffers.items():
        if buffer is not None:
            _linear.check_sigma(rules, name, buffer, cols, _linear.buffer_dtypes(x))
    _linear.check_sigma(rules, "sigma", a.sigma, cols, (torch.float32,))
    rules.device("x", x.device, **buffers, loss_weight=a.loss_weight, sigma=a.sigma, key=a.noise.key)
    rules.noise(a.noise, rows, cols, draws)


def reference(a: ScaleShiftGradient) -> None:
    rows, cols, axis = axes_of(Check("scale_shift_grad_"), "x", one_copy(a.x, a.shared), a.feature_dim)
    weights = _linear.weights_of_rows(a.loss_weight, rows)
    by_weight, by_bias, by_log_sigma = (a.loss_weight.new_zeros(cols) for _ in range(3))
    reduced = a.loss_weight.new_zeros(rows, cols)
    for copy, eps in _linear.copies_of_noise(a.noise, Sizes(a.loss_weight.shape[0], rows, 0, cols, a.shared)):
        score = noise_contract.score(eps, a.noise.dist)
        weighted = weights[copy, :, None] * score
        reduced += weighted
        if not a.shared:
            by_weight += (weighted * matrix(a.x[copy], axis).float()).sum(0)
        by_log_sigma += (weights[copy, :, None] * (eps * score - 1)).sum(0)
    if a.shared:
        by_weight += (reduced * matrix(a.x, axis).float()).sum(0)
    by_bias += reduced.sum(0)
    sums = (by_weight / a.sigma, by_bias / a.sigma, by_log_sigma)
    for buffer, value in zip(a.buffers.values(), sums, strict=True):
        if buffer is not None:
            buffer.copy_(buffer.float() + (value if buffer.dim() else value.sum()))


def cost(a: ScaleShiftGradient) -> Cost:
    copies, x = a.loss_weight.shape[0], a.x
    size = x.numel() if a.shared else x.numel() // copies
    read = x.element_size() * x.numel() if a.grad_weight is not None else 0
    written = 2 * sum(b.numel() * b.element_size() for b in a.buffers.values() if b is not None)
    return Cost(read + written + 4 * a.loss_weight.numel(), 2 * x.numel(), a.noise.draws(copies) * size)


SCHEMA = (
    "(Tensor(a!)? grad_weight, Tensor(b!)? grad_bias, Tensor(c!)? grad_log_sigma, Tensor x, "
    f"Tensor loss_weight, Tensor sigma, Tensor key, int feature_dim=-1, bool shared=True, bool antithetic=False, "
    f"{NOISE_SCHEMA}) -> ()"
)
register(Op(scale_shift_grad_, SCHEMA, ScaleShiftGradient, check, reference, cost))
