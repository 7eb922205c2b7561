"""noisy_linear: a linear layer with logit noise, y = x W^T + b + sigma * eps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ulr_kernels.ops import _linear
from ulr_kernels.ops._linear import Sizes, values
from ulr_kernels.ops._op import (
    NOISE_SCHEMA,
    Check,
    Cost,
    Op,
    Output,
    Sample,
    key_tensor,
    refuse_tangents,
    register,
    sigma_tensor,
)


def noisy_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: float | Tensor,
    key: int | Tensor,
    *,
    copies: int = 1,
    antithetic: bool = False,
    dist: str = "normal",
    sampler: str = "iid",
    positions: int = 1,
    draw: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """y[c] = x[c] W^T + b + sigma * eps_c for each copy c: ULR's noised module (arXiv 2305.08960) for a linear layer.

    The noise is made on the way out of the product and never stored; there is one product however many copies share x.

    Args:
        x: `[R, K]`, shared by the copies, or `[C, R, K]`; fp32, bf16 or fp16; any strides.
        weight: `[N, K]`, of x's dtype.
        bias: `[N]`, of x's dtype, or None.
        sigma: noise scale in units of y, >= 0: a float, or fp32 `[]` or `[N]`.
        key: of the noise site: an integer in [-2^63, 2^64) or an int64 scalar tensor.
        copies: C.
        antithetic: the second half of the copies uses the first half's noise, negated; C must be even.
        dist, sampler, draw, row_offset, col_offset: which noise, as in `ulr.noise`; copy c uses draw + c.
        positions: rows per sample (rows of a sample follow one another), for Sobol's dimensions.

    Returns:
        `[C, R, N]` of x's dtype. Sums are fp32. Differentiable in x, weight, bias and sigma (pathwise).

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above; nothing has been computed.
        NotImplementedError: an input carries a forward-mode tangent.
    """
    key = key_tensor("noisy_linear", key, x.device)
    scale = sigma_tensor("noisy_linear", sigma, x.device, zero=True)
    spec = (copies, antithetic, dist, sampler, positions, draw, row_offset, col_offset)
    refuse_tangents("noisy_linear", "F.linear and ulr.noise", x, weight, bias, scale)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, scale)):
        return _Pathwise.apply(x, weight, bias, scale, key, *spec)
    return torch.ops.ulr.noisy_linear.default(x, weight, bias, scale, key, *spec)


class _Pathwise(torch.autograd.Function):
    """The ordinary gradient through y at fixed noise: half-order estimators cut backpropagation above or below it."""

    @staticmethod
    def forward(ctx, x, weight, bias, sigma, key, *spec):
        ctx.save_for_backward(x, weight, bias, sigma, key)
        ctx.spec = spec
        return torch.ops.ulr.noisy_linear.default(x, weight, bias, sigma, key, *spec)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, sigma, key = ctx.saved_tensors
        grad = grad.to(weight.dtype)  # autocast may have computed y in a narrower type
        shared = grad.sum(0) if x.dim() == 2 else grad  # copies that share x add up
        rows = shared.reshape(-1, shared.shape[-1])
        grad_x = shared @ weight if ctx.needs_input_grad[0] else None
        grad_weight = rows.T @ x.reshape(-1, x.shape[-1]).to(rows.dtype) if ctx.needs_input_grad[1] else None
        grad_bias = rows.sum(0) if bias is not None and ctx.needs_input_grad[2] else None
        grad_sigma = None
        if ctx.needs_input_grad[3]:
            # sigma * eps is the op's output for x = 0; with sigma 1 it is eps itself, made again.
            nothing = x.new_zeros(*x.shape[:-1], 0, dtype=torch.float32)
            eps = torch.ops.ulr.noisy_linear.default(
                nothing, nothing.new_zeros(weight.shape[0], 0), None, torch.ones_like(sigma), key, *ctx.spec
            )
            grad_sigma = (grad.float() * eps).sum((0, 1))
            grad_sigma = grad_sigma if sigma.dim() else grad_sigma.sum()
        return grad_x, grad_weight, grad_bias, grad_sigma, None, *(None for _ in ctx.spec)


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    key: Tensor,
    copies: int,
    antithetic: bool,
    dist: str,
    sampler: str,
    positions: int,
    draw: int,
    row_offset: int,
    col_offset: int,
) -> Output:
    rules = Check("noisy_linear")
    draws = rules.copies(copies, antithetic)
    if weight.dim() != 2:
        rules.fail("weight", "be [N, K]", list(weight.shape))
    _linear.check_x(rules, x, copies, weight)
    rows, features = x.shape[-2], weight.shape[0]
    _linear.check_weight(rules, x, weight, bias)
    _linear.check_sigma(rules, "sigma", sigma, features, (torch.float32,))
    rules.device("x", x.device, weight=weight, bias=bias, sigma=sigma, key=key)
    rules.noise(key, rows, features, draws, dist, sampler, positions, draw, row_offset, col_offset)
    return Output((copies, rows, features), x.dtype)


def reference(y, x, weight, bias, sigma, key, copies, antithetic, *spec) -> None:
    sizes = Sizes(copies, x.shape[-2], x.shape[-1], weight.shape[0], x.dim() == 2)
    _linear.forward_reference(y, x, weight, bias, sigma, sizes, key, antithetic, *spec)


def cost(x, weight, bias, sigma, key, copies, *spec) -> Cost:
    rows, features = x.shape[-2], weight.shape[0]
    out = copies * rows * features
    products = (1 if x.dim() == 2 else copies) * rows * features * x.shape[-1]
    draws = copies // 2 if spec[0] else copies
    return Cost(x.element_size() * (x.numel() + weight.numel() + out), 2 * products, draws * rows * features)


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    def v(seed: int, *shape: int) -> Tensor:
        return values(seed, *shape, device=device, dtype=dtype)

    x, w, b = v(1, 7, 20), v(2, 13, 20), v(3, 13)
    scale = values(4, 13, device=device, dtype=torch.float32).abs() + 0.1
    yield Sample("one", (x, w, b, 0.3, 11))
    yield Sample("no-bias", (x, w, None, 0.3, 11), {"copies": 3, "draw": 5})
    yield Sample("per-feature", (x, w, b, scale, -11), {"copies": 4, "antithetic": True})
    yield Sample("silent", (x, w, b, 0.0, 11), {"copies": 2})
    yield Sample("separate", (v(5, 4, 7, 20), w, b, 0.3, 11), {"copies": 4, "antithetic": True, "dist": "laplace"})
    yield Sample("signs", (v(6, 33, 70), v(7, 150, 70), None, 0.5, 2**63), {"copies": 2, "dist": "rademacher"})
    yield Sample("wide", (v(8, 65, 129), v(9, 131, 129), v(10, 131), 0.5, 12), {"copies": 3})
    yield Sample("sobol", (x, w, b, 0.3, 11), {"copies": 4, "sampler": "sobol", "row_offset": 3})
    yield Sample("sobol-positions", (v(5, 6, 20), w, b, 0.3, 11), {"copies": 4, "sampler": "sobol", "positions": 3})
    yield Sample("offsets", (x, w, b, 0.3, 11), {"copies": 2, "draw": 9, "row_offset": 1000, "col_offset": 129})
    yield Sample("transposed", (v(11, 20, 7).T, v(12, 20, 13).T, b, 0.3, 11), {"copies": 2})
    yield Sample("strided", (v(13, 14, 40)[::2, ::2], v(14, 26, 60)[::2, ::3], v(15, 26)[::2], 0.3, 11))
    yield Sample("expanded", (v(16, 1, 20).expand(7, 20), w, b, scale[:1].expand(13), 11), {"copies": 2})
    yield Sample("no-rows", (x[:0], w, b, 0.3, 11), {"copies": 2})
    yield Sample("no-features", (x, w[:0], b[:0], 0.3, 11))
    yield Sample("no-inputs", (x[:, :0], w[:, :0], b, 0.3, 11), {"copies": 2})

    yield Sample("x-features", (v(1, 7, 21), w, b, 0.3, 1), error=r"'x' must have 20 features .*, got \[7, 21\]")
    yield Sample("x-rank", (v(1, 20), w, b, 0.3, 1), error=r"'x' must be \[R, K\] or \[C, R, K\]")
    yield Sample("x-dtype", (x.double(), w, b, 0.3, 1), error="'x' must be float32")
    yield Sample("x-copies", (v(5, 4, 7, 20), w, b, 0.3, 1), {"copies": 2}, error="'x' must have 2 copies")
    yield Sample("weight-dtype", (x, w.double(), b, 0.3, 1), error="'weight' must be")
    yield Sample("weight-rank", (x, b, b, 0.3, 1), error=r"'weight' must be \[N, K\]")
    yield Sample("bias-shape", (x, w, b[:5], 0.3, 1), error=r"'bias' must be \[13\]")
    yield Sample("sigma-negative", (x, w, b, -0.5, 1), error="'sigma' must be finite and at least 0, got -0.5")
    yield Sample("sigma-nan", (x, w, b, float("nan"), 1), error="'sigma' must be finite")
    yield Sample("sigma-text", (x, w, b, "abc", 1), error="'sigma' must be a finite number or a tensor, got 'abc'")
    yield Sample("sigma-shape", (x, w, b, scale[:5], 1), error=r"'sigma' must be a scalar or \[13\]")
    yield Sample("copies", (x, w, b, 0.3, 1), {"copies": 0}, error="'copies' must be at least 1, got 0")
    yield Sample("odd", (x, w, b, 0.3, 1), {"copies": 3, "antithetic": True}, error="'copies' must be even")
    yield Sample("draws", (x, w, b, 0.3, 1), {"copies": 2, "draw": 2**32 - 1}, error="'draw' must leave room for 2")
    yield Sample("rows", (x, w, b, 0.3, 1), {"row_offset": 2**32 - 6}, error="'row_offset' must leave room for 7")
    yield Sample("dist", (x, w, b, 0.3, 1), {"dist": "cauchy"}, error="'dist' must be one of")


register(
    Op(
        name="noisy_linear",
        schema="(Tensor x, Tensor weight, Tensor? bias, Tensor sigma, Tensor key, int copies=1, bool antithetic=False, "
        f"{NOISE_SCHEMA}) -> Tensor",
        function=noisy_linear,
        check=check,
        reference=reference,
        samples=samples,
        cost=cost,
        autocast=(0, 1, 2),
    )
)
