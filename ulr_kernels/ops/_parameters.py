"""Ops on lists of parameters: their rules, a parameter's rows and columns, and its noise in torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ulr_kernels import noise_contract
from ulr_kernels.ops._op import COL_BITS, DRAW_BITS, FLOATS, ROW_BITS, Check, key_tensor

LIST_SCHEMA = (
    'str dist="normal", int? rank=None, bool stochastic=False, int draw=0, int[] row_offset=[], int[] col_offset=[], '
    'str sampler="iid", int[] width=[]'
)


class ListNoise(NamedTuple):
    """The noise of each tensor of a list: its keys and LIST_SCHEMA. A list of offsets or widths may be empty: all 0."""

    keys: Tensor
    dist: str
    rank: int | None
    stochastic: bool
    draw: int
    row_offset: list[int]
    col_offset: list[int]
    sampler: str = "iid"
    width: list[int] = []  # noqa: RUF012  the schema's default

    def offsets(self, i: int) -> tuple[int, int]:
        """The row and the column at which tensor i starts in the whole parameter."""
        return self.row_offset[i] if self.row_offset else 0, self.col_offset[i] if self.col_offset else 0

    def width_of(self, i: int, cols: int) -> int:
        """The columns of the whole parameter, where tensor i has `cols`."""
        return (self.width[i] if self.width else 0) or self.offsets(i)[1] + cols


COLUMN_AXES = 4  # axes after the rows of a parameter, for launchers
_BLOCK = 2**20  # elements that the reference works on at once: it holds about twenty temporaries for each


def keys_tensor(op: str, keys: Tensor | Sequence[int | Tensor], device: torch.device) -> Tensor:
    """One int64 key for each tensor; integers are copied to the device."""
    if isinstance(keys, Tensor):
        return keys
    host = [key_tensor(op, key, torch.device("cpu")) for key in keys]
    return (torch.stack(host) if host else torch.empty(0, dtype=torch.int64)).to(device)


def rows_cols(tensor: Tensor) -> tuple[int, int]:
    """Rows and columns: `shape[0]` and the rest flattened; a vector is one row, a scalar 1 x 1."""
    return (1, tensor.numel()) if tensor.dim() < 2 else (tensor.shape[0], math.prod(tensor.shape[1:]))


def column_axes(*tensors: Tensor) -> list[tuple[int, tuple[int, ...]]]:
    """The axes of a row, for tensors of one shape: the size of each axis, and its stride in each tensor.

    Axes are joined where all of the tensors can step through them by one stride.
    """
    joined: list[tuple[int, tuple[int, ...]]] = []
    shape = tensors[0].shape
    for axis in range(1 if len(shape) > 1 else 0, len(shape)):
        size, strides = shape[axis], tuple(tensor.stride(axis) for tensor in tensors)
        if size == 1:
            continue
        if joined and joined[-1][1] == tuple(size * stride for stride in strides):
            joined[-1] = (joined[-1][0] * size, strides)
        else:
            joined.append((size, strides))
    return joined


def by_row(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape as [rows, a, b, c, columns], for launchers; a, b and c are 1 except for unusual strides."""
    rows, cols = rows_cols(tensors[0])
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(rows, 1, 1, 1, cols) for tensor in tensors]
    axes = column_axes(*tensors) or [(cols, (1,) * len(tensors))]
    axes = [(1, (0,) * len(tensors))] * (COLUMN_AXES - len(axes)) + axes
    sizes = (rows, *(size for size, _ in axes))
    return [
        tensor.as_strided(sizes, (tensor.stride(0) if tensor.dim() > 1 else 0, *(strides[i] for _, strides in axes)))
        for i, tensor in enumerate(tensors)
    ]


# --- checks ----------------------------------------------------------------------------------------------------------


def check_list(rules: Check, tensors: list[Tensor], noise: ListNoise, draws: int) -> None:
    """The rules that all ops on lists have in common."""
    keys, dist, rank, stochastic, draw, row_offset, col_offset, sampler, width = noise
    count = len(tensors)
    rules.dtype("keys", keys, (torch.int64,))
    rules.shape("keys", keys, (count,), f"{count} tensors")
    rules.dist(dist)
    check_sampler(rules, sampler, dist, rank)
    if rank is not None and rank < 1:
        rules.fail("rank", "be at least 1, or None", rank)
    rules.room("draw", draw, draws, DRAW_BITS)
    for argument, offsets in (("row_offset", row_offset), ("col_offset", col_offset), ("width", width)):
        if len(offsets) not in (0, count):
            rules.fail(argument, f"have one number for each of {count} tensors, or none", f"{len(offsets)}")
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in FLOATS:
            rules.dtype(f"tensors[{i}]", tensor, FLOATS)
        if stochastic and tensor.dtype == torch.float16:
            rules.fail(f"tensors[{i}]", "be float32 or bfloat16 where stochastic is set", tensor.dtype)
        if tensor.device != keys.device:
            rules.fail("keys", f"be on {tensor.device} like 'tensors[{i}]'", keys.device)
        rows, cols = rows_cols(tensor)
        rules.room(f"row_offset[{i}]", row_offset[i] if row_offset else 0, rows, ROW_BITS)
        rules.room(f"col_offset[{i}]", col_offset[i] if col_offset else 0, cols, COL_BITS)
        whole = width[i] if width else 0
        rules.width(f"width[{i}]", whole, noise.offsets(i)[1], cols, sampler == "hadamard" and tensor.dim() > 1)
        check_strides(rules, f"tensors[{i}]", tensor)


def check_sampler(rules: Check, sampler: str, dist: str, rank: int | None) -> None:
    """The rules of the sampler of a parameter's noise."""
    if sampler == "sobol":
        rules.fail("sampler", "be 'iid' or 'hadamard' for noise on parameters", "'sobol'")
    rules.sampler(sampler, dist)
    if sampler == "hadamard" and rank is not None:
        rules.fail("rank", "be None where sampler is 'hadamard': products of its factors are not orthogonal", rank)


def check_strides(rules: Check, argument: str, *tensors: Tensor) -> None:
    """Check the strides of tensors of one shape, which kernels step through together."""
    if tensors[0].dim() > COLUMN_AXES + 1 and len(column_axes(*tensors)) > COLUMN_AXES:
        rule = f"have at most {COLUMN_AXES} axes after the first that strides do not join"
        rules.fail(argument, rule, " and ".join(str(tensor.stride()) for tensor in tensors))


# --- reference -------------------------------------------------------------------------------------------------------


class Block:
    """Some rows and columns of one parameter of a list: their elements, and their noise.

    `values(t)` are the block's elements of a tensor `[rows, cols]`, a view.
    """

    def __init__(
        self, rows: slice, cols: slice, key: Tensor, offsets: tuple[int, int], width: int, matrix: bool
    ) -> None:
        self.rows, self.cols, self.key, self.width, self.matrix = rows, cols, key, width, matrix
        row, col = (torch.arange(part.start, part.stop, device=key.device) for part in (rows, cols))
        self.row, self.col = row + offsets[0], col + offsets[1]  # in the whole parameter

    def values(self, flat: Tensor) -> Tensor:
        return flat[self.rows, self.cols]

    def noise(self, which: ListNoise, draw: int) -> Tensor:
        """fp32 `[rows, cols]`; a parameter of fewer than two axes has noise of full rank."""
        rank = which.rank if self.matrix else None
        return noise_contract.parameter_noise(
            self.row, self.col, rank, draw, self.key, dist=which.dist, sampler=which.sampler, width=self.width
        )

    def noise_sum(self, which: ListNoise, coefficients: Tensor) -> Tensor:
        """fp32 `[rows, cols]`: the sum of coefficients[p] * eps(draw + p), in the contract's order."""
        total = torch.zeros(len(self.row), len(self.col), device=self.key.device)
        if which.sampler != "hadamard":
            for p, coefficient in enumerate(coefficients):
                total = noise_contract.fma(coefficient, self.noise(which, which.draw + p), total)
            return total
        slots = noise_contract.hadamard_slots(self.row[:, None], self.col[None], noise_contract.ALL_ROWS, self.width)
        for first, size, held in noise_contract.hadamard_blocks(which.draw, len(coefficients)):
            weights = coefficients.new_zeros(size)
            weights[which.draw + held.start - first :][: held.stop - held.start] = coefficients[held]
            sums = noise_contract.walsh_hadamard(weights)[slots % size]
            total = total + self.noise(which, first) * sums
        return total

    def store(self, flat: Tensor, new: Tensor, which: ListNoise) -> None:
        """Round fp32 `new` to the dtype of the tensor and write it."""
        if which.stochastic and flat.dtype == torch.bfloat16:
            new = noise_contract.round_stochastically(new, self.row, self.col, which.draw, self.key)
        self.values(flat).copy_(new)


def blocks(tensor: Tensor, i: int, noise: ListNoise) -> Iterator[Block]:
    """The blocks of tensor i of a list."""
    rows, cols = rows_cols(tensor)
    width = max(1, min(cols, _BLOCK))
    height = _BLOCK // width
    for row in range(0, rows, height):
        for col in range(0, cols, width):
            extent = slice(row, min(rows, row + height)), slice(col, min(cols, col + width))
            yield Block(*extent, noise.keys[i], noise.offsets(i), noise.width_of(i, cols), tensor.dim() > 1)


def flat_view(tensor: Tensor) -> Tensor:
    """`[rows, cols]`: a view, or a copy where strides allow none (`write_back` returns it)."""
    return tensor.reshape(rows_cols(tensor))


def write_back(tensor: Tensor, flat: Tensor) -> None:
    if flat.data_ptr() != tensor.data_ptr():
        tensor.copy_(flat.view(tensor.shape))


def noise_values(tensors: Sequence[Tensor], rank: int | None) -> int:
    """The number of noise values of one draw."""
    return sum(t.numel() if rank is None or t.dim() < 2 else rank * sum(rows_cols(t)) for t in tensors)
