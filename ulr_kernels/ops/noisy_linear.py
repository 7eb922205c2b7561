"""noisy_linear: a linear layer with noise on its output, y = x W^T + b + sigma * eps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ulr_kernels.ops import _linear
from ulr_kernels.ops._linear import Linear
from ulr_kernels.ops._op import NOISE_SCHEMA, Check, Cost, Op, Output, key_and_sigma, needs_gradient, register


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
    width: int = 0,
) -> Tensor:
    """y[c] = x[c] W^T + b + sigma * eps_c for each copy c: ULR's noised module (arXiv 2305.08960) for a linear layer.

    The noise is added to the product in registers and never stored; copies that share x share one product.

    Args:
        x: `[R, K]`, shared by the copies, or `[C, R, K]`; fp32, bf16 or fp16; any strides.
        weight: `[N, K]`, of x's dtype.
        bias: `[N]`, of x's dtype, or None.
        sigma: noise scale in units of y, >= 0: a float, or fp32 `[]` or `[N]`.
        key: of the noise site: an integer in [-2^63, 2^64) or an int64 scalar tensor.
        copies: C.
        antithetic: the second half of the copies uses the first half's noise, negated; C must be even.
        dist, sampler, draw, row_offset, col_offset, width: which noise, as in `ulr.noise`; copy c uses draw + c.
        positions: rows per sample (rows of a sample follow one another), for Sobol's dimensions.

    Returns:
        `[C, R, N]` of x's dtype. Sums are fp32. Differentiable in x, weight, bias and sigma (pathwise).

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above; nothing has been computed.
        NotImplementedError: an input carries a forward-mode tangent.
    """
    key, scale = key_and_sigma("noisy_linear", key, sigma, x.device, zero=True)
    which = (copies, antithetic, dist, sampler, positions, draw, row_offset, col_offset, width)
    if needs_gradient("noisy_linear", "F.linear and ulr.noise", x, weight, bias, scale):
        return _linear.Pathwise.apply("noisy_linear", _backward, (), which, x, weight, bias, scale, key)
    return torch.ops.ulr.noisy_linear.default(x, weight, bias, scale, key, *which)


def _backward(grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    return grad @ weight if wanted[0] else None, grad.T @ x if wanted[1] else None


def check(a: Linear) -> Output:
    rules = Check("noisy_linear")
    draws = rules.copies(a.copies, a.noise.antithetic)
    if a.weight.dim() != 2:
        rules.fail("weight", "be [N, K]", list(a.weight.shape))
    _linear.check_x(rules, a.x, a.copies, a.weight)
    rows, features = a.x.shape[-2], a.weight.shape[0]
    _linear.check_weight(rules, a.x, a.weight, a.bias, features)
    _linear.check_sigma(rules, "sigma", a.sigma, features, (torch.float32,))
    rules.device("x", a.x.device, weight=a.weight, bias=a.bias, sigma=a.sigma, key=a.noise.key)
    rules.noise(a.noise, rows, features, draws)
    return Output((a.copies, rows, features), a.x.dtype)


def cost(a: Linear) -> Cost:
    out = a.x.shape[-2] * a.weight.shape[0]
    products = (1 if a.x.dim() == 2 else a.copies) * out * a.x.shape[-1]
    moved = a.x.element_size() * (a.x.numel() + a.weight.numel() + a.copies * out)
    return Cost(moved, 2 * products, a.noise.draws(a.copies) * out)


SCHEMA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor sigma, Tensor key, int copies=1, bool antithetic=False, "
    f"{NOISE_SCHEMA}) -> Tensor"
)
register(Op(noisy_linear, SCHEMA, Linear, check, _linear.forward_reference, cost, autocast=(0, 1, 2)))
