"""The ops with weight noise of the cpp back end: W' in a tile or in a panel of scratch, products by oneDNN.

Few rows of x: each tile of W' is made in the first-level cache and multiplied by all rows there. Many rows: the library
makes a panel of W', for both copies of an antithetic pair at once, and oneDNN multiplies it by all rows. Many copies of
a small weight: a panel holds the W' of many copies, and one call multiplies them all. Low rank: a pass adds
sigma / sqrt(r) * (x B) A^T to oneDNN's plain product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ulr_kernels import products
from ulr_kernels.backends import _native
from ulr_kernels.backends.cpp.tiles import halves
from ulr_kernels.dispatch import allocating
from ulr_kernels.ops._conv import Window
from ulr_kernels.ops._op import Output
from ulr_kernels.ops._perturbed import WeightNoise, of_copy
from ulr_kernels.ops.perturbed_conv2d import PerturbedConv
from ulr_kernels.ops.perturbed_embedding import PerturbedEmbedding, check_range
from ulr_kernels.ops.perturbed_linear import PerturbedLinear

FEW_ROWS = 8  # up to here, a tile of W' used in the first-level cache beats a panel and oneDNN (docs/measured.md)
# Bytes: up to here, many copies' products in one call beat one call for each (docs/measured.md). In bf16 both are
# oneDNN's; in fp32 torch.bmm is the other BLAS, which on some machines is half as fast.
SMALL_WEIGHT = {torch.float32: 2**17, torch.float16: 2**17, torch.bfloat16: 2**20}
PANEL = 2**20  # elements of a panel of W', and of a copy of x


@allocating
def perturbed_linear(output: Output, a: PerturbedLinear) -> Tensor:
    """If one product makes all of y, it becomes the output."""
    x, weight, bias, sigma, how = a
    how = how.placed(weight)
    if not output.numel():
        return output.allocate(x.device)
    if how.copies == 1 and how.rank is None and _in_one_panel(x, weight):
        return _one_panel(x, weight, bias, sigma, how)
    if how.rank is not None:
        return _low_rank(output, x, weight, bias, sigma, how)
    y = output.allocate(x.device)
    if x.shape[-2] <= FEW_ROWS:
        xs, biases = _by_sign(x, 2, how), _by_sign(bias, 1, how)
        _launch("perturbed_linear", how, (*halves(y, how.noise.antithetic), *xs, *biases, weight, sigma, how.mask))
    elif how.draws > 1 and 0 < weight.nbytes <= SMALL_WEIGHT.get(x.dtype, 0) and products.supports(x.dtype):
        _by_batches(y, x, weight, bias, sigma, how)
    else:
        _by_panels(y, x, weight, bias, sigma, how)
    return y


# One copy whose weight is one panel. The code is short on purpose: a large product evicts the interpreter's memory from
# the caches, so that each line after it costs several times as much as in a loop.


def _in_one_panel(x: Tensor, weight: Tensor) -> bool:
    return x.shape[-2] > FEW_ROWS and 0 < weight.numel() <= PANEL and products.supports(x.dtype)


def _one_panel(x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, how: WeightNoise) -> Tensor:
    panel = weight.new_empty(weight.shape)
    _launch("perturbed_weight", how, (panel, None, weight, sigma, how.mask, None, None))
    product = products.linear(x, panel, bias if bias is None else bias.view(-1))
    return product if x.dim() == 3 else product[None]


# Many copies of a small weight: a panel holds the W' of many draws, and one call multiplies them all.


def _by_batches(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, how: WeightNoise) -> None:
    memory = weight.new_empty(2 if how.noise.antithetic else 1, min(how.draws, PANEL // weight.numel()), *weight.shape)
    for first in range(0, how.draws, memory.shape[1]):
        panels = memory[:, : how.draws - first]
        made = (panels[0], panels[1] if how.noise.antithetic else None)
        _launch("perturbed_weight", how, (*made, weight, sigma, how.mask, None, None), draw=first)
        for start, panel in zip((first, first + how.draws), panels, strict=False):
            own = slice(start, start + len(panel))
            own_x = x.expand(len(panel), *x.shape) if x.dim() == 2 else x[own]
            if bias is None:
                torch.bmm(own_x, panel.mT, out=y[own])
            else:
                torch.baddbmm((bias if bias.dim() == 1 else bias[own, None]), own_x, panel.mT, out=y[own])


# Any other call.


def _by_panels(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, how: WeightNoise) -> None:
    parts = _feature_parts(weight)
    panels = _Panels(weight, sigma, how, parts[0].stop)
    for draw in range(how.draws):
        for part in parts:
            copies = (draw, draw + how.draws) if how.noise.antithetic else (draw,)
            for copy, panel in zip(copies, panels.make(draw, part), strict=True):
                y[copy, :, part] = _product(of_copy(x, copy, 2), panel, of_copy(bias, copy, 1), part)


def _feature_parts(weight: Tensor) -> list[slice]:
    features, inputs = weight.shape
    step = min(features, max(1, PANEL // max(1, inputs)))
    return [slice(first, min(first + step, features)) for first in range(0, features, step)]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, features: slice) -> Tensor:
    bias = bias if bias is None else bias[features]
    if products.supports(x.dtype):
        return products.linear(x, weight, bias)
    return products.linear(x.float(), weight.float(), bias if bias is None else bias.float())


class _Panels:
    """Makes W' for parts of a weight's rows, one after another in the same memory, for the copies of a draw."""

    def __init__(self, weight: Tensor, sigma: Tensor, how: WeightNoise, rows: int) -> None:
        self._weight, self._sigma, self._how = weight, sigma, how
        self._memory = weight.new_empty(2 if how.noise.antithetic else 1, rows, weight[:1].numel())

    def make(self, draw: int, rows: slice) -> Tensor:
        """`[1 or 2, rows, K]`, K being all other axes of the weight."""
        part, mask, how = self._weight[rows].flatten(1), self._how.mask, self._how
        panels = self._memory[:, : len(part)]
        minus = panels[1:] if how.noise.antithetic else None
        mask = mask if mask is None else mask[rows].flatten(1)
        tensors = (panels[:1], minus, part, self._sigma, mask, None, None)
        _launch("perturbed_weight", how, tensors, draw=draw, row=rows.start)
        return panels


def _low_rank(
    output: Output, x: Tensor, weight: Tensor, bias: Tensor | None, sigma: Tensor, how: WeightNoise
) -> Tensor:
    own = bias if bias is not None and bias.dim() == 2 else None  # one for each copy, added by the pass
    shared = bias if own is None else None
    in_place = x.dim() == 3 or how.copies == 1  # else the copies share the plain product
    if x.is_contiguous() and x.numel() and products.dense(weight) and products.supports(x.dtype):
        base = products.linear(x.view(-1, x.shape[-1]), weight, shared)
        base = base.view(-1, x.shape[-2], len(weight))
        y = base if in_place else output.allocate(x.device)
    else:
        y = output.allocate(x.device)
        base = y if in_place else y.new_empty(1, *y.shape[1:])
        for part in _feature_parts(weight):
            panel = weight[part].contiguous()
            for copy, clean in enumerate(base):
                clean[:, part] = _product(of_copy(x, copy, 2), panel, shared, part)
    bases = halves(base, how.noise.antithetic) if len(base) > 1 else (base, None)
    biases = _by_sign(own if own is None else own.contiguous(), 1, how)
    _launch("low_rank_linear", how, (*halves(y, how.noise.antithetic), *bases, *_by_sign(x, 2, how), *biases, sigma))
    return y


def perturbed_conv2d(y: Tensor, a: PerturbedConv) -> Tensor | None:
    x, weight, bias, sigma, window, how = a
    how = how.placed(weight)
    if not y.numel():
        return None
    parts = list(_filter_parts(weight, window))
    panels = _Panels(weight, sigma, how, max(part.stop - part.start for part, _, _ in parts))
    for draw in range(how.draws):
        for part, channels, groups in parts:
            made = panels.make(draw, part).unflatten(-1, weight.shape[1:])
            for copy, panel in zip((draw, draw + how.draws), made, strict=False):
                own_bias = of_copy(bias, copy, 1)
                own_bias = own_bias if own_bias is None else own_bias[part]
                own_x = of_copy(x, copy, 4)[:, channels]
                product = window._replace(groups=groups).convolve(own_x, panel, own_bias)
                if how.copies == len(parts) == 1 and product.stride() == y.stride()[1:]:
                    return product[None]
                y[copy, :, part] = product
    return None


def _filter_parts(weight: Tensor, window: Window) -> Iterator[tuple[slice, slice, int]]:
    """For each panel: its output channels, their input channels, and the number of groups."""
    filters, inputs = len(weight) // window.groups, weight.shape[1]  # of a group
    in_panel = max(1, PANEL // weight[0].numel())
    step = min(window.groups, max(1, in_panel // filters))  # groups of a panel
    for group in range(0, window.groups, step):
        groups = min(step, window.groups - group)
        first, last = group * filters, (group + groups) * filters
        for start in range(first, last, in_panel):
            yield slice(start, min(start + in_panel, last)), slice(group * inputs, (group + groups) * inputs), groups


def perturbed_embedding(y: Tensor, a: PerturbedEmbedding) -> None:
    indices, weight, sigma, how = a
    how = how.placed(weight)
    check_range(indices, weight)
    own = (indices, None) if indices.dim() == 1 else halves(indices, how.noise.antithetic)
    _launch("perturbed_weight", how, (*halves(y, how.noise.antithetic), weight, sigma, how.mask, *own))


def _by_sign(tensor: Tensor | None, shared_dims: int, how: WeightNoise) -> tuple[Tensor | None, Tensor | None]:
    """`halves` of an argument; the second is None where the copies share it. A bias is a row: [copies, 1, N]."""
    if tensor is None or tensor.dim() == shared_dims:
        return tensor, None
    return halves(tensor[:, None] if tensor.dim() == 2 else tensor, how.noise.antithetic)


def _launch(name: str, how: WeightNoise, tensors: tuple[Tensor | None, ...], draw: int = 0, row: int = 0) -> None:
    """`draw`, `row`: where in the weight's noise the launch starts."""
    _native.launch_cpu(name, _native.noise_view(how.noise, draw=draw, row=row), tensors, (how.rank or 0,))
