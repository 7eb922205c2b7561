"""perturbed_embedding: rows of a table with weight noise, which is made for the gathered rows only."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ulr_kernels.ops import _perturbed
from ulr_kernels.ops._op import FLOATS, Check, Cost, Op, Output, register
from ulr_kernels.ops._perturbed import COPIES_SCHEMA, WeightNoise


def perturbed_embedding(
    indices: Tensor,
    weight: Tensor,
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
    """y[c, r] = W'_c[indices[r]], W'_c = round_to_dtype(fma(sigma, eps_c, W)): an embedding with weight noise.

    Noise is made for the rows that are gathered, never for the table. It is the noise that `perturbed_linear` with the
    same weight and key uses (tied weights); low rank: eps as there, W' rounded.

    Args:
        indices: int64 `[R]`, shared by the copies, or `[C, R]`: rows of the weight.
        weight: `[V, D]`; fp32, bf16 or fp16; any strides.
        sigma, key, copies, antithetic, rank, dist, draw, row_offset, col_offset, mask, sampler, width: as in
            `perturbed_linear`.

    Returns:
        `[C, R, D]` of weight's dtype. Differentiable in weight and sigma (pathwise).

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above; nothing has been computed. Indices
            on a GPU are not read on the host: there the row of one that is out of range is NaN, or the device asserts.
        NotImplementedError: an input carries a forward-mode tangent.
    """
    how = (copies, antithetic, rank, dist, draw, row_offset, col_offset, mask, sampler, width)
    return _perturbed.call("perturbed_embedding", F.embedding, 1, (indices, weight), sigma, key, (), how)


class PerturbedEmbedding(NamedTuple):
    """Arguments of perturbed_embedding."""

    indices: Tensor
    weight: Tensor
    sigma: Tensor
    how: WeightNoise


def check(a: PerturbedEmbedding) -> Output:
    rules, indices, weight, copies = Check("perturbed_embedding"), a.indices, a.weight, a.how.copies
    rules.dtype("indices", indices, (torch.int64,))
    rules.dtype("weight", weight, FLOATS)
    if weight.dim() != 2:
        rules.fail("weight", "be [V, D]", list(weight.shape))
    _perturbed.check_copies(rules, weight, a.sigma, a.how)
    if indices.dim() not in (1, 2):
        rules.fail("indices", "be [R] or [C, R]", list(indices.shape))
    if indices.dim() == 2 and indices.shape[0] != copies:
        rules.fail("indices", f"have {copies} copies on its first axis, or no copy axis", list(indices.shape))
    rules.device("weight", weight.device, indices=indices, sigma=a.sigma, key=a.how.noise.key, mask=a.how.mask)
    return Output((copies, indices.shape[-1], weight.shape[1]), weight.dtype)


def check_range(indices: Tensor, weight: Tensor) -> None:
    """For back ends on the CPU, before they write: an index that is out of range would read foreign memory."""
    if indices.numel() and indices.device.type == "cpu":
        for extreme in torch.aminmax(indices):
            if not 0 <= extreme < weight.shape[0]:
                Check("perturbed_embedding").fail("indices", f"lie in [0, {weight.shape[0]})", int(extreme))


def reference(y: Tensor, a: PerturbedEmbedding) -> None:
    check_range(a.indices, a.weight)
    how = a.how.placed(a.weight)
    for copy in range(how.copies):
        rows = _perturbed.of_copy(a.indices, copy, 1)
        eps = _perturbed.copy_noise(rows, a.weight.shape[1], how, copy)
        mask = None if a.how.mask is None else a.how.mask[rows]
        y[copy] = _perturbed.perturbed(a.weight[rows], a.sigma, eps, mask)


def cost(a: PerturbedEmbedding) -> Cost:
    how, rows, width = a.how, a.indices.shape[-1], a.weight.shape[1]
    read = (1 if a.indices.dim() == 1 else how.copies) * rows * width
    noise = how.draws * (rows * width if how.rank is None else how.rank * (rows + width))
    return Cost(a.weight.element_size() * (read + how.copies * rows * width) + 8 * a.indices.numel(), 0, noise)


SCHEMA = f"(Tensor indices, Tensor weight, Tensor sigma, Tensor key, {COPIES_SCHEMA}) -> Tensor"
register(Op(perturbed_embedding, SCHEMA, PerturbedEmbedding, check, reference, cost))
