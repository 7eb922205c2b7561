# mypy: disable-error-code="assignment"
"""Tensors of any rank as tiles of their rows and columns: [copies, a, columns, b, c], whose rows are (a, b, c)."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ulr_kernels.backends.triton.launch import strides


@triton.jit
def row_offsets(row, b_size, c_size, stride_a, stride_b, stride_c):
    """The int64 offsets of rows (a, b, c) of a tensor [copies, a, columns, b, c]."""
    row = row.to(tl.uint32)
    c = row % tl.cast(c_size, tl.uint32)
    rest = row // tl.cast(c_size, tl.uint32)
    a = rest // tl.cast(b_size, tl.uint32)
    b = rest % tl.cast(b_size, tl.uint32)
    return a.to(tl.int64) * stride_a + b.to(tl.int64) * stride_b + c.to(tl.int64) * stride_c


def grid_arguments(prefix: str, grid: Tensor) -> dict[str, Any]:
    """Sizes and strides of a tensor [copies, a, columns, b, c]."""
    return {
        "b_size": grid.shape[3],
        "c_size": grid.shape[4],
        **strides(f"stride_{prefix}_", grid, "copy", "a", "col", "b", "c"),
    }
