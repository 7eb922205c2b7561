"""noise_add: noise on any tensor, y = x + sigma * eps."""

from __future__ import annotations

import torch
from torch import Tensor

from ulr_kernels import noise_contract
from ulr_kernels.ops import _linear
from ulr_kernels.ops._grid import grid, matrix, one_copy
from ulr_kernels.ops._linear import Sizes
from ulr_kernels.ops._op import (
    FLOATS,
    NOISE_SCHEMA,
    Check,
    Cost,
    Op,
    Output,
    key_tensor,
    refuse_tangents,
    register,
    sigma_tensor,
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
        dist, sampler, draw, row_offset, col_offset: which noise, as in `ulr.noise`; copy c uses draw + c.
        positions: rows per sample, for Sobol's dimensions.

    Returns:
        `[C, *shape of a copy]` of x's dtype, contiguous; with the feature axis innermost in memory where x has it so
        (channels_last). Differentiable in x and sigma (pathwise).

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above; nothing has been computed.
        NotImplementedError: an input carries a forward-mode tangent.
    """
    key = key_tensor("noise_add", key, x.device)
    scale = sigma_tensor("noise_add", sigma, x.device, zero=True)
    refuse_tangents("noise_add", "ulr.noise", x, scale)
    which = (feature_dim, copies, shared, antithetic, dist, sampler, positions, draw, row_offset, col_offset)
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return _Pathwise.apply(x, scale, key, *which)
    return torch.ops.ulr.noise_add.default(x, scale, key, *which)


class _Pathwise(torch.autograd.Function):
    """The ordinary gradient through y at fixed noise."""

    @staticmethod
    def forward(ctx, x, sigma, key, *which):
        ctx.save_for_backward(x, sigma, key)
        ctx.which = which
        return torch.ops.ulr.noise_add.default(x, sigma, key, *which)

    @staticmethod
    def backward(ctx, grad):
        x, sigma, key = ctx.saved_tensors
        feature_dim, _, shared = ctx.which[:3]
        grad_x = (grad.sum(0) if shared else grad) if ctx.needs_input_grad[0] else None
        grad_sigma = None
        if ctx.needs_input_grad[1]:
            # y is the noise itself where x is 0 and sigma 1.
            nothing = torch.zeros_like(x, dtype=torch.float32)
            products = grad.float() * torch.ops.ulr.noise_add.default(nothing, torch.ones_like(sigma), key, *ctx.which)
            axis = 1 + feature_dim % (x.dim() if shared else x.dim() - 1)
            grad_sigma = products.movedim(axis, -1).flatten(0, -2).sum(0) if sigma.dim() else products.sum()
        return grad_x, grad_sigma, None, *(None for _ in ctx.which)


def check(
    x: Tensor,
    sigma: Tensor,
    key: Tensor,
    feature_dim: int,
    copies: int,
    shared: bool,
    antithetic: bool,
    dist: str,
    sampler: str,
    positions: int,
    draw: int,
    row_offset: int,
    col_offset: int,
) -> Output:
    rules = Check("noise_add")
    draws = rules.copies(copies, antithetic)
    rules.dtype("x", x, FLOATS)
    check_copies(rules, x, copies, shared)
    rows, cols, axis = grid(rules, "x", one_copy(x, shared), feature_dim)
    _linear.check_sigma(rules, "sigma", sigma, cols, (torch.float32,))
    rules.device("x", x.device, sigma=sigma, key=key)
    rules.noise(key, rows, cols, draws, dist, sampler, positions, draw, row_offset, col_offset)
    shape = (copies, *one_copy(x, shared))
    last = x.movedim(axis if shared else axis + 1, -1)
    if last.is_contiguous() and not x.is_contiguous():
        return Output(shape, x.dtype, innermost=axis + 1)
    return Output(shape, x.dtype)


def check_copies(check: Check, x: Tensor, copies: int, shared: bool) -> None:
    if not shared and (x.dim() < 1 or x.shape[0] != copies):
        check.fail("x", f"have {copies} copies on its first axis, or be shared by them", list(x.shape))


def reference(y, x, sigma, key, feature_dim, copies, shared, antithetic, *spec) -> None:
    rows, cols, axis = grid(Check("noise_add"), "x", one_copy(x, shared), feature_dim)
    sizes = Sizes(copies, rows, 0, cols, shared)
    for copy, eps in _linear.copies_of_noise(key, sizes, antithetic, *spec):
        clean = matrix(x if shared else x[copy], axis).float()
        noised = noise_contract.fma(sigma, eps, clean)
        y[copy].movedim(axis, -1).copy_(noised.to(y.dtype).view(y[copy].movedim(axis, -1).shape))


def cost(x, sigma, key, feature_dim, copies, shared, antithetic, *spec) -> Cost:
    size = x.numel() if shared else x.numel() // copies
    draws = copies // 2 if antithetic else copies
    return Cost(x.element_size() * (x.numel() + copies * size), 0, draws * size)


register(
    Op(
        name="noise_add",
        schema="(Tensor x, Tensor sigma, Tensor key, int feature_dim=-1, int copies=1, bool shared=True, "
        f"bool antithetic=False, {NOISE_SCHEMA}) -> Tensor",
        function=noise_add,
        check=check,
        reference=reference,
        cost=cost,
    )
)
