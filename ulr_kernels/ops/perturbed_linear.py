"""perturbed_linear: a linear layer with weight noise, y = x (W + sigma * eps)^T + b, without writing W."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ulr_kernels import noise_contract
from ulr_kernels.ops import _perturbed
from ulr_kernels.ops._op import FLOATS, Check, Cost, Op, Output, fp32_tensor, key_tensor, register
from ulr_kernels.ops._perturbed import MEMBERS_SCHEMA, Members


def perturbed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: float | Tensor,
    key: int | Tensor,
    *,
    members: int = 1,
    antithetic: bool = False,
    rank: int | None = None,
    dist: str = "normal",
    draw: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """y[p] = x[p] W'_p^T + b for each member p of a population, W'_p = round_to_dtype(fma(sigma, eps_p, W)).

    The probe of SPSA (Spall, 1992) and MeZO (arXiv 2305.17333) and the population of evolution strategies. The noise is
    made on the weight's way into the product; the weight itself is never written.

    Low rank (EGGROLL, arXiv 2511.16652): eps_p = A B^T / sqrt(r), A^T = noise((r, N), fold_in(key, 1)), B^T = noise((r,
    K), fold_in(key, 2)). The plain product and sigma / sqrt(r) * (x B) A^T are added up, so W' is not rounded.

    Args:
        x: `[R, K]`, shared by the members, or `[P, R, K]`; fp32, bf16 or fp16; any strides.
        weight: `[N, K]`, of x's dtype; any strides.
        bias: `[N]`, or `[P, N]` with one for each member, of x's dtype, or None. It gets no noise here: the caller
            perturbs it.
        sigma: noise scale in units of the weight: any finite number, or an fp32 scalar tensor. A minus probe's is
            negative.
        key: of the weight: an integer in [-2^63, 2^64) or an int64 scalar tensor.
        members: P.
        antithetic: the second half of the members uses the first half's noise, negated; P must be even.
        rank: of the noise; None: full.
        dist: "normal", "laplace" or "rademacher".
        draw: member p uses draw + p, or of antithetic members draw + p mod P/2.
        row_offset, col_offset: where in the noise of the whole weight this one's rows and columns start.
        mask: bool or uint8 `[N, K]`: noise only where it is set; not with `rank`.

    Returns:
        `[P, R, N]` of x's dtype. Sums are fp32. Differentiable in x, weight, bias and sigma (pathwise).

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above; nothing has been computed.
        NotImplementedError: an input carries a forward-mode tangent.
    """
    key = key_tensor("perturbed_linear", key, x.device)
    scale = fp32_tensor("perturbed_linear", "sigma", sigma, x.device)
    how = Members(members, antithetic, rank, dist, draw, row_offset, col_offset, mask)
    return _perturbed.call("perturbed_linear", F.linear, 2, (x, weight, bias, scale), key, (), how)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, key: Tensor, *rest) -> Output:
    rules, how = Check("perturbed_linear"), Members(*rest)
    rules.dtype("x", x, FLOATS)
    rules.dtype("weight", weight, (x.dtype,))
    if weight.dim() != 2:
        rules.fail("weight", "be [N, K]", list(weight.shape))
    _perturbed.check_members(rules, weight, sigma, key, how)
    if x.dim() not in (2, 3):
        rules.fail("x", "be [R, K] or [P, R, K]", list(x.shape))
    if x.shape[-1] != weight.shape[1]:
        rules.fail("x", f"have {weight.shape[1]} features (weight is {list(weight.shape)})", list(x.shape))
    if x.dim() == 3 and x.shape[0] != how.members:
        rules.fail("x", f"have {how.members} members on its first axis, or no such axis", list(x.shape))
    _perturbed.check_bias(rules, weight, bias, how.members)
    rules.device("x", x.device, weight=weight, bias=bias, sigma=sigma, key=key, mask=how.mask)
    return Output((how.members, x.shape[-2], weight.shape[0]), x.dtype)


def reference(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, key: Tensor, *rest) -> None:
    how = Members(*rest)
    for member in range(how.members):
        own = _perturbed.of_member(x, member, 2).float()
        shift = 0.0 if bias is None else _perturbed.of_member(bias, member, 1).float()
        if how.rank is None:
            y[member] = own @ _perturbed.member_weight(weight, sigma, key, how, member).float().T + shift
        else:
            draw, sign = how.which(member)
            rows, cols = (
                torch.arange(size, device=x.device) + offset
                for size, offset in zip(weight.shape, (how.row_offset, how.col_offset), strict=True)
            )
            a, b = noise_contract.low_rank_factors(rows, cols, how.rank, draw, key, dist=how.dist)
            scale = sigma * (sign * noise_contract.low_rank_scale(how.rank))
            y[member] = own @ weight.float().T + shift + scale * ((own @ b.T) @ a)


def cost(x, weight, bias, sigma, key, *rest) -> Cost:
    how = Members(*rest)
    rows, (features, inputs) = x.shape[-2], weight.shape
    out = how.members * rows * features
    size = x.element_size() * (x.numel() + weight.numel() + out)
    if how.rank is None:
        return Cost(size, 2 * out * inputs, how.draws * weight.numel())
    products = (1 if x.dim() == 2 else how.members) * rows * features * inputs
    beside = how.members * rows * how.rank * (features + inputs)
    return Cost(size, 2 * (products + beside), how.draws * how.rank * (features + inputs))


register(
    Op(
        name="perturbed_linear",
        schema=f"(Tensor x, Tensor weight, Tensor? bias, Tensor sigma, Tensor key, {MEMBERS_SCHEMA}) -> Tensor",
        function=perturbed_linear,
        check=check,
        reference=reference,
        cost=cost,
        autocast=(0, 1, 2),
    )
)
