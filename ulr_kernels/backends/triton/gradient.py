# mypy: disable-error-code="assignment"
"""Gradients of linear layers and of convolutions: the loop over draws, and the arguments of their launches."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ulr_kernels.backends.triton.launch import strides
from ulr_kernels.backends.triton.noise_contract import (
    RADEMACHER,
    join_parts,
    no_signs,
    noise_parts,
    noise_tile,
    raw_noise,
    score,
    shared_signs,
)
from ulr_kernels.backends.triton.scores import no_parts, weigh
from ulr_kernels.ops._conv import ConvGradient
from ulr_kernels.ops._linear import LinearGradient


@triton.jit
def transposed_product(scores, x_tile, total):
    """total + scores^T x. fp16 uses tf32, which holds it exactly: small loss weights underflow in fp16."""
    if x_tile.dtype == tl.float16:
        return tl.dot(tl.trans(scores), x_tile.to(tl.float32), total, input_precision="tf32")
    else:
        return tl.dot(tl.trans(scores.to(x_tile.dtype)), x_tile, total, input_precision="ieee")


@triton.jit
def add_rows(
    total, by_bias, by_log_sigma, is_first, clean_tile: tl.constexpr, x, operands, y_tile, copy_size, inside, x_tile,
    x_inside, stride_x_copy, losses, stride_loss_copy, row_inside, source, rows_of_noise, calls, directions, positions,
    width, draw, draws, scale, grad_weight, grad_log_sigma, SHARED: tl.constexpr, ANTITHETIC: tl.constexpr,
    DIST: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Add a tile of rows to the sums over rows and draws: the gradients of the weights [BC, BK], and, where
    `is_first`, of the biases and of ln sigma [BC].

    `x_tile` and `losses` are the first copy's addresses. With `y_tile` (recompute), the addresses of the outputs, the
    forward's tile is stored too: `clean_tile(x, *operands)` with noise; copies that share x share one product.
    """
    P: tl.constexpr = 16 if DIST >= RADEMACHER else 4
    mirror_x = tl.cast(draws, tl.int64) * stride_x_copy  # from a copy to its mirror, whose noise is negated
    mirror_loss = tl.cast(draws, tl.int64) * stride_loss_copy
    reduced = no_parts(P, BR, BC)
    reduced_log = no_parts(P, BR, BC)
    if y_tile is not None and SHARED:
        clean = clean_tile(x, *operands)
    kept = no_signs(DIST, BR, BC)
    for d in range(draws):
        this_draw = (tl.cast(draw, tl.int64) + d).to(tl.uint32)
        kept = shared_signs(kept, d == 0, rows_of_noise, calls, this_draw, source, DIST, BR, BC)
        raw = raw_noise(
            rows_of_noise, calls, this_draw, source, directions, positions, tl.cast(width, tl.int32), DIST, BR, BC, kept
        )
        copy = tl.cast(d, tl.int64)
        own_x = copy * stride_x_copy
        parts = noise_parts(raw, source, DIST)
        plus, minus, reduced, reduced_log = weigh(
            reduced, reduced_log, parts, losses + copy * stride_loss_copy, mirror_loss, row_inside, grad_log_sigma,
            DIST, ANTITHETIC,
        )  # fmt: skip
        if not SHARED and grad_weight is not None:
            slope = score(noise_tile(raw, source, DIST), DIST)
            total = transposed_product(plus * slope, tl.load(x_tile + own_x, mask=x_inside, other=0), total)
            if ANTITHETIC:
                mirrored = tl.load(x_tile + own_x + mirror_x, mask=x_inside, other=0)
                total = transposed_product(-minus * slope, mirrored, total)
        if y_tile is not None:
            eps = noise_tile(raw, source, DIST)
            if not SHARED:
                clean = clean_tile(x + own_x, *operands)
            noised = tl.fma(scale[None, :], eps, clean)
            tl.store(y_tile + copy * copy_size, noised.to(y_tile.dtype.element_ty), mask=inside)
            if ANTITHETIC:
                if not SHARED:
                    clean = clean_tile(x + own_x + mirror_x, *operands)
                noised = tl.fma(-scale[None, :], eps, clean)
                tl.store(y_tile + (copy + draws) * copy_size, noised.to(y_tile.dtype.element_ty), mask=inside)
    reduced_tile = join_parts(reduced)
    if SHARED and grad_weight is not None:
        total = transposed_product(reduced_tile, tl.load(x_tile, mask=x_inside, other=0), total)
    if is_first:
        by_bias += tl.sum(reduced_tile, 0)
        if grad_log_sigma is not None:
            by_log_sigma += tl.sum(join_parts(reduced_log), 0)
    return total, by_bias, by_log_sigma


@triton.jit
def add_scalar(buffer, partials, arrival_counter, value, tile, tile_count):
    """buffer[0] += the sum of all tiles' values, which the last program to arrive adds up in the order of the tiles.

    `arrival_counter` counts the programs that have arrived, and is 0 again when the last one leaves.
    """
    tl.store(partials + tile, value)
    tl.debug_barrier()
    if tl.atomic_add(arrival_counter, 1, sem="acq_rel") == tile_count - 1:
        total = tl.load(buffer).to(tl.float32)
        for i in range(tile_count):
            total += tl.load(partials + i, cache_modifier=".cg")
        tl.store(buffer, total.to(buffer.dtype.element_ty))
        tl.store(arrival_counter, 0)


def gradient_arguments(y: Tensor | None, a: LinearGradient | ConvGradient, shared: bool) -> dict[str, Any]:
    """The buffers and loss weights of a gradient, and `y`, the output of a recompute."""
    return {
        "y": y,
        "grad_weight": a.grad_weight,
        "grad_bias": a.grad_bias,
        "grad_log_sigma": a.grad_log_sigma,
        "loss_weight": a.loss_weight,
        "draws": a.noise.draws(a.loss_weight.shape[0]),
        **strides("stride_", a.grad_bias, "grad_bias"),
        **strides("stride_", a.grad_log_sigma, "log_sigma"),
        **strides("stride_loss_", a.loss_weight, "copy", "sample"),
        "SHARED": shared,
        "ANTITHETIC": a.noise.antithetic,
    }
