# mypy: disable-error-code="assignment"
"""perturb_ and combine_: a table of the list's tensors in device memory, and programs that each take a tile of one.

A launch takes the tensors of one dtype and form: matrices in tiles of several rows, vectors in rows. Tensors whose
columns are not contiguous have launches of their own, because their addresses take divisions; so has low rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulr_kernels import noise_contract
from ulr_kernels.backends._native import float_bits
from ulr_kernels.backends.triton import tiles
from ulr_kernels.backends.triton.device_tables import on_device
from ulr_kernels.backends.triton.launch import Launch, cdiv, noise_code, run, table, tiled
from ulr_kernels.backends.triton.noise import fold_in_launch
from ulr_kernels.backends.triton.noise_contract import (
    HADAMARD,
    RADEMACHER,
    _words,
    join_parts,
    noise_tile,
    number_of,
    open_source,
    raw_noise,
    slots,
)
from ulr_kernels.backends.triton.weight_noise import low_rank_noise
from ulr_kernels.ops._parameters import COLUMN_AXES, ListNoise, by_row
from ulr_kernels.ops.combine_ import Combine
from ulr_kernels.ops.noise import FoldIn
from ulr_kernels.ops.perturb_ import Perturb

NO_STATE, MOMENTUM, ADAM = (tl.constexpr(i) for i in range(3))
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# A row of the table: the tensor's place; then, for the tensor and each state, the data, the strides and the sizes.
PLACE = tl.constexpr(7)  # key, first program, rows, columns, row and column offset, columns of the whole
VIEW = tl.constexpr(1 + 5 + 3)
ROW = tl.constexpr(7 + 3 * 9)


@triton.jit
def _column_offsets(view, col, PLAIN: tl.constexpr):
    if PLAIN:
        return col
    else:
        d, c, b = tl.load(view + 8), tl.load(view + 7), tl.load(view + 6)
        at = (col % d) * tl.load(view + 5) + (col // d % c) * tl.load(view + 4)
        return at + (col // (d * c) % b) * tl.load(view + 3) + (col // (d * c * b)) * tl.load(view + 2)


@triton.jit
def _elements(view, row, col, PLAIN: tl.constexpr, DTYPE: tl.constexpr):
    """Pointers to the elements of a tile."""
    base = tl.load(view).to(tl.pointer_type(DTYPE))
    return base + (row * tl.load(view + 1))[:, None] + _column_offsets(view, col, PLAIN)[None, :]


@triton.jit
def _noise(
    rows, first, draw, width, keys, key, count, table, rank, rank_scale, DIST: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """fp32 [BR, BC]: of full rank where `rank` is None."""
    if rank is None:
        source = open_source(keys + key, table)
        return noise_tile(raw_noise(rows, first, draw, source, None, None, width, DIST, BR, BC), source, DIST)
    else:
        by_row, by_col = open_source(keys + count + key, table), open_source(keys + 2 * count + key, table)
        col = first.to(tl.int64) * (128 if DIST >= RADEMACHER else 4)
        return low_rank_noise(rows, col, draw, by_row, by_col, rank, rank_scale, DIST, BR, BC)


@triton.jit
def _rounded(value, rows, first, draw, source, BR: tl.constexpr, BC: tl.constexpr):
    """Round fp32 to bf16 values, away from zero with the probability of the cut-off part; infinities and NaN stay."""
    words = join_parts(_words(rows, first, draw, source, BR, BC // 4))
    word = value.to(tl.uint32, bitcast=True)
    moved = (word + (words >> 16)) & 0xFFFF0000
    return tl.where((word & 0x7FFFFFFF) < 0x7F800000, moved, word).to(tl.float32, bitcast=True)


@triton.jit
def _power(base, exponent):
    result = base * 0.0 + 1.0
    for bit in tl.static_range(31):
        result = tl.where(((exponent >> bit) & 1) == 1, result * base, result)
        base = base * base
    return result


@triton.jit
def _all(value, tile):
    """One number in the form of a tile; the sign of a zero is kept."""
    return tl.where(tl.zeros_like(tile) == 0.0, value, 0.0)


NUMBERS = ("weight_decay", "momentum", "beta1", "beta2", "epsilon", "rank_scale")  # as the bits of fp32


@triton.jit(do_not_specialize=["draw", "count", "probes", *NUMBERS])
def parameters_kernel(
    entries,
    owners,
    keys,
    table,
    amounts,
    stride_amount,
    probes,
    lr,
    step,
    weight_decay: tl.uint32,
    momentum: tl.uint32,
    beta1: tl.uint32,
    beta2: tl.uint32,
    epsilon: tl.uint32,
    rank_scale: tl.uint32,
    count,
    draw: tl.uint32,
    rank,
    COMBINE: tl.constexpr,
    RULE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    PLAIN: tl.constexpr,
    DTYPE: tl.constexpr,
    DIST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    PER_CALL: tl.constexpr = 128 if DIST >= RADEMACHER else 4
    program = tl.program_id(0)
    entry = entries + tl.load(owners + program).to(tl.int64) * ROW
    key = tl.load(entry)
    tile = program - tl.load(entry + 1)
    n_rows, n_cols = tl.load(entry + 2), tl.load(entry + 3)
    row_offset, col_offset, width = tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6)
    shift = col_offset % PER_CALL
    across = tl.cdiv(n_cols + shift, BC)
    row = (tile // across) * BR + tl.arange(0, BR)
    col = (tile % across) * BC - shift + tl.arange(0, BC)
    inside = (row < n_rows)[:, None] & ((col >= 0) & (col < n_cols))[None, :]
    rows = (row_offset + row).to(tl.uint32)
    first = (col_offset // PER_CALL + (tile % across) * (BC // PER_CALL)).to(tl.uint32)
    draw = tl.cast(draw, tl.uint32)
    rank_scale = number_of(rank_scale)

    view = entry + PLACE
    elements = _elements(view, row, col, PLAIN, DTYPE)
    old = tl.load(elements, mask=inside, other=0).to(tl.float32)
    if COMBINE:
        total = tl.zeros([BR, BC], tl.float32)
        if DIST == HADAMARD:  # blocks of draws, and the transforms of their coefficients
            within = tl.cast(stride_amount, tl.uint32) - 1
            slot = slots(rows[:, None], (col_offset + col).to(tl.uint32)[None, :], None, width) & within
            for block in range(probes):
                this_draw = (draw & ~within) + tl.cast(block * stride_amount, tl.uint32)
                eps = _noise(rows, first, this_draw, width, keys, key, count, table, rank, rank_scale, DIST, BR, BC)
                total += eps * tl.load(amounts + block * stride_amount + slot)
        else:
            for p in range(probes):
                eps = _noise(rows, first, draw + p, width, keys, key, count, table, rank, rank_scale, DIST, BR, BC)
                total = tl.fma(_all(tl.load(amounts + p * stride_amount), eps), eps, total)
        if lr is None:
            down = number_of(weight_decay) * -0.0
        else:
            down = tl.load(lr) * -1.0  # a minus sign would be a subtraction from 0, which turns 0 into 0, not into -0
        new = tl.fma(_all(down * number_of(weight_decay), old), old, old)
        if RULE == NO_STATE:
            new += total
        else:
            state = _elements(view + VIEW, row, col, PLAIN, tl.float32)
            mean = tl.load(state, mask=inside, other=0)
            if RULE == MOMENTUM:
                mean = tl.fma(_all(number_of(momentum), old), mean, total)
                new = tl.fma(_all(down, old), mean, new)
            else:
                number, beta1, beta2 = tl.load(step), number_of(beta1), number_of(beta2)
                down = tl.div_rn(down, 1.0 - _power(beta1, number))
                root = tl.sqrt_rn(1.0 - _power(beta2, number))
                other = _elements(view + 2 * VIEW, row, col, PLAIN, tl.float32)
                square = tl.load(other, mask=inside, other=0)
                mean = tl.fma(_all(beta1, old), mean, (1.0 - beta1) * total)
                square = tl.fma(_all(beta2, old), square, ((1.0 - beta2) * total) * total)
                below = tl.div_rn(tl.sqrt_rn(square), _all(root, old)) + number_of(epsilon)
                new = tl.fma(_all(down, old), tl.div_rn(mean, below), new)
                tl.store(other, square, mask=inside)
            tl.store(state, mean, mask=inside)
    else:
        eps = _noise(rows, first, draw, width, keys, key, count, table, rank, rank_scale, DIST, BR, BC)
        new = tl.fma(_all(tl.load(amounts), old), eps, old)
    if STOCHASTIC:
        new = _rounded(new, rows, first * (PER_CALL // 4), draw, open_source(keys + 3 * count + key, table), BR, BC)
    tl.store(elements, new.to(DTYPE), mask=inside)


class Form(NamedTuple):
    """The properties that the tensors of one launch have in common."""

    dtype: torch.dtype
    plain: bool
    vector: bool
    low_rank: bool


def _form(views: Sequence[Tensor], low_rank: bool) -> Form:
    plain = all(v.shape[1:-1].numel() == 1 and (v.shape[-1] == 1 or v.stride(-1) == 1) for v in views)
    return Form(views[0].dtype, plain, views[0].shape[0] == 1, low_rank)


def _tile(form: Form, dist: str) -> tiles.Tile:
    tile = tiles.PARAMETERS[dist]
    return tile._replace(rows=1, cols=tile.rows * tile.cols) if form.vector else tile


class Rule(NamedTuple):
    """An optimiser's rate, step and numbers: weight decay, momentum, both betas, epsilon."""

    lr: Tensor | None = None
    step: Tensor | None = None
    numbers: tuple[float, ...] = (0.0,) * 5


def launches(
    tensors: list[Tensor], states: list[list[Tensor]], amounts: Tensor, rule: Rule, noise: ListNoise
) -> Iterator[Launch]:
    """A launch for each form of tensor in the list.

    `amounts`: the scale, or the coefficients of the probes, or of orthogonal ones the `walsh_sums`; `noise`: with the
    keys of all its streams.
    """
    keys = noise.keys
    scale = 1.0 if noise.rank is None else noise_contract.low_rank_scale(noise.rank)
    groups: dict[Form, list[tuple[int, list[Tensor]]]] = {}
    for i, parts in enumerate(zip(tensors, *states, strict=True)):
        if parts[0].numel():
            views = by_row(*parts)
            form = _form(views, noise.rank is not None and parts[0].dim() > 1)
            groups.setdefault(form, []).append((i, views))
    for form, members in groups.items():
        tile = _tile(form, noise.dist)
        entries: list[tuple[int, ...]] = []
        programs: list[int] = []
        for i, views in members:
            rows, cols = views[0].shape[0], views[0].shape[1:].numel()
            at = noise.offsets(i)
            shift = at[1] % (128 if noise.dist == "rademacher" else 4)
            entry: list[int] = [i, sum(programs), rows, cols, *at, noise.width_of(i, cols)]
            for view in views:
                entry += [view.data_ptr(), *view.stride(), *view.shape[-COLUMN_AXES + 1 :]]
            entries.append((*entry, *[0] * (ROW.value - len(entry))))
            programs.append(cdiv(rows, tile.rows) * cdiv(cols + shift, tile.cols))
        table_of_entries, owners = on_device(tuple(entries), tuple(programs), keys.device)
        yield tiled(
            parameters_kernel,
            sum(programs),
            {
                "entries": table_of_entries,
                "owners": owners,
                "keys": keys,
                "table": table(noise.dist, keys.device),
                "amounts": amounts,
                "stride_amount": amounts.stride(0) if amounts.dim() else 0,
                "probes": amounts.shape[0] if amounts.dim() else 1,
                "lr": rule.lr,
                "step": rule.step,
                **dict(zip(NUMBERS, map(float_bits, (*rule.numbers, scale)), strict=True)),
                "count": len(tensors),
                "draw": noise.draw,
                "rank": noise.rank if form.low_rank else None,
                "COMBINE": amounts.dim() > 0,
                "RULE": min(len(states), 2),
                "STOCHASTIC": noise.stochastic and form.dtype == torch.bfloat16,
                "PLAIN": form.plain,
                "DTYPE": _DTYPES[form.dtype],
                "DIST": noise_code(noise.dist, noise.sampler),
            },
            tile,
        )


def with_streams(noise: ListNoise) -> ListNoise:
    """The noise with its keys followed, where needed, by the keys of the low-rank factors and of rounding."""
    keys = noise.keys.contiguous()
    if noise.rank is None and not noise.stochastic:
        return noise._replace(keys=keys)
    numbers = torch.arange(1, 4, device=keys.device)[:, None]  # LOW_RANK_STREAMS and ROUNDING_STREAM of the contract
    derived = torch.empty(3, keys.shape[0], dtype=torch.int64, device=keys.device)
    run(fold_in_launch, derived, FoldIn(*torch.broadcast_tensors(keys[None, :], numbers)))
    return noise._replace(keys=torch.cat([keys, derived.flatten()]))


def walsh_sums(coefficients: Tensor, draw: int) -> Tensor:
    """fp32 `[blocks, M]`: the transforms of the coefficients of each block of orthogonal draws, on their device."""
    probes = coefficients.shape[0]
    blocks = list(noise_contract.hadamard_blocks(draw, probes))
    if not blocks:
        return coefficients.view(0, 1)
    first, size, _ = blocks[0]
    padded = coefficients.new_zeros(len(blocks) * size)
    padded[draw - first :][:probes] = coefficients
    return noise_contract.walsh_hadamard(padded.view(-1, size))


def perturb_(a: Perturb) -> None:
    for launch in launches(a.tensors, [], a.scale, Rule(), with_streams(a.noise)):
        launch.run()


def combine_(a: Combine) -> None:
    rule = Rule(a.lr, a.step, (a.weight_decay, a.momentum, a.beta1, a.beta2, a.epsilon))
    orthogonal = a.noise.sampler == "hadamard"
    amounts = walsh_sums(a.coefficients, a.noise.draw) if orthogonal else a.coefficients
    for launch in launches(a.tensors, a.states, amounts, rule, with_streams(a.noise)):
        launch.run()
