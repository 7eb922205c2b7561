"""perturbed_embedding: rows of a table with weight noise; only the rows that are asked for get their noise made."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ulr_kernels.ops import _perturbed
from ulr_kernels.ops._linear import values
from ulr_kernels.ops._op import FLOATS, Check, Cost, Op, Output, Sample, fp32_tensor, key_tensor, register
from ulr_kernels.ops._perturbed import MEMBERS_SCHEMA, Members


def perturbed_embedding(
    indices: Tensor,
    weight: Tensor,
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
    """y[p, r] = W'_p[indices[r]], W'_p = round_to_dtype(fma(sigma, eps_p, W)): an embedding with weight noise.

    Noise is made for the rows that are gathered, never for the table. It is the noise that `perturbed_linear` with the
    same weight and key uses (tied weights); low rank: eps as there, W' rounded.

    Args:
        indices: int64 `[R]`, shared by the members, or `[P, R]`: rows of the weight.
        weight: `[V, D]`; fp32, bf16 or fp16; any strides.
        sigma, key, members, antithetic, rank, dist, draw, row_offset, col_offset, mask: as in `perturbed_linear`.

    Returns:
        `[P, R, D]` of weight's dtype. Differentiable in weight and sigma (pathwise).

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above; nothing has been computed. Indices
            on a GPU are not read on the host: there the row of one that is out of range is NaN, or the device asserts.
        NotImplementedError: an input carries a forward-mode tangent.
    """
    key = key_tensor("perturbed_embedding", key, weight.device)
    scale = fp32_tensor("perturbed_embedding", "sigma", sigma, weight.device)
    how = Members(members, antithetic, rank, dist, draw, row_offset, col_offset, mask)
    return _perturbed.call("perturbed_embedding", _gather, 1, (indices, weight, scale), key, (), how)


def _gather(indices: Tensor, weight: Tensor) -> Tensor:
    return weight[indices]


def check(indices: Tensor, weight: Tensor, sigma: Tensor, key: Tensor, *rest) -> Output:
    rules, how = Check("perturbed_embedding"), Members(*rest)
    rules.dtype("indices", indices, (torch.int64,))
    rules.dtype("weight", weight, FLOATS)
    if weight.dim() != 2:
        rules.fail("weight", "be [V, D]", list(weight.shape))
    _perturbed.check_members(rules, weight, sigma, key, how)
    if indices.dim() not in (1, 2):
        rules.fail("indices", "be [R] or [P, R]", list(indices.shape))
    if indices.dim() == 2 and indices.shape[0] != how.members:
        rules.fail("indices", f"have {how.members} members on its first axis, or no such axis", list(indices.shape))
    rules.device("weight", weight.device, indices=indices, sigma=sigma, key=key, mask=how.mask)
    return Output((how.members, indices.shape[-1], weight.shape[1]), weight.dtype)


def check_range(indices: Tensor, weight: Tensor) -> None:
    """For back ends on the CPU, before they write: an index that is out of range would read foreign memory."""
    if indices.numel() and indices.device.type == "cpu":
        for extreme in torch.aminmax(indices):
            if not 0 <= extreme < weight.shape[0]:
                Check("perturbed_embedding").fail("indices", f"lie in [0, {weight.shape[0]})", int(extreme))


def reference(y: Tensor, indices: Tensor, weight: Tensor, sigma: Tensor, key: Tensor, *rest) -> None:
    check_range(indices, weight)
    how = Members(*rest)
    for member in range(how.members):
        rows = _perturbed.of_member(indices, member, 1)
        eps = _perturbed.member_noise(rows, weight.shape[1], key, how, member)
        mask = None if how.mask is None else how.mask[rows]
        y[member] = _perturbed.perturbed(weight[rows], sigma, eps, mask)


def cost(indices, weight, sigma, key, *rest) -> Cost:
    how = Members(*rest)
    rows, width = indices.shape[-1], weight.shape[1]
    read = (1 if indices.dim() == 1 else how.members) * rows * width
    noise = how.draws * (rows * width if how.rank is None else how.rank * (rows + width))
    return Cost(weight.element_size() * (read + how.members * rows * width) + 8 * indices.numel(), 0, noise)


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    def v(seed: int, *shape: int) -> Tensor:
        return values(seed, *shape, device=device, dtype=dtype)

    table = v(1, 31, 20)
    few, own = (torch.arange(n, device=device) * 17 % 31 for n in (7, 36))
    own = own.view(4, 9)
    pairs = {"members": 4, "antithetic": True}
    at = {"draw": 9, "row_offset": 1000, "col_offset": 130}
    mask = v(2, 31, 20) > 0
    yield Sample("one", (few, table, 0.3, 11))
    yield Sample("minus", (few, table, -0.3, 11), {"draw": 3})
    yield Sample("repeated", (few * 0 + 5, table, 0.3, 11), {"members": 2})
    yield Sample("pairs", (own, table, 0.3, -11), {**pairs, "dist": "laplace"})
    yield Sample("signs", (few, v(3, 31, 170), 0.5, 2**63), {**pairs, "dist": "rademacher", **at})
    yield Sample("wide", (few, v(4, 31, 2100), 0.5, 12), {"members": 2, "col_offset": 3})
    yield Sample("mask", (own, table, 0.3, 11), {**pairs, "mask": mask})
    yield Sample("offsets", (few, table, 0.3, 11), {"members": 2, **at})
    yield Sample("strided", (own.T[:, 1], v(5, 62, 60)[::2, ::3], 0.3, 11), {"mask": mask.to(torch.uint8)})
    yield Sample("expanded", (few[:1].expand(5), v(6, 31, 1).expand(31, 20), 0.3, 11))
    yield Sample("empty", (few[:0], table, 0.3, 11), {"members": 2})
    yield Sample("no-columns", (few, table[:, :0], 0.3, 11))
    yield Sample("low-rank", (own, table, -0.3, 11), {"rank": 3, **pairs, **at})
    yield Sample("low-rank-signs", (few, v(3, 31, 170), 0.3, 11), {"rank": 2, "members": 2, "dist": "rademacher"})

    yield Sample("indices-dtype", (few.int(), table, 0.3, 1), error="'indices' must be int64")
    yield Sample("indices-rank", (own[None], table, 0.3, 1), error=r"'indices' must be \[R\] or \[P, R\]")
    yield Sample("indices-members", (own, table, 0.3, 1), {"members": 2}, error="'indices' must have 2 members")
    yield Sample("weight-rank", (few, table[0], 0.3, 1), error=r"'weight' must be \[V, D\]")
    yield Sample("weight-dtype", (few, table.double(), 0.3, 1), error="'weight' must be float32")
    yield Sample("sigma", (few, table, float("inf"), 1), error="'sigma' must be finite")
    yield Sample("mask-shape", (few, table, 0.3, 1), {"mask": mask[:5]}, error=r"'mask' must be \[31, 20\]")
    if device == "cpu":
        yield Sample("too-large", (few + 31, table, 0.3, 1), error=r"'indices' must lie in \[0, 31\), got 31")
        yield Sample("negative", (few - 1, table, 0.3, 1), error=r"'indices' must lie in \[0, 31\), got -1")


register(
    Op(
        name="perturbed_embedding",
        schema=f"(Tensor indices, Tensor weight, Tensor sigma, Tensor key, {MEMBERS_SCHEMA}) -> Tensor",
        function=perturbed_embedding,
        check=check,
        reference=reference,
        samples=samples,
        cost=cost,
    )
)
