"""What the perturbed ops share: the members' part of the schema, its rules, the noise of a weight, pathwise gradients.

A member p of P multiplies by W'_p = round_to_dtype(fma(sigma, eps_p, W)); the weight itself is never written. eps_p is
draw + p, or of antithetic members, which come as two halves, draw + p mod P/2, negated in the second half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ulr_kernels import noise_contract
from ulr_kernels.ops._op import Check, refuse_tangents
from ulr_kernels.ops._parameters import grid

MEMBERS_SCHEMA = (
    'int members=1, bool antithetic=False, int? rank=None, str dist="normal", int draw=0, int row_offset=0, '
    "int col_offset=0, Tensor? mask=None"
)
REFERENCE_BLOCK = 2**18  # elements: the contract in torch holds about twenty int64 temporaries of each


class Members(NamedTuple):
    """The arguments of MEMBERS_SCHEMA. mask: bool or uint8 of the weight's shape; noise only where it is set."""

    members: int = 1
    antithetic: bool = False
    rank: int | None = None
    dist: str = "normal"
    draw: int = 0
    row_offset: int = 0
    col_offset: int = 0
    mask: Tensor | None = None

    @property
    def draws(self) -> int:
        return self.members // 2 if self.antithetic else self.members

    def which(self, member: int) -> tuple[int, float]:
        """The draw and the sign of a member's noise."""
        return self.draw + member % self.draws, 1.0 if member < self.draws else -1.0


# --- checks ----------------------------------------------------------------------------------------------------------


def check_members(check: Check, weight: Tensor, sigma: Tensor, key: Tensor, how: Members) -> None:
    """The rules of the weight's noise; the weight has two axes or more, and its noise [shape[0], the rest]."""
    rows, cols = grid(weight)
    check.dtype("sigma", sigma, (torch.float32,))
    if sigma.dim():
        check.fail("sigma", "be a scalar", list(sigma.shape))
    draws = check.copies(how.members, how.antithetic, "members")
    check.noise(key, rows, cols, draws, how.dist, "iid", 1, how.draw, how.row_offset, how.col_offset)
    if how.rank is not None and how.rank < 1:
        check.fail("rank", "be None or at least 1", how.rank)
    if how.mask is not None:
        check.dtype("mask", how.mask, (torch.bool, torch.uint8))
        check.shape("mask", how.mask, tuple(weight.shape), "like weight")
        if how.rank is not None:
            check.fail("mask", "be None where rank is given: masked noise has another rank", "a tensor")


def check_bias(check: Check, weight: Tensor, bias: Tensor | None, members: int) -> None:
    if bias is None:
        return
    check.dtype("bias", bias, (weight.dtype,))
    features = weight.shape[0]
    if tuple(bias.shape) not in ((features,), (members, features)):
        check.fail("bias", f"be [{features}], or [{members}, {features}] with one for each member", list(bias.shape))


# --- reference -------------------------------------------------------------------------------------------------------


def member_noise(rows: Tensor, cols: int, key: Tensor, how: Members, member: int) -> Tensor:
    """A member's signed noise for some rows of the weight (int64 [R]): fp32 [R, cols]."""
    draw, sign = how.which(member)
    rows, columns = rows + how.row_offset, torch.arange(cols, device=rows.device) + how.col_offset
    if how.rank is not None:
        return noise_contract.low_rank_at(rows, columns, how.rank, draw, key, dist=how.dist) * sign
    at = (rows[:, None], columns[None], draw, key)
    return noise_contract.noise_at(*at, dist=how.dist, sampler="iid", positions=1, width=0) * sign


def member_weight(weight: Tensor, sigma: Tensor, key: Tensor, how: Members, member: int) -> Tensor:
    """W' of a member, in the weight's shape and dtype."""
    rows, cols = grid(weight)
    result = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    block = max(1, REFERENCE_BLOCK // max(1, cols))
    for start in range(0, rows, block):
        index = torch.arange(start, min(start + block, rows), device=weight.device)
        mask = None if how.mask is None else how.mask[start : start + block]
        eps = member_noise(index, cols, key, how, member).view(len(index), *weight.shape[1:])
        result[start : start + block] = perturbed(weight[start : start + block], sigma, eps, mask)
    return result


def perturbed(weight: Tensor, sigma: Tensor, eps: Tensor, mask: Tensor | None) -> Tensor:
    """round_to_dtype(fma(sigma, eps, W)); W where the mask is not set."""
    result = noise_contract.fma(sigma, eps, weight.float()).to(weight.dtype)
    return result if mask is None else torch.where(mask.bool(), result, weight)


def of_member(tensor: Tensor | None, member: int, shared_dims: int) -> Any:
    """A member's part of an argument that has as many axes as `shared_dims` where the members share it."""
    return tensor if tensor is None or tensor.dim() == shared_dims else tensor[member]


# --- pathwise gradients ----------------------------------------------------------------------------------------------

Layer = Callable[..., Tensor]  # x, weight and, where there is one, bias of one member -> its output


def call(name: str, layer: Layer, shared_dims: int, tensors: tuple, key: Tensor, args: tuple, how: Members) -> Tensor:
    """Run `torch.ops.ulr.<name>` on tensors (x, weight, bias where it has one, sigma), differentiable in them.

    layer: the noiseless layer, of whose derivatives the op's are made; shared_dims: axes of an x that members share;
    args: the op's own arguments.
    """
    refuse_tangents(name, "the layer's own function and ulr.noise", *tensors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Pathwise.apply(name, layer, shared_dims, key, args, how, *tensors)
    return getattr(torch.ops.ulr, name).default(*tensors, key, *args, *how)


class _Pathwise(torch.autograd.Function):
    """The ordinary gradient through y at fixed noise, by autograd of the noiseless layer at each member's W'."""

    @staticmethod
    def forward(ctx, name, layer, shared_dims, key, args, how, *tensors):
        ctx.save_for_backward(key, how.mask, *tensors)
        ctx.layer, ctx.shared_dims, ctx.how = layer, shared_dims, how._replace(mask=None)
        return getattr(torch.ops.ulr, name).default(*tensors, key, *args, *how)

    @staticmethod
    def backward(ctx, grad):
        key, mask, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[-len(tensors) :]
        leaves: list[Any] = [
            None if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, wanted, strict=True)
        ]
        x, weight, *bias, sigma = leaves
        asked = [t for t, need in zip(leaves, wanted, strict=True) if need]
        totals = [torch.zeros_like(t, dtype=torch.float32) for t in asked]
        rows, cols = grid(weight)

        def own_part(tensor: Tensor | None, member: int, shared_dims: int) -> Tensor | None:
            part = of_member(tensor, member, shared_dims)  # autocast took any dtype; the layer wants the weight's
            return part.to(weight.dtype) if part is not None and part.is_floating_point() else part

        for member in range(ctx.how.members):
            eps = member_noise(torch.arange(rows, device=weight.device), cols, key, ctx.how, member).view(weight.shape)
            eps = eps if mask is None else eps * mask
            with torch.enable_grad():
                own = (weight.float() + sigma * eps).to(weight.dtype)
                y = ctx.layer(own_part(x, member, ctx.shared_dims), own, *(own_part(b, member, 1) for b in bias))
            found = torch.autograd.grad(y, asked, grad[member].to(y.dtype), allow_unused=True)
            for total, part in zip(totals, found, strict=True):
                if part is not None:
                    total += part
        results = iter(total.to(t.dtype) for total, t in zip(totals, asked, strict=True))
        return *(None,) * 6, *(next(results) if need else None for need in wanted)
