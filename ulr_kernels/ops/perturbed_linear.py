"""perturbed_linear: a linear layer with weight noise, y = x (W + sigma * eps)^T + b, without writing W."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ulr_kernels import contract
from ulr_kernels.ops import _perturbed
from ulr_kernels.ops._linear import values
from ulr_kernels.ops._op import FLOATS, Check, Cost, Op, Output, Sample, fp32_tensor, key_tensor, register
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
            a, b = contract.low_rank_factors(rows, cols, how.rank, draw, key, dist=how.dist)
            scale = sigma * (sign * contract.low_rank_scale(how.rank))
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


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    def v(seed: int, *shape: int) -> Tensor:
        return values(seed, *shape, device=device, dtype=dtype)

    x, w, b, many = v(1, 7, 20), v(2, 13, 20), v(3, 13), v(4, 40, 20)
    own, pairs = v(5, 4, 7, 20), {"members": 4, "antithetic": True}
    mask = v(6, 13, 20) > 0
    yield Sample("one", (x, w, b, 0.3, 11))
    yield Sample("minus", (x, w, b, -0.3, 11))
    yield Sample("no-bias", (x, w, None, 0.3, 11), {"members": 3, "draw": 5})
    yield Sample("silent", (x, w, b, 0.0, 11), {"members": 2})
    yield Sample("many-rows", (many, w, b, 0.3, 11), {"members": 2})
    yield Sample("pairs", (x, w, v(7, 4, 13), 0.3, -11), pairs)
    yield Sample("separate", (own, w, b, 0.3, 11), {**pairs, "dist": "laplace"})
    yield Sample("separate-many-rows", (v(8, 2, 70, 20), w, v(7, 2, 13), 0.3, 11), {"members": 2, "antithetic": True})
    yield Sample("signs", (v(9, 33, 170), v(10, 150, 170), None, 0.5, 2**63), {"members": 2, "dist": "rademacher"})
    yield Sample("wide", (v(11, 5, 1100), v(12, 70, 1100), None, 0.1, 12), {"members": 2})
    yield Sample("mask", (x, w, b, 0.3, 11), {"mask": mask})
    yield Sample("mask-bytes", (many, w, b, 0.3, 11), {**pairs, "mask": mask.to(torch.uint8).T.contiguous().T})
    at = {"draw": 9, "row_offset": 1000, "col_offset": 130}
    yield Sample("offsets", (x, w, b, 0.3, 11), {"members": 2, **at})
    yield Sample("offsets-many-rows", (many, w, b, 0.3, 11), {"draw": 9, "row_offset": 1001, "col_offset": 129})
    yield Sample("offsets-signs", (x, w, b, 0.3, 11), {"dist": "rademacher", **at})
    yield Sample("transposed", (v(13, 20, 7).T, v(14, 20, 13).T, b, 0.3, 11), {"members": 2})
    strided = (v(15, 14, 40)[::2, ::2], v(16, 26, 60)[::2, ::3], v(17, 26)[::2], 0.3, 11)
    yield Sample("strided", strided)
    yield Sample("strided-bias", (many, w, v(17, 26)[::2], 0.3, 11))
    yield Sample("expanded-bias", (many, w, v(17, 1).expand(13), 0.3, 11))
    yield Sample("expanded", (v(18, 1, 20).expand(70, 20), v(19, 13, 1).expand(13, 20), b, 0.3, 11))
    yield Sample("no-rows", (x[:0], w, b, 0.3, 11), {"members": 2})
    yield Sample("no-features", (x, w[:0], b[:0], 0.3, 11))
    yield Sample("no-inputs", (x[:, :0], w[:, :0], b, 0.3, 11), {"members": 2})
    yield Sample("low-rank", (x, w, b, 0.3, 11), {"rank": 1})
    yield Sample("low-rank-members", (own, w, v(7, 4, 13), -0.3, 11), {"rank": 3, **pairs})
    yield Sample("low-rank-shared", (many, w, None, 0.3, 11), {"rank": 2, "members": 3, "dist": "rademacher", **at})
    yield Sample("low-rank-wide", (v(9, 33, 170), v(10, 150, 170), None, 0.5, 12), {"rank": 17})
    yield Sample("low-rank-strided", strided, {"rank": 2, "dist": "laplace"})
    yield Sample("low-rank-no-inputs", (x[:, :0], w[:, :0], b, 0.3, 11), {"rank": 2})
    yield Sample("low-rank-no-rows", (own[:, :0], w, b, 0.3, 11), {"rank": 2, **pairs})

    yield Sample("x-features", (v(1, 7, 21), w, b, 0.3, 1), error=r"'x' must have 20 features .*, got \[7, 21\]")
    yield Sample("x-rank", (v(1, 20), w, b, 0.3, 1), error=r"'x' must be \[R, K\] or \[P, R, K\]")
    yield Sample("x-dtype", (x.double(), w, b, 0.3, 1), error="'x' must be float32")
    yield Sample("x-members", (own, w, b, 0.3, 1), {"members": 2}, error="'x' must have 2 members")
    yield Sample("weight-dtype", (x, w.double(), b, 0.3, 1), error="'weight' must be")
    yield Sample("weight-rank", (x, b, b, 0.3, 1), error=r"'weight' must be \[N, K\]")
    yield Sample("bias-shape", (x, w, b[:5], 0.3, 1), error=r"'bias' must be \[13\], or \[1, 13\]")
    yield Sample("sigma-nan", (x, w, b, float("nan"), 1), error="'sigma' must be finite in fp32, got nan")
    yield Sample("sigma-infinite", (x, w, b, -float("inf"), 1), error="'sigma' must be finite")
    yield Sample("sigma-overflow", (x, w, b, 1e39, 1), error=r"'sigma' must be finite in fp32, got 1e\+39")
    yield Sample("sigma-text", (x, w, b, "abc", 1), error="'sigma' must hold finite numbers, got 'abc'")
    yield Sample("sigma-none", (x, w, b, None, 1), error="'sigma' must be a finite number or a tensor, got None")
    yield Sample("sigma-shape", (x, w, b, b.float(), 1), error="'sigma' must be a scalar")
    yield Sample("members", (x, w, b, 0.3, 1), {"members": 0}, error="'members' must be at least 1, got 0")
    yield Sample("odd", (x, w, b, 0.3, 1), {"members": 3, "antithetic": True}, error="'members' must be even")
    yield Sample("rank-zero", (x, w, b, 0.3, 1), {"rank": 0}, error="'rank' must be None or at least 1, got 0")
    yield Sample("draws", (x, w, b, 0.3, 1), {"members": 2, "draw": 2**32 - 1}, error="'draw' must leave room for 2")
    yield Sample("rows", (x, w, b, 0.3, 1), {"row_offset": 2**32 - 6}, error="'row_offset' must leave room for 13")
    yield Sample("dist", (x, w, b, 0.3, 1), {"dist": "cauchy"}, error="'dist' must be one of")
    yield Sample("mask-dtype", (x, w, b, 0.3, 1), {"mask": w}, error="'mask' must be bool or uint8")
    yield Sample("mask-shape", (x, w, b, 0.3, 1), {"mask": mask[:5]}, error=r"'mask' must be \[13, 20\]")
    yield Sample("mask-rank", (x, w, b, 0.3, 1), {"mask": mask, "rank": 1}, error="'mask' must be None where rank")


register(
    Op(
        name="perturbed_linear",
        schema=f"(Tensor x, Tensor weight, Tensor? bias, Tensor sigma, Tensor key, {MEMBERS_SCHEMA}) -> Tensor",
        function=perturbed_linear,
        check=check,
        reference=reference,
        samples=samples,
        cost=cost,
        autocast=(0, 1, 2),
    )
)
