"""perturbed_linear: a linear layer with weight noise, y = x (W + sigma * eps)^T + b, without writing W."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ulr_kernels import noise_contract
from ulr_kernels.ops import _linear, _perturbed
from ulr_kernels.ops._op import Check, Cost, Op, Output, register
from ulr_kernels.ops._perturbed import COPIES_SCHEMA, WeightNoise


def perturbed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: float | Tensor,
    key: int | Tensor,
    *,
    copies: int = 1,
    antithetic: bool = False,
    rank: int | None = None,
    dist: str = "normal",
    draw: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
    mask: Tensor | None = None,
    sampler: str = "iid",
    width: int = 0,
) -> Tensor:
    """y[c] = x[c] W'_c^T + b for each copy c, W'_c = round_to_dtype(fma(sigma, eps_c, W)).

    The probe of SPSA (Spall, 1992) and MeZO (arXiv 2305.17333) and the population of evolution strategies. The noise is
    made on the weight's way into the product; the weight itself is never written.

    Low rank (EGGROLL, arXiv 2511.16652): eps_c = A B^T / sqrt(r), A^T = noise((r, N), fold_in(key, 1)), B^T = noise((r,
    K), fold_in(key, 2)). The plain product and sigma / sqrt(r) * (x B) A^T are added up, so W' is not rounded.

    Args:
        x: `[R, K]`, shared by the copies, or `[C, R, K]`; fp32, bf16 or fp16; any strides.
        weight: `[N, K]`, of x's dtype; any strides.
        bias: `[N]`, or `[C, N]` with one for each copy, of x's dtype, or None. It gets no noise here: the caller
            perturbs it.
        sigma: noise scale in units of the weight: any finite number, or an fp32 scalar tensor. A minus probe's is
            negative.
        key: of the weight: an integer in [-2^63, 2^64) or an int64 scalar tensor.
        copies: C.
        antithetic: the second half of the copies uses the first half's noise, negated; C must be even.
        rank: of the noise; None: full.
        dist: "normal", "laplace" or "rademacher".
        draw: copy c uses draw + c, or of antithetic copies draw + c mod C/2.
        row_offset, col_offset: where in the noise of the whole weight this one's rows and columns start.
        mask: bool or uint8 `[N, K]`: noise only where it is set; not with `rank`.
        sampler: "iid", or "hadamard" with dist="rademacher" and full rank: orthogonal over draws (docs/noise.md).
        width: columns of the whole weight, which "hadamard" needs where col_offset is given.

    Returns:
        `[C, R, N]` of x's dtype. Sums are fp32. Differentiable in x, weight, bias and sigma (pathwise).

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above; nothing has been computed.
        NotImplementedError: an input carries a forward-mode tangent.
    """
    how = (copies, antithetic, rank, dist, draw, row_offset, col_offset, mask, sampler, width)
    return _perturbed.call("perturbed_linear", F.linear, 2, (x, weight, bias), sigma, key, (), how)


class PerturbedLinear(NamedTuple):
    """Arguments of perturbed_linear."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    sigma: Tensor
    how: WeightNoise


def check(a: PerturbedLinear) -> Output:
    rules, x, weight, copies = Check("perturbed_linear"), a.x, a.weight, a.how.copies
    if weight.dim() != 2:
        rules.fail("weight", "be [N, K]", list(weight.shape))
    _perturbed.check_copies(rules, weight, a.sigma, a.how)
    _linear.check_x(rules, x, copies, weight)
    rules.dtype("weight", weight, (x.dtype,))
    _perturbed.check_bias(rules, weight, a.bias, copies)
    rules.device("x", x.device, weight=weight, bias=a.bias, sigma=a.sigma, key=a.how.noise.key, mask=a.how.mask)
    return Output((copies, x.shape[-2], weight.shape[0]), x.dtype)


def reference(y: Tensor, a: PerturbedLinear) -> None:
    weight, how, noise = a.weight, a.how, a.how.noise
    for copy in range(how.copies):
        own = _perturbed.of_copy(a.x, copy, 2).float()
        shift = 0.0 if a.bias is None else _perturbed.of_copy(a.bias, copy, 1).float()
        if how.rank is None:
            y[copy] = own @ _perturbed.copy_weight(weight, a.sigma, how, copy).float().T + shift
        else:
            draw, sign = how.which(copy)
            rows, cols = (
                torch.arange(size, device=own.device) + offset
                for size, offset in zip(weight.shape, (noise.row_offset, noise.col_offset), strict=True)
            )
            by_row, by_col = noise_contract.low_rank_factors(rows, cols, how.rank, draw, noise.key, dist=noise.dist)
            scale = a.sigma * (sign * noise_contract.low_rank_scale(how.rank))
            y[copy] = own @ weight.float().T + shift + scale * ((own @ by_col.T) @ by_row)


def cost(a: PerturbedLinear) -> Cost:
    x, weight, how = a.x, a.weight, a.how
    rows, (features, inputs) = x.shape[-2], weight.shape
    out = how.copies * rows * features
    size = x.element_size() * (x.numel() + weight.numel() + out)
    if how.rank is None:
        return Cost(size, 2 * out * inputs, how.draws * weight.numel())
    products = (1 if x.dim() == 2 else how.copies) * rows * features * inputs
    beside = how.copies * rows * how.rank * (features + inputs)
    return Cost(size, 2 * (products + beside), how.draws * how.rank * (features + inputs))


SCHEMA = f"(Tensor x, Tensor weight, Tensor? bias, Tensor sigma, Tensor key, {COPIES_SCHEMA}) -> Tensor"
register(Op(perturbed_linear, SCHEMA, PerturbedLinear, check, reference, cost, autocast=(0, 1, 2)))
