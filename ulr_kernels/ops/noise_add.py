"""noise_add: noise on any tensor, y = x + sigma * eps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ulr_kernels import noise_contract
from ulr_kernels.ops import _linear
from ulr_kernels.ops._axes import axes_of, matrix, one_copy
from ulr_kernels.ops._linear import Sizes
from ulr_kernels.ops._op import (
    FLOATS,
    NOISE_SCHEMA,
    Check,
    Cost,
    NoiseSpec,
    Op,
    Output,
    key_and_sigma,
    needs_gradient,
    register,
)


def noise_add(
    x: Tensor,
    sigma: float | Tensor,
    key: int | Tensor,
    *,
    feature_dim: int = -1,
    copies: int = 1,
    shared: bool = True,
    antithetic: bool = False,
    dist: str = "normal",
    sampler: str = "iid",
    positions: int = 1,
    draw: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
    width: int = 0,
) -> Tensor:
    """y[c] = x[c] + sigma * eps_c for each copy c: ULR's noised module (arXiv 2305.08960) for any output x.

    Each element is `round(fma(sigma, eps, x))`, the same bits on every back end.

    Args:
        x: any shape of at least one axis; shared by the copies, or, where `shared` is False, with the copies on its
            first axis; fp32, bf16 or fp16; any strides.
        sigma: noise scale in units of x, >= 0: a float, or fp32 `[]` or `[N]`, N the size of the feature axis.
        key: of the noise site: an integer in [-2^63, 2^64) or an int64 scalar tensor.
        feature_dim: the axis, of one copy, that counts the noise's columns; the other axes in their order, flattened,
            count its rows. -1 for features last, 1 for channels first (`[B, C, H, W]`: rows are (image, y, x), whatever
            the memory format).
        copies: C; x's first axis where `shared` is False.
        shared: x has no copy axis, and is the same in all copies.
        antithetic: the second half of the copies uses the first half's noise, negated; C must be even.
        dist, sampler, draw, row_offset, col_offset, width: which noise, as in `ulr.noise`; copy c uses draw + c.
        positions: rows per sample, for Sobol's dimensions.

    Returns:
        `[C, *shape of a copy]` of x's dtype, contiguous; with the feature axis innermost in memory where x has it so
        (channels_last). Differentiable in x and sigma (pathwise).

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above; nothing has been computed.
        NotImplementedError: an input carries a forward-mode tangent.
    """
    key, scale = key_and_sigma("noise_add", key, sigma, x.device, zero=True)
    which = (feature_dim, copies, shared, antithetic, dist, sampler, positions, draw, row_offset, col_offset, width)
    if needs_gradient("noise_add", "ulr.noise", x, scale):
        return _Pathwise.apply(x, scale, key, *which)
    return torch.ops.ulr.noise_add.default(x, scale, key, *which)


class _Pathwise(torch.autograd.Function):
    """The ordinary gradient through y at fixed noise."""

    @staticmethod
    def forward(ctx, x, sigma, key, feature_dim, copies, shared, *noise):
        ctx.save_for_backward(x, sigma, key)
        ctx.feature_dim, ctx.shared = feature_dim, shared
        ctx.which = which = (feature_dim, copies, shared, *noise)
        return torch.ops.ulr.noise_add.default(x, sigma, key, *which)

    @staticmethod
    def backward(ctx, grad):
        x, sigma, key = ctx.saved_tensors
        feature_dim, shared = ctx.feature_dim, ctx.shared
        grad_x = (grad.sum(0) if shared else grad) if ctx.needs_input_grad[0] else None
        grad_sigma = None
        if ctx.needs_input_grad[1]:
            # y is the noise itself where x is 0 and sigma 1.
            nothing = torch.zeros_like(x, dtype=torch.float32)
            products = grad.float() * torch.ops.ulr.noise_add.default(nothing, torch.ones_like(sigma), key, *ctx.which)
            axis = 1 + feature_dim % (x.dim() if shared else x.dim() - 1)
            grad_sigma = products.movedim(axis, -1).flatten(0, -2).sum(0) if sigma.dim() else products.sum()
        return grad_x, grad_sigma, None, *(None for _ in ctx.which)


class NoiseAdd(NamedTuple):
    """Arguments of noise_add."""

    x: Tensor
    sigma: Tensor
    feature_dim: int
    copies: int
    shared: bool
    noise: NoiseSpec


def check(a: NoiseAdd) -> Output:
    rules, x = Check("noise_add"), a.x
    draws = rules.copies(a.copies, a.noise.antithetic)
    rules.dtype("x", x, FLOATS)
    check_copies(rules, x, a.copies, a.shared)
    rows, cols, axis = axes_of(rules, "x", one_copy(x, a.shared), a.feature_dim)
    _linear.check_sigma(rules, "sigma", a.sigma, cols, (torch.float32,))
    rules.device("x", x.device, sigma=a.sigma, key=a.noise.key)
    rules.noise(a.noise, rows, cols, draws)
    shape = (a.copies, *one_copy(x, a.shared))
    last = x.movedim(axis if a.shared else axis + 1, -1)
    if last.is_contiguous() and not x.is_contiguous():
        return Output(shape, x.dtype, innermost=axis + 1)
    return Output(shape, x.dtype)


def check_copies(check: Check, x: Tensor, copies: int, shared: bool) -> None:
    if not shared and (x.dim() < 1 or x.shape[0] != copies):
        check.fail("x", f"have {copies} copies on its first axis, or be shared by them", list(x.shape))


def reference(y: Tensor, a: NoiseAdd) -> None:
    rows, cols, axis = axes_of(Check("noise_add"), "x", one_copy(a.x, a.shared), a.feature_dim)
    for copy, eps in _linear.copies_of_noise(a.noise, Sizes(a.copies, rows, 0, cols, a.shared)):
        clean = matrix(a.x if a.shared else a.x[copy], axis).float()
        noised = noise_contract.fma(a.sigma, eps, clean)
        y[copy].movedim(axis, -1).copy_(noised.to(y.dtype).view(y[copy].movedim(axis, -1).shape))


def cost(a: NoiseAdd) -> Cost:
    size = a.x.numel() if a.shared else a.x.numel() // a.copies
    return Cost(a.x.element_size() * (a.x.numel() + a.copies * size), 0, a.noise.draws(a.copies) * size)


SCHEMA = (
    "(Tensor x, Tensor sigma, Tensor key, int feature_dim=-1, int copies=1, bool shared=True, "
    f"bool antithetic=False, {NOISE_SCHEMA}) -> Tensor"
)
register(Op(noise_add, SCHEMA, NoiseAdd, check, reference, cost))
