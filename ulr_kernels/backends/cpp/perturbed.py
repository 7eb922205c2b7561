"""The ops with weight noise of the cpp back end: W' in scratch or in a tile, products by oneDNN.

The library's pass over the noise (csrc/cpu/perturbed_weight.cpp) makes a panel of W', for both members of an antithetic
pair at once; every row of x then multiplies by it while it is in the cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ulr_kernels.backends import _native
from ulr_kernels.backends.cpp import onednn
from ulr_kernels.ops._parameters import grid
from ulr_kernels.ops._perturbed import Members, of_member
from ulr_kernels.ops.perturbed_embedding import check_range

PANEL = 2**20  # elements of a panel of W'


def perturbed_linear(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, key: Tensor, *rest):
    """Where one product makes all of y, it becomes the output: oneDNN allocates its result."""
    how = Members(*rest)
    if not y.numel():
        return None
    if not weight.shape[1]:
        y.copy_(torch.zeros(()) if bias is None else bias if bias.dim() == 1 else bias[:, None])
        return None
    features, inputs = weight.shape
    step = min(features, max(1, PANEL // inputs))
    alone = how.members == 1 and step == features and onednn.supports(x.dtype)
    if alone:
        y.untyped_storage().resize_(0)
    for draw in range(how.draws):
        for first in range(0, features, step):
            rows = slice(first, min(first + step, features))
            for member, panel in zip(_members(how, draw), _panels(weight, sigma, key, how, draw, rows), strict=True):
                own_bias = of_member(bias, member, 1)
                own_bias = own_bias if own_bias is None else own_bias[rows]
                product = _product(of_member(x, member, 2), panel, own_bias)
                if alone:
                    return product[None]
                y[member, :, rows] = product
    return None


def _members(how: Members, draw: int) -> tuple[int, ...]:
    """Those that use a draw."""
    return (draw, draw + how.draws) if how.antithetic else (draw,)


def _product(x: Tensor, panel: Tensor, bias: Tensor | None) -> Tensor:
    if onednn.supports(x.dtype):
        return onednn.linear(x, panel, bias if bias is None else bias.contiguous())
    return onednn.linear(x.float(), panel.float(), bias if bias is None else bias.float())


def _panels(weight: Tensor, sigma: Tensor, key: Tensor, how: Members, draw: int, rows: slice) -> Tensor:
    """W' of some rows, for the members of a draw: [1 or 2, rows, K]."""
    part = weight[rows]
    panels = part.new_empty(2 if how.antithetic else 1, *part.shape)
    mask = how.mask if how.mask is None else how.mask[rows]
    minus = panels[1:] if how.antithetic else None
    _weights(panels[:1], minus, part, sigma, mask, None, None, key, how, draw, rows.start)
    return panels


def _weights(
    y: Tensor,
    minus_y: Tensor | None,
    weight: Tensor,
    sigma: Tensor,
    mask: Tensor | None,
    indices: Tensor | None,
    minus_indices: Tensor | None,
    key: Tensor,
    how: Members,
    draw: int = 0,
    first_row: int = 0,
) -> None:
    at = (how.draw + draw, how.row_offset + first_row, how.col_offset)
    spec = _native.noise_spec(key, how.dist, "iid", 1, *at, width=0, antithetic=how.antithetic)
    tensors = (y, minus_y, weight, sigma, mask, indices, minus_indices)
    views = tuple(None if t is None else _native.view(t) for t in tensors)
    _native.launcher("cpp", "perturbed_weight")(spec, views, (how.rank or 0,), threads=torch.get_num_threads())


def perturbed_conv2d(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, key: Tensor, *rest):
    args, how = rest[:4], Members(*rest[4:])
    if not y.numel():
        return None
    flat = weight.reshape(grid(weight))
    how = how._replace(mask=how.mask if how.mask is None else how.mask.reshape(flat.shape))
    for draw in range(how.draws):
        panels = _panels(flat, sigma, key, how, draw, slice(0, len(flat))).view(-1, *weight.shape)
        for member, panel in zip(_members(how, draw), panels, strict=True):
            product = F.conv2d(of_member(x, member, 4), panel, of_member(bias, member, 1), *args)
            if how.members == 1:
                return product.contiguous()[None]
            y[member] = product
    return None


def perturbed_embedding(y: Tensor, indices: Tensor, weight: Tensor, sigma: Tensor, key: Tensor, *rest) -> None:
    check_range(indices, weight)
    how = Members(*rest)
    indices = indices if indices.dim() == 2 else indices[None]
    plus, minus = _halves(y, how)
    own, minus_own = _halves(indices, how) if len(indices) > 1 else (indices, None)
    _weights(plus, minus, weight, sigma, how.mask, own, minus_own, key, how)


def _halves(tensor: Tensor, how: Members) -> tuple[Tensor, Tensor | None]:
    """The members with the noise as it is, and those with the noise negated."""
    return (tensor[: how.draws], tensor[how.draws :]) if how.antithetic else (tensor, None)
