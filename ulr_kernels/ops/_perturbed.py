"""The perturbed ops: arguments and rules of a weight's noise, its reference, and pathwise gradients.

A copy c of C multiplies by W'_c = round_to_dtype(fma(sigma, eps_c, W)); the weight itself is never written. eps_c has
draw + c. Antithetic copies come as two halves: eps_c has draw + c mod C/2, negated in the second half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ulr_kernels import noise_contract
from ulr_kernels.ops._op import Check, NoiseSpec, fp32_tensor, key_tensor, needs_gradient
from ulr_kernels.ops._parameters import check_sampler, rows_cols

COPIES_SCHEMA = (
    'int copies=1, bool antithetic=False, int? rank=None, str dist="normal", int draw=0, int row_offset=0, '
    'int col_offset=0, Tensor? mask=None, str sampler="iid", int width=0'
)
REFERENCE_BLOCK = 2**18  # elements: the contract in torch holds about twenty int64 temporaries of each


class WeightNoise(NamedTuple):
    """Copies of a weight with noise: the key and COPIES_SCHEMA.

    mask: bool or uint8 of the weight's shape; noise only where it is set. All rows of the weight belong to one sample.
    """

    noise: NoiseSpec
    copies: int = 1
    rank: int | None = None
    mask: Tensor | None = None

    @property
    def draws(self) -> int:
        return self.noise.draws(self.copies)

    def placed(self, weight: Tensor) -> WeightNoise:
        """The same with the coordinates of a weight: how many rows a sample has, and columns the whole noise."""
        width = self.noise.width or self.noise.col_offset + rows_cols(weight)[1]
        return self._replace(noise=self.noise._replace(positions=noise_contract.ALL_ROWS, width=width))

    def which(self, copy: int) -> tuple[int, float]:
        """The draw and the sign of a copy's noise."""
        return self.noise.draw + copy % self.draws, 1.0 if copy < self.draws else -1.0


# --- checks ----------------------------------------------------------------------------------------------------------


def check_copies(check: Check, weight: Tensor, sigma: Tensor, how: WeightNoise) -> None:
    """The rules of the weight's noise; the weight has two axes or more, and its noise [shape[0], the rest]."""
    check.dtype("sigma", sigma, (torch.float32,))
    if sigma.dim():
        check.fail("sigma", "be a scalar", list(sigma.shape))
    draws = check.copies(how.copies, how.noise.antithetic)
    check_sampler(check, how.noise.sampler, how.noise.dist, how.rank)
    check.noise(how.noise._replace(positions=noise_contract.ALL_ROWS), *rows_cols(weight), draws)
    if how.rank is not None and how.rank < 1:
        check.fail("rank", "be None or at least 1", how.rank)
    if how.mask is not None:
        check.dtype("mask", how.mask, (torch.bool, torch.uint8))
        check.shape("mask", how.mask, tuple(weight.shape), "like weight")
        if how.rank is not None:
            check.fail("mask", "be None where rank is given: masked noise has another rank", "a tensor")


def check_bias(check: Check, weight: Tensor, bias: Tensor | None, copies: int) -> None:
    if bias is None:
        return
    check.dtype("bias", bias, (weight.dtype,))
    features = weight.shape[0]
    if tuple(bias.shape) not in ((features,), (copies, features)):
        check.fail("bias", f"be [{features}], or [{copies}, {features}] with one for each copy", list(bias.shape))


# --- reference -------------------------------------------------------------------------------------------------------


def copy_noise(rows: Tensor, cols: int, how: WeightNoise, copy: int) -> Tensor:
    """A copy's signed noise for some rows of the weight (int64 [R]): fp32 [R, cols]."""
    draw, sign = how.which(copy)
    noise = how.noise
    rows, columns = rows + noise.row_offset, torch.arange(cols, device=rows.device) + noise.col_offset
    eps = noise_contract.parameter_noise(
        rows, columns, how.rank, draw, noise.key, dist=noise.dist, sampler=noise.sampler, width=noise.width
    )
    return eps * sign


def copy_weight(weight: Tensor, sigma: Tensor, how: WeightNoise, copy: int) -> Tensor:
    """W' of a copy, in the weight's shape and dtype."""
    how = how.placed(weight)
    rows, cols = rows_cols(weight)
    result = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    block = max(1, REFERENCE_BLOCK // max(1, cols))
    for start in range(0, rows, block):
        index = torch.arange(start, min(start + block, rows), device=weight.device)
        mask = None if how.mask is None else how.mask[start : start + block]
        eps = copy_noise(index, cols, how, copy).view(len(index), *weight.shape[1:])
        result[start : start + block] = perturbed(weight[start : start + block], sigma, eps, mask)
    return result


def perturbed(weight: Tensor, sigma: Tensor, eps: Tensor, mask: Tensor | None) -> Tensor:
    """round_to_dtype(fma(sigma, eps, W)); W where the mask is not set."""
    result = noise_contract.fma(sigma, eps, weight.float()).to(weight.dtype)
    return result if mask is None else torch.where(mask.bool(), result, weight)


def of_copy(tensor: Tensor | None, copy: int, shared_dims: int) -> Any:
    """A copy's part of an argument that has as many axes as `shared_dims` where the copies share it."""
    return tensor if tensor is None or tensor.dim() == shared_dims else tensor[copy]


# --- pathwise gradients ----------------------------------------------------------------------------------------------

Layer = Callable[..., Tensor]  # x, weight and, where there is one, bias of one copy -> its output


def call(
    name: str,
    layer: Layer,
    shared_dims: int,
    tensors: tuple,
    sigma: float | Tensor,
    key: int | Tensor,
    own: tuple,
    how: tuple,
) -> Tensor:
    """Run `torch.ops.ulr.<name>`, differentiable in its tensors and sigma.

    Args:
        name: of the op.
        layer: the noiseless layer, whose derivatives are used.
        shared_dims: axes of an x that the copies share.
        tensors: x, weight and, where the op has one, bias.
        sigma, key: as the public function got them.
        own: the op's own arguments.
        how: the values of COPIES_SCHEMA.
    """
    key, sigma = key_tensor(name, key, tensors[0].device), fp32_tensor(name, "sigma", sigma, tensors[0].device)
    if needs_gradient(name, "the layer's own function and ulr.noise", *tensors, sigma):
        return _Pathwise.apply(name, layer, shared_dims, key, own, how, *tensors, sigma)
    return getattr(torch.ops.ulr, name).default(*tensors, sigma, key, *own, *how)


class _Pathwise(torch.autograd.Function):
    """The ordinary gradient through y at fixed noise, by autograd of the noiseless layer at each copy's W'."""

    @staticmethod
    def forward(ctx, name, layer, shared_dims, key, own, how, *tensors):
        *ctx.how, mask, ctx.sampler, ctx.width = how
        ctx.save_for_backward(key, mask, *tensors)
        ctx.layer, ctx.shared_dims = layer, shared_dims
        return getattr(torch.ops.ulr, name).default(*tensors, key, *own, *how)

    @staticmethod
    def backward(ctx, grad):
        key, mask, *tensors = ctx.saved_tensors
        copies, antithetic, rank, dist, draw, row_offset, col_offset = ctx.how
        noise = NoiseSpec(key, antithetic, dist, ctx.sampler, 1, draw, row_offset, col_offset, ctx.width)
        how = WeightNoise(noise, copies, rank).placed(tensors[1])
        wanted = ctx.needs_input_grad[-len(tensors) :]
        leaves: list[Any] = [
            None if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, wanted, strict=True)
        ]
        x, weight, *bias, sigma = leaves
        differentiated = [t for t, need in zip(leaves, wanted, strict=True) if need]
        totals = [torch.zeros_like(t, dtype=torch.float32) for t in differentiated]
        rows, cols = rows_cols(weight)

        def own_part(tensor: Tensor | None, copy: int, shared_dims: int) -> Tensor | None:
            part = of_copy(tensor, copy, shared_dims)  # autocast took any dtype; the layer wants the weight's
            return part.to(weight.dtype) if part is not None and part.is_floating_point() else part

        for copy in range(copies):
            eps = copy_noise(torch.arange(rows, device=weight.device), cols, how, copy).view(weight.shape)
            eps = eps if mask is None else eps * mask
            with torch.enable_grad():
                own = (weight.float() + sigma * eps).to(weight.dtype)
                y = ctx.layer(own_part(x, copy, ctx.shared_dims), own, *(own_part(b, copy, 1) for b in bias))
            found = torch.autograd.grad(y, differentiated, grad[copy].to(y.dtype), allow_unused=True)
            for total, part in zip(totals, found, strict=True):
                if part is not None:
                    total += part
        results = iter(total.to(t.dtype) for total, t in zip(totals, differentiated, strict=True))
        return *(None,) * 6, *(next(results) if need else None for need in wanted)
