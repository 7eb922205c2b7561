# mypy: disable-error-code="assignment"
"""noisy_linear_cross_entropy_: a classifier's head in one cooperative launch, its phases apart by barriers of the grid.

logits      tiles of the product, noised copy by copy; of each row its largest logit, the sum of exponentials and
            the logit that the target expects are kept, so that no logit is stored
losses      of all copies of a sample, and what each counts with the baseline
gradients   tiles of the buffers, as in noisy_linear_grad_: the noise is made again
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulr_kernels.backends._native import float_bits
from ulr_kernels.backends.ticket import ticket
from ulr_kernels.backends.triton import tiles
from ulr_kernels.backends.triton.barrier import leave, programs, run_phases, wait_for_all
from ulr_kernels.backends.triton.contract import RADEMACHER, noise_tile, number_of, open_source, raw_noise
from ulr_kernels.backends.triton.launch import Launch, cdiv, noise_arguments, strides
from ulr_kernels.backends.triton.noisy_linear import linear_arguments, product_tile
from ulr_kernels.backends.triton.noisy_linear_grad_ import gradient_tile
from ulr_kernels.ops import _losses

BARRIERS = tl.constexpr(2)
IGNORED = tl.constexpr(_losses.IGNORED)
LOSS_ROWS = tl.constexpr(64)  # samples whose losses a program weighs at a time


@triton.jit
def _keep(
    logits, inside, is_target, largest, row_inside, size, is_first, smoothing, features, SMOOTHED: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Adds a tile of a copy's logits to what is kept of its rows. `largest` are the addresses of the largest logit; the
    sum of exp(logit - largest) lies `size` further, and the target's logit again as far, of which a smoothed target
    gives a share to all alike."""
    logits = tl.where(inside, logits.to(DTYPE).to(tl.float32), float("-inf"))  # an output has x's dtype
    high = tl.max(logits, 1)
    total = tl.sum(tl.exp(logits - high[:, None]), 1)
    target = tl.sum(tl.where(is_target, logits, 0), 1)
    if SMOOTHED:
        share = number_of(smoothing)
        target = target * (1 - share) + tl.sum(tl.where(inside, logits, 0), 1) * (share / features)
    if not is_first:
        before = tl.load(largest, mask=row_inside, other=0)
        both = tl.maximum(before, high)
        total = total * tl.exp(high - both)
        total += tl.load(largest + size, mask=row_inside, other=0) * tl.exp(before - both)
        target += tl.load(largest + 2 * size, mask=row_inside, other=0)
        high = both
    tl.store(largest, high, mask=row_inside)
    tl.store(largest + size, total, mask=row_inside)
    tl.store(largest + 2 * size, target, mask=row_inside)


@triton.jit
def _loss(kept, size, splits, row_inside, wanted, features):
    """The losses of rows, from what is kept of them in each part of the features."""
    high = tl.load(kept, mask=row_inside, other=0, cache_modifier=".cg")
    total = tl.zeros_like(high)
    target = tl.zeros_like(high)
    for split in range(1, splits):
        high = tl.maximum(high, tl.load(kept + split * 3 * size, mask=row_inside, other=0, cache_modifier=".cg"))
    for split in range(splits):
        part = kept + split * 3 * size
        largest = tl.load(part, mask=row_inside, other=0, cache_modifier=".cg")
        total += tl.load(part + size, mask=row_inside, other=1, cache_modifier=".cg") * tl.exp(largest - high)
        target += tl.load(part + 2 * size, mask=row_inside, other=0, cache_modifier=".cg")
    exists = (wanted >= 0) & (wanted < features)
    return tl.where(exists, tl.log(total) + high - target, tl.where(wanted == IGNORED, 0.0, float("nan")))


@triton.jit(
    do_not_specialize=["rows", "draws", "draws_here", "splits", "draw", "row_offset", "first", "width", "smoothing"]
)
def head_kernel(
    losses,
    loss_weights,
    kept,
    tickets,
    grad_weight,
    grad_bias,
    x,
    target,
    weight,
    bias,
    sigma,
    key,
    table,
    directions,
    rows,
    features,
    inputs,
    draws,
    draws_here,
    splits,
    draw: tl.uint32,
    row_offset: tl.uint32,
    first: tl.uint32,
    shift,
    positions,
    width: tl.int64,
    stride_grad_col,
    stride_grad_input,
    stride_grad_bias,
    stride_x_copy,
    stride_x_row,
    stride_x_input,
    stride_weight_col,
    stride_weight_input,
    stride_bias,
    stride_sigma,
    stride_target,
    smoothing,
    SMOOTHED: tl.constexpr,
    MEAN: tl.constexpr,
    CLEAN: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    DIST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    GR: tl.constexpr,
    GC: tl.constexpr,
    GK: tl.constexpr,
    PHASE: tl.constexpr,
):
    PER_CALL: tl.constexpr = 128 if DIST == RADEMACHER else 4
    SIDES: tl.constexpr = 2 if ANTITHETIC else 1
    program, count = tl.program_id(0), tl.num_programs(0)
    copies = draws * SIDES
    row_count = tl.cast(rows, tl.int64)
    size = row_count * (copies + 1)  # of one number for each row of each copy, and of the clean pass

    if PHASE is None or PHASE == 0:
        source = open_source(key, table)
        scale = tl.load(sigma)
        row_tiles, col_tiles = tl.cdiv(rows, BR), tl.cdiv(features, BC)
        for item in range(program, row_tiles * splits * tl.cdiv(draws, draws_here), count):
            row_tile = item % row_tiles
            split = item // row_tiles % splits
            begin = item // (row_tiles * splits) * draws_here
            row = tl.cast(row_tile, tl.int64) * BR + tl.arange(0, BR)
            row_inside = row < rows
            wanted = tl.load(target + row * stride_target, mask=row_inside, other=-1)
            rows_of_noise = tl.cast(row_offset, tl.uint32) + row.to(tl.uint32)
            own = kept + split * 3 * size + row
            first_tile = col_tiles * split // splits
            for col_tile in range(first_tile, col_tiles * (split + 1) // splits):
                col = tl.cast(col_tile, tl.int64) * BC + tl.arange(0, BC)
                col_inside = col < features
                inside = col_inside[None, :]
                is_target = col[None, :] == wanted[:, None]
                is_first = col_tile == first_tile
                clean = product_tile(
                    x, weight, bias, row, row_inside, col, col_inside, inputs, stride_x_row, stride_x_input,
                    stride_weight_col, stride_weight_input, stride_bias, BR, BC, BK,
                )  # fmt: skip
                calls = (tl.cast(col_tile, tl.int64) * (BC // PER_CALL)).to(tl.uint32)
                if CLEAN:
                    if begin == 0:
                        at = own + copies * row_count
                        _keep(
                            clean,
                            inside,
                            is_target,
                            at,
                            row_inside,
                            size,
                            is_first,
                            smoothing,
                            features,
                            SMOOTHED,
                            x.dtype.element_ty,
                        )
                for d in range(begin, tl.minimum(begin + draws_here, draws)):
                    this_draw = (tl.cast(draw, tl.int64) + d).to(tl.uint32)
                    raw = raw_noise(rows_of_noise, calls, this_draw, source, None, 1, 1, DIST, BR, BC)
                    eps = noise_tile(raw, source, DIST)
                    at = own + d * row_count
                    noised = tl.fma(tl.broadcast_to(scale, (BR, BC)), eps, clean)
                    _keep(
                        noised,
                        inside,
                        is_target,
                        at,
                        row_inside,
                        size,
                        is_first,
                        smoothing,
                        features,
                        SMOOTHED,
                        x.dtype.element_ty,
                    )
                    if ANTITHETIC:
                        at += draws * row_count
                        noised = tl.fma(tl.broadcast_to(-scale, (BR, BC)), eps, clean)
                        _keep(
                            noised,
                            inside,
                            is_target,
                            at,
                            row_inside,
                            size,
                            is_first,
                            smoothing,
                            features,
                            SMOOTHED,
                            x.dtype.element_ty,
                        )
                tl.debug_barrier()  # another thread may add the next tile to what is kept
    if PHASE is None:
        wait_for_all(tickets)

    if PHASE is None or PHASE == 1:
        for item in range(program, tl.cdiv(rows, LOSS_ROWS), count):
            row = tl.cast(item, tl.int64) * LOSS_ROWS + tl.arange(0, LOSS_ROWS)
            row_inside = row < rows
            wanted = tl.load(target + row * stride_target, mask=row_inside, other=0)
            total = tl.zeros([LOSS_ROWS], tl.float32)
            for c in range(copies):
                loss = _loss(kept + c * row_count + row, size, splits, row_inside, wanted, features)
                tl.store(losses + c * row_count + row, loss, mask=row_inside)
                total += loss
            tl.debug_barrier()  # another thread may read a loss again
            mean = total / copies
            clean = tl.zeros([LOSS_ROWS], tl.float32)
            if CLEAN:
                clean = _loss(kept + copies * row_count + row, size, splits, row_inside, wanted, features)
            # The mean of the others, of n groups: a group's own less its distance from the mean times n / (n - 1).
            stretch = tl.cast(draws, tl.float32) / tl.maximum(draws - 1, 1)
            for d in range(draws):
                plus = tl.load(losses + d * row_count + row, mask=row_inside, other=0)
                minus = plus
                if ANTITHETIC:
                    minus = tl.load(losses + (d + draws) * row_count + row, mask=row_inside, other=0)
                baseline = clean
                if MEAN:
                    group = (plus + minus) * 0.5
                    baseline = group - (group - mean) * stretch
                by = copies * tl.cast(rows, tl.float32)
                tl.store(loss_weights + d * row_count + row, (plus - baseline) / by, mask=row_inside)
                if ANTITHETIC:
                    at = loss_weights + (d + draws) * row_count + row
                    tl.store(at, (minus - baseline) / by, mask=row_inside)
    if PHASE is None:
        wait_for_all(tickets + 1)

    if PHASE is None or PHASE == 2:
        for tile in range(program, tl.cdiv(features, GC) * tl.cdiv(inputs, GK), count):
            gradient_tile(
                tile,
                None, grad_weight, grad_bias, None, None, None, x, None, None, loss_weights, sigma, key, table,
                directions, rows, features, inputs, draws, draw, row_offset, first, shift, positions, width,
                stride_grad_col, stride_grad_input, stride_grad_bias, 0, stride_x_copy, stride_x_row, stride_x_input,
                0, 0, 0, row_count, 1, stride_sigma, True, ANTITHETIC, DIST, GR, GC, GK,
            )  # fmt: skip
    if PHASE is None:
        leave(tickets, BARRIERS)


def noisy_linear_cross_entropy_(losses: Tensor, *args) -> None:
    run_phases(head_launch(losses, *args, programs=programs(losses.device)), BARRIERS.value + 1)


def head_launch(
    losses: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    key: Tensor,
    copies: int,
    antithetic: bool,
    label_smoothing: float,
    baseline: str,
    dist: str,
    draw: int,
    row_offset: int,
    *,
    programs: int,
) -> Launch:
    rows, features = x.shape[0], weight.shape[0]
    draws = copies // 2 if antithetic else copies
    tile, gradient = tiles.HEAD[dist, x.element_size()], tiles.HEAD_GRADIENT[dist, x.element_size()]
    row_tiles = cdiv(rows, tile.rows)
    splits = max(1, min(cdiv(features, tile.cols), programs // row_tiles))
    groups = max(1, min(draws, programs // (row_tiles * splits)))  # each makes the product again
    workspace = torch.empty((3 * splits * (copies + 1) + copies) * rows, dtype=torch.float32, device=x.device)
    loss_weights, kept = workspace[: copies * rows], workspace[copies * rows :]
    return Launch(
        head_kernel,
        programs,
        {
            "losses": losses,
            "loss_weights": loss_weights,
            "kept": kept,
            "tickets": ticket(x.device, BARRIERS.value + 1),
            "grad_weight": grad_weight,
            "grad_bias": grad_bias,
            "target": target,
            **linear_arguments(x, weight, bias, sigma),
            **noise_arguments(key, dist, "iid", 1, draw, row_offset, 0, features),
            "rows": rows,
            "features": features,
            "draws": draws,
            "draws_here": cdiv(draws, groups),
            "splits": splits,
            **strides("stride_grad_", grad_weight, "col", "input"),
            **strides("stride_", grad_bias, "grad_bias"),
            **strides("stride_", target, "target"),
            "smoothing": float_bits(label_smoothing),
            "SMOOTHED": label_smoothing > 0,
            "MEAN": baseline == "mean" and draws > 1,
            "CLEAN": baseline == "clean",
            "ANTITHETIC": antithetic,
            "BR": tile.rows,
            "BC": tile.cols,
            "BK": tile.inputs,
            "GR": gradient.rows,
            "GC": gradient.cols,
            "GK": gradient.inputs,
            "PHASE": None,
        },
        tile.warps,
        tile.stages,
        cooperative=True,
    )
