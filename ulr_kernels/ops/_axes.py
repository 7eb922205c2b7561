"""Tensors of any rank as the contract's rows and columns: one axis counts columns, the others, flattened, rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ulr_kernels.ops._op import Check

ROW_AXES = 3  # the most that a launcher takes: with copies and columns the five axes of csrc/include/ulr/api.h


class Axes(NamedTuple):
    """Rows R, columns N, and the axis of one copy that counts columns."""

    rows: int
    cols: int
    axis: int


def axes_of(check: Check, argument: str, shape: Sequence[int], feature_dim: int) -> Axes:
    """Rows, columns and axis of one copy's shape; raises if it has no such axis."""
    if not len(shape):
        check.fail(argument, "have at least one axis", list(shape))
    if not -len(shape) <= feature_dim < len(shape):
        check.fail("feature_dim", f"be an axis of a copy's {list(shape)}", feature_dim)
    axis = feature_dim % len(shape)
    return Axes(math.prod((*shape[:axis], *shape[axis + 1 :])), shape[axis], axis)


def one_copy(x: Tensor, shared: bool) -> Sequence[int]:
    return x.shape if shared else x.shape[1:]


def matrix(tensor: Tensor, axis: int) -> Tensor:
    """`[R, N]` of one copy: a view where strides allow it."""
    last = tensor.movedim(axis, -1)
    return last.flatten(0, -2) if last.dim() > 1 else last[None]


def images(axis: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors `[C, *shape of a copy]` (each with C of its own) as views `[C, a, N, b, c]`, whose rows are (a, b, c).

    Neighbouring axes of rows become one wherever the strides of all the tensors allow it. If more than three are left,
    the tensors are copied; neither a dense memory format nor a slice of one leaves so many.
    """
    moved = [t.movedim(axis + 1, 1) for t in tensors]  # [C, N, rows ...]
    first = moved[0]
    sizes: list[int] = []
    strides: list[list[int]] = []  # by kept axis, then by tensor
    for i in range(first.dim() - 1, 1, -1):
        if first.shape[i] == 1:
            continue
        here = [t.stride(i) for t in moved]
        if sizes and all(outer == sizes[0] * inner for outer, inner in zip(here, strides[0], strict=True)):
            sizes[0] *= first.shape[i]
        else:
            sizes.insert(0, first.shape[i])
            strides.insert(0, here)
    if len(sizes) > ROW_AXES:
        return images(axis, *(t.contiguous() for t in tensors))
    padding = ROW_AXES - len(sizes)
    sizes = [1] * padding + sizes
    strides = [[0] * len(tensors)] * padding + strides
    views = []
    for number, t in enumerate(moved):
        a, b, c = (s[number] for s in strides)
        views.append(t.as_strided((t.shape[0], sizes[0], t.shape[1], *sizes[1:]), (t.stride(0), a, t.stride(1), b, c)))
    return tuple(views)
