# mypy: disable-error-code="assignment"
"""What the gradients of linear layers and of convolutions share: a draw's part in the sums, and the arguments of their
launches."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ulr_kernels.backends.triton.contract import noise_parts, noise_tile, score
from ulr_kernels.backends.triton.launch import strides
from ulr_kernels.backends.triton.scores import log_weighted, weighted
from ulr_kernels.backends.triton.tiles import Tile


@triton.jit
def transposed_product(scores, x_tile, total):
    """total + scores^T x. fp16 holds no small loss weights: its product is made in tf32, which holds fp16 exactly."""
    if x_tile.dtype == tl.float16:
        return tl.dot(tl.trans(scores), x_tile.to(tl.float32), total, input_precision="tf32")
    else:
        return tl.dot(tl.trans(scores.to(x_tile.dtype)), x_tile, total, input_precision="ieee")


@triton.jit
def weigh_draw(
    raw, source, losses, mirror_loss, row_inside, reduced, reduced_log, grad_log_sigma, ANTITHETIC: tl.constexpr,
    DIST: tl.constexpr,
):  # fmt: skip
    """The loss weights [BR, 1] of a draw's copy and of the negated one, and the sums over draws with theirs added.

    `losses` are the addresses of the copy's, those of the negated one lie `mirror_loss` further.
    """
    parts = noise_parts(raw, source, DIST)
    plus = tl.load(losses, mask=row_inside, other=0)[:, None]
    minus = tl.zeros_like(plus)
    if ANTITHETIC:
        minus = tl.load(losses + mirror_loss, mask=row_inside, other=0)[:, None]
    reduced = weighted(reduced, plus - minus, parts, DIST)  # the score is odd
    if grad_log_sigma is not None:
        reduced_log = log_weighted(reduced_log, plus + minus, parts, DIST)
    return plus, minus, reduced, reduced_log


@triton.jit
def own_products(
    raw, source, plus, minus, x_copy, mirror_x, x_inside, total, ANTITHETIC: tl.constexpr, DIST: tl.constexpr
):
    """total + scores^T x of a draw whose copies have an x each; the negated one's lies `mirror_x` further."""
    slope = score(noise_tile(raw, source, DIST), DIST)
    total = transposed_product(plus * slope, tl.load(x_copy, mask=x_inside, other=0), total)
    if ANTITHETIC:
        total = transposed_product(-minus * slope, tl.load(x_copy + mirror_x, mask=x_inside, other=0), total)
    return total


@triton.jit
def add_scalar(buffer, partials, ticket, value, tile, tile_count):
    """buffer[0] += the sum of each tile's value: the program that comes last adds them up, in the order of the tiles.

    `ticket` counts the programs that have arrived, and is 0 again when the last one leaves.
    """
    tl.store(partials + tile, value)
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem="acq_rel") == tile_count - 1:
        total = tl.load(buffer).to(tl.float32)
        for i in range(tile_count):
            total += tl.load(partials + i, cache_modifier=".cg")
        tl.store(buffer, total.to(buffer.dtype.element_ty))
        tl.store(ticket, 0)


def gradient_arguments(
    y: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_log_sigma: Tensor | None,
    loss_weight: Tensor,
    shared: bool,
    antithetic: bool,
    tile: Tile,
) -> dict[str, Any]:
    """The part of the arguments that says what is added up, and in which tiles."""
    copies = loss_weight.shape[0]
    return {
        "y": y,
        "grad_weight": grad_weight,
        "grad_bias": grad_bias,
        "grad_log_sigma": grad_log_sigma,
        "loss_weight": loss_weight,
        "draws": copies // 2 if antithetic else copies,
        **strides("stride_", grad_bias, "grad_bias"),
        **strides("stride_", grad_log_sigma, "log_sigma"),
        **strides("stride_loss_", loss_weight, "copy", "sample"),
        "SHARED": shared,
        "ANTITHETIC": antithetic,
        "BR": tile.rows,
        "BC": tile.cols,
        "BK": tile.inputs,
    }
