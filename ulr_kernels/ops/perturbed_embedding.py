"""perturbed_embedding: rows of a table with weight noise; only the rows that are asked for get their noise made."""

from __future__ import annotations

import torch
from torch import Tensor

from ulr_kernels.ops import _perturbed
from ulr_kernels.ops._op import FLOATS, Check, Cost, Op, Output, fp32_tensor, key_tensor, register
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


register(
    Op(
        name="perturbed_embedding",
        schema=f"(Tensor indices, Tensor weight, Tensor sigma, Tensor key, {MEMBERS_SCHEMA}) -> Tensor",
        function=perturbed_embedding,
        check=check,
        reference=reference,
        cost=cost,
    )
)
