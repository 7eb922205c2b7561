"""A launch: a kernel with its arguments, as a value that can be run, or compiled without a GPU."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from ulr_kernels import noise_contract, noise_tables
from ulr_kernels.backends.triton import interpreter
from ulr_kernels.backends.triton import noise_contract as tile_contract
from ulr_kernels.backends.triton.tiles import Tile
from ulr_kernels.ops._op import NoiseSpec

_DISTRIBUTION_CODES = {dist: getattr(tile_contract, dist.upper()).value for dist in noise_contract.DISTRIBUTIONS}


def noise_code(dist: str, sampler: str) -> int:
    """The constant DIST of a kernel."""
    return tile_contract.HADAMARD.value if sampler == "hadamard" else _DISTRIBUTION_CODES[dist]


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: `grid` counts programs; `arguments` name all of the kernel's parameters."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 1

    def run(self) -> None:
        tensor = next(a for a in self.arguments.values() if isinstance(a, Tensor))
        with torch.cuda.device_of(tensor):  # Triton launches on the current device's current stream
            self.kernel[(self.grid,)](
                **self.arguments,
                num_warps=self.warps,
                num_stages=self.stages,
                enable_fp_fusion=False,  # the contract says where an fma is
            )


def tiled(kernel: Any, grid: int, arguments: dict[str, Any], tile: Tile) -> Launch:
    """The launch of a kernel that takes the extents of a tile as BR, BC and, of products, BK."""
    extents = {"BR": tile.rows, "BC": tile.cols} | ({"BK": tile.inputs} if tile.inputs else {})
    return Launch(kernel, grid, arguments | extents, tile.warps, tile.stages)


def run(launch: Callable[[Tensor, Any], Launch], out: Tensor, a: Any) -> None:
    """The provider of an op that is one launch, of its output and bound arguments."""
    if out.numel():
        launch(out, a).run()


@functools.cache
def table(dist: str, device: torch.device) -> Tensor:
    """uint32: the rows of coefficients, padded to 12 words, then the bit masks of `noise_contract.open_source`."""
    rows = getattr(noise_tables, dist.upper(), noise_tables.NORMAL)
    padding = [0] * (tile_contract.ROW_WORDS.value - noise_tables.DEGREE - 1)
    words = [word for row in rows for word in (*row, *padding)]
    words += [0x7FFFFFFF, 0x007FFFFF, 0x80008000]
    return torch.tensor(words, dtype=torch.int64).to(torch.int32).view(torch.uint32).to(device)


def noise_arguments(noise: NoiseSpec, cols: int) -> dict[str, Any]:
    """A kernel's arguments for a noise of `cols` columns.

    `first` is the call of Philox that makes the first column; `shift` the columns of that call which lie before it.
    """
    columns_per_call = 128 if noise.dist == "rademacher" else 4
    key = noise.key
    return {
        "key": key,
        "table": table(noise.dist, key.device),
        "directions": noise_contract.sobol_directions(key.device) if noise.sampler == "sobol" else None,
        "draw": noise.draw,
        "row_offset": noise.row_offset,
        "first": noise.col_offset // columns_per_call,
        "shift": noise.col_offset % columns_per_call,
        "positions": min(noise.positions, noise_contract.ALL_ROWS),
        "width": noise.width or noise.col_offset + cols,
        "DIST": noise_code(noise.dist, noise.sampler),
    }


def strides(prefix: str, tensor: Tensor | None, *axes: str) -> dict[str, int]:
    """Arguments `<prefix><axis>`; 0 where the tensor is absent or one value stands for the whole axis."""
    return {
        f"{prefix}{axis}": tensor.stride(i) if tensor is not None and tensor.dim() else 0 for i, axis in enumerate(axes)
    }


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


if triton.knobs.runtime.interpret:
    interpreter.compute_as_a_gpu_does()
