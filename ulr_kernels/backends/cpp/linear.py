"""The three linear ops of the cpp back end: oneDNN's products and the library's pass over the noise, tile by tile.

Forward and gradient are parts of one loop: a tile of features, then a tile of rows (and of copies, where each has its
own x). The library's pass (csrc/cpu/noisy_linear.cpp) makes a tile's noise once for both. The only memory allocated
beside the outputs is a few tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ulr_kernels import products
from ulr_kernels.backends import _native
from ulr_kernels.backends.cpp.tiles import halves, narrow, part, row_tiles, store, sums_of
from ulr_kernels.dispatch import allocating
from ulr_kernels.ops._linear import Linear, LinearGradient
from ulr_kernels.ops._op import NoiseSpec, Output
from ulr_kernels.ops.foreach_noisy_linear_grad_ import LinearGradients

# Elements of a tile. Forward: large, because each product packs the weight again. Gradient: small, because a tile of
# scores and one of the product come on top of the buffers.
FORWARD_TILE = 2**20
GRADIENT_TILE = 2**17
_FP32 = torch.float32
FEWEST = 32  # rows or features of a tile, however long they are: below this a product is inefficient


@allocating
def noisy_linear(output: Output, a: Linear) -> Tensor:
    """If one product makes every row of y, it becomes the output."""
    x = a.x
    if (a.copies == 1 or x.dim() == 3) and _in_one_product(x, a.weight):
        add_noise = _noise_adder(output, a.sigma, a.noise)
        product = products.linear(x if x.dim() == 2 else x.view(-1, x.shape[-1]), a.weight, a.bias)
        made = product.view(output.shape)
        add_noise(made.data_ptr())
        return made
    y = output.allocate(x.device)
    _linear(y, None, x, a.weight, a.bias, a.sigma, a.copies, a.noise)
    return y


def noisy_linear_grad_(a: LinearGradient) -> None:
    _linear(None, a, a.x, None, None, a.sigma, a.loss_weight.shape[0], a.noise)


def foreach_noisy_linear_grad_(a: LinearGradients) -> None:
    for layer in a.layers():
        noisy_linear_grad_(layer)


def noisy_linear_recompute_(y: Tensor, a: LinearGradient) -> None:
    _linear(y, a, a.x, a.weight, a.bias, a.sigma, a.loss_weight.shape[0], a.noise)


def _linear(
    y: Tensor | None,
    gradient_of: LinearGradient | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sigma: Tensor,
    copies: int,
    noise: NoiseSpec,
) -> None:
    """The forward where there is y, the gradient where there is `gradient_of`."""
    grad_weight, grad_bias, grad_log_sigma = gradient_of.buffers if gradient_of else (None, None, None)
    loss_weight = gradient_of.loss_weight if gradient_of else None
    antithetic = noise.antithetic
    features = next(t.shape[0] for t in (weight, grad_weight, grad_bias) if t is not None)
    if not x.shape[-2] or not features:
        return
    weight_rows = noise.positions if loss_weight is None else x.shape[-2] // loss_weight.shape[1]  # of one weight
    draws = noise.draws(copies)
    own_x = x.dim() == 3 and copies > 1  # each copy has its own; a single copy is the shared case
    x = x if x.dim() == 3 else x[None]
    sizes = _tile_sizes(x, weight, grad_weight, loss_weight is not None, features)
    xs = halves(x, antithetic and own_x)
    ys = halves(y, antithetic)
    loss_weights = halves(loss_weight, antithetic)
    sigma = sigma.expand(features)
    bias_sums = None if grad_bias is None else sums_of(grad_bias)
    log_sigma = None if grad_log_sigma is None else sums_of(grad_log_sigma)
    log_sigma_sums = None if log_sigma is None else log_sigma.expand(features)  # a scalar's has stride 0

    launch, threads = _native.launcher("cpp", "noisy_linear"), torch.get_num_threads()
    for n in range(0, features, sizes.features):
        cols = slice(n, min(n + sizes.features, features))
        operands = None if weight is None else _operands(narrow(weight, cols), part(bias, cols))
        buffer = part(grad_weight, cols)
        weight_sums = None if buffer is None else sums_of(buffer)
        for copy, row in row_tiles(draws if own_x else 1, x.shape[1], sizes.rows, weight_rows):
            use = copy if own_x else slice(0, draws)
            weighed = slice(row.start // weight_rows, -(-row.stop // weight_rows))
            y_tiles = [part(half, use, row, cols) for half in ys]
            x_tiles = [part(half, copy, row) for half in xs]
            bases: list[Tensor | None] = [None, None]
            if operands is not None:
                bases = [None if tile is None else _product(tile, *operands) for tile in x_tiles]
            scores: list[Tensor | None] = [None, None]
            if loss_weight is not None:
                scores = [None if t is None else t.new_empty(*t.shape[:2], cols.stop - n, dtype=_FP32) for t in x_tiles]
            tensors = (
                *y_tiles,
                *bases,
                narrow(sigma, cols),
                *(part(half, use, weighed) for half in loss_weights),
                *scores,
                part(bias_sums, cols),
                part(log_sigma_sums, cols),
            )
            which = _native.noise_view(noise, features, use.start, row.start, n)
            launch(which, _native.views(tensors), threads=threads)
            if weight_sums is not None:
                for score, tile in zip(scores, x_tiles, strict=True):
                    if score is not None and tile is not None:
                        _add_product(weight_sums, score, tile, sizes.product_features)
            del bases, scores, tensors  # before the next tile's are allocated
        store(weight_sums, buffer)
    if loss_weight is not None:
        store(bias_sums, grad_bias)
        store(log_sigma, grad_log_sigma)


# ---------------------------------------------------------------------------------------------------------------------
# A forward in one product. The code is short on purpose: a large product evicts the interpreter's memory from the
# caches, so that each line after it costs several times as much as in a loop.


def _in_one_product(x: Tensor, weight: Tensor) -> bool:
    return x.numel() > 0 and x.is_contiguous() and products.supports(x.dtype) and products.dense(weight)


def _noise_adder(output: Output, sigma: Tensor, noise: NoiseSpec) -> Callable[[int], None]:
    """A function that adds sigma * eps, for all copies, to a contiguous output at an address.

    All that can be prepared is prepared here, before the product, and not in that function, which runs after it.
    """
    copies, rows, features = output.shape
    dtype, strides = _native.DTYPES[output.dtype], (rows * features, features, 1)
    antithetic = noise.antithetic
    half = (noise.draws(copies), rows, features)
    offset = half[0] * strides[0] * output.dtype.itemsize
    scale = (sigma.data_ptr(), _native.DTYPES[_FP32], (features,), sigma.stride() or (0,))
    which = _native.noise_view(noise, features)
    launch, threads = _native.launcher("cpp", "noisy_linear"), torch.get_num_threads()

    def add(address: int) -> None:
        plus = (address, dtype, half, strides)
        minus = (address + offset, dtype, half, strides) if antithetic else None
        launch(which, (plus, minus, plus, minus, scale, None, None, None, None, None, None), threads=threads)

    return add


# ---------------------------------------------------------------------------------------------------------------------
# Tiles.


class _Sizes(NamedTuple):
    rows: int
    features: int
    product_features: int  # of a product of scores and x


def _tile_sizes(x: Tensor, weight: Tensor | None, grad_weight: Tensor | None, gradient: bool, features: int) -> _Sizes:
    rows, inputs = x.shape[0] * x.shape[1], x.shape[2]
    tile = GRADIENT_TILE if gradient else FORWARD_TILE
    longest = _even(features, max(FEWEST, tile // max(inputs, 1)))
    all_features = not gradient or (rows * features <= tile and (grad_weight is None or grad_weight.dtype == _FP32))
    if weight is not None and not (products.dense(weight) and products.supports(weight.dtype)):
        all_features = False
    tile_features = features if all_features else longest
    copied = not x.is_contiguous() or not products.supports(x.dtype) or (gradient and x.dtype != _FP32)
    tile_rows = max(FEWEST, tile // max(tile_features, inputs if copied else 1))
    return _Sizes(tile_rows, tile_features, min(longest, tile_features))


def _even(extent: int, limit: int) -> int:
    """A size near or below `limit` that cuts `extent` into even parts."""
    if extent <= limit:
        return extent
    parts = -(-extent // limit)
    return -(-extent // parts // 16) * 16


# ---------------------------------------------------------------------------------------------------------------------
# Products.


def _operands(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias for oneDNN: dense, and fp32 where it does not multiply the dtype."""
    if not products.supports(weight.dtype):
        return weight.float().contiguous(), bias if bias is None else bias.float()
    return weight if products.dense(weight) else weight.contiguous(), bias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b of a tile of copies, with fp32 sums.

    A bf16 product is rounded to bf16 before the noise is added, because oneDNN's output has its inputs' dtype. An fp16
    product is fp32 where oneDNN has no fp16.
    """
    rows = x.flatten(0, 1).to(weight.dtype)
    return products.linear(rows, weight, bias).view(*x.shape[:2], weight.shape[0])


def _add_product(sums: Tensor, scores: Tensor, x: Tensor, step: int) -> None:
    """Add the sum over copies and rows of scores [C, R, N] (outer) x [C, R, K], in fp32, `step` features at a time."""
    rows = x.flatten(0, 1).float().contiguous()
    scores = scores.flatten(0, 1)
    for n in range(0, scores.shape[1], step):
        cols = slice(n, n + step)
        products.add_outer_(sums[cols], scores[:, cols], rows)
