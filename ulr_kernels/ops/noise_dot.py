"""noise_dot: the inner product of each copy's noise with a tensor, from noise that is made again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ulr_kernels.ops import _linear
from ulr_kernels.ops._axes import axes_of, matrix
from ulr_kernels.ops._linear import Sizes
from ulr_kernels.ops._op import FLOATS, NOISE_SCHEMA, Check, Cost, NoiseSpec, Op, Output, key_and_sigma, register


def noise_dot(
    x: Tensor,
    sigma: float | Tensor,
    key: int | Tensor,
    *,
    copies: int = 1,
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
    """The inner product of a tensor with each copy's noise, over the rows and columns of a sample:

        d[c, b] = sum over rows r of sample b, and columns n, of  sigma_n * eps_c[r, n] * x[r, n]

    The first-order change of a loss by the noise of a layer whose output has the gradient x: what a guide subtracts
    from the loss (the control variate of arXiv 1511.05176). The noise is that of `noise_add` with the same key, draw
    and offsets.

    Args:
        x: of one copy's shape; fp32, bf16 or fp16; any strides.
        sigma: noise scale, >= 0: a float, or fp32 `[]` or `[N]`, N the size of the feature axis.
        key: of the noise site: an integer in [-2^63, 2^64) or an int64 scalar tensor.
        copies: C.
        feature_dim: as in `noise_add`.
        antithetic, dist, sampler, draw, row_offset, col_offset, width: as in `noise_add`.
        positions: rows per sample; must divide the R rows of x.

    Returns:
        fp32 `[C, R // positions]`.

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above.
    """
    key, sigma = key_and_sigma("noise_dot", key, sigma, x.device, zero=True)
    which = (copies, feature_dim, antithetic, dist, sampler, positions, draw, row_offset, col_offset, width)
    return torch.ops.ulr.noise_dot.default(x, sigma, key, *which)


class NoiseDot(NamedTuple):
    """Arguments of noise_dot."""

    x: Tensor
    sigma: Tensor
    copies: int
    feature_dim: int
    noise: NoiseSpec


def check(a: NoiseDot) -> Output:
    rules = Check("noise_dot")
    rules.dtype("x", a.x, FLOATS)
    rows, cols, _ = axes_of(rules, "x", a.x.shape, a.feature_dim)
    draws = rules.copies(a.copies, a.noise.antithetic)
    _linear.check_sigma(rules, "sigma", a.sigma, cols, (torch.float32,))
    rules.device("x", a.x.device, sigma=a.sigma, key=a.noise.key)
    rules.noise(a.noise, rows, cols, draws)
    if rows % a.noise.positions:
        rules.fail("positions", f"divide the {rows} rows", a.noise.positions)
    return Output((a.copies, rows // a.noise.positions), torch.float32)


def reference(out: Tensor, a: NoiseDot) -> None:
    rows, cols, axis = axes_of(Check("noise_dot"), "x", a.x.shape, a.feature_dim)
    scaled = matrix(a.x, axis).float() * a.sigma
    for copy, eps in _linear.copies_of_noise(a.noise, Sizes(a.copies, rows, 0, cols, True)):
        out[copy] = (scaled * eps).sum(1).unflatten(0, (-1, a.noise.positions)).sum(1)


def cost(a: NoiseDot) -> Cost:
    noise = a.noise.draws(a.copies) * a.x.numel()
    return Cost(a.x.element_size() * a.x.numel(), 2 * noise, noise)


SCHEMA = (
    "(Tensor x, Tensor sigma, Tensor key, int copies=1, int feature_dim=-1, bool antithetic=False, "
    f"{NOISE_SCHEMA}) -> Tensor"
)
register(Op(noise_dot, SCHEMA, NoiseDot, check, reference, cost))
