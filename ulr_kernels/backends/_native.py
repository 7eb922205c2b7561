"""The two native libraries: opening them, why one is absent, and calls of their launchers with torch's tensors."""

from __future__ import annotations

import ctypes
import functools
import importlib
import struct
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ulr_kernels import noise_contract
from ulr_kernels.backends import _abi
from ulr_kernels.backends._abi import TensorView
from ulr_kernels.ops._op import OPS, NoiseSpec

SHARED = ".dylib" if sys.platform == "darwin" else ".so"  # how the name of a library ends
FILES = {"cpp": f"libulr_cpu{SHARED}", "cuda": f"libulr_cuda{SHARED}"}
PREFIXES = {"cpp": "ulr_cpu_", "cuda": "ulr_cuda_"}
ERRORS = {1: "an argument that the kernel does not take", 2: "out of memory", 3: "the launch failed"}

# The numbers of csrc/include/ulr/api.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int64: 3, torch.uint8: 4, torch.bool: 4}
DISTRIBUTIONS = {"normal": 0, "laplace": 1, "rademacher": 2}


class Arguments(NamedTuple):
    """Arguments of a launcher: the noise, the tensors and the op's own integers, in the order of the enums beside it.

    They hold the tensors, not just their addresses: some are made for the launch.
    """

    noise: tuple | None
    tensors: tuple[Tensor | None, ...]
    numbers: tuple[int, ...] = ()

    def views(self) -> tuple[TensorView | None, ...]:
        return views(self.tensors)


def _import_build_info() -> ModuleType | None:
    try:
        return importlib.import_module("ulr_kernels._build_info")
    except ImportError:
        return None


_build_info = _import_build_info()


@functools.cache
def library(part: str) -> ctypes.CDLL | str:
    """The library of "cpp" or "cuda", or the sentence that says why it is absent."""
    if _build_info is None:
        return "the native libraries have not been built (pip install . builds them)"
    if part in _build_info.ABSENT:
        return _build_info.ABSENT[part]
    return _abi.open_library(_abi.PACKAGE / FILES[part])


def error(part: str, code: int) -> str:
    """The meaning of an error code; the cuda library describes its last failure."""
    text = getattr(library(part), PREFIXES[part] + "error", None)
    if text is None:
        return ERRORS[code]
    text.restype = ctypes.c_char_p
    return text(code).decode()


@functools.cache
def launcher(part: str, name: str) -> Callable[..., None]:
    """One launcher of a library; it raises RuntimeError with the library's reason if it fails."""
    opened = library(part)
    if isinstance(opened, str):
        raise RuntimeError(opened)
    address = ctypes.cast(getattr(opened, PREFIXES[part] + name), ctypes.c_void_p).value
    launch_at = functools.partial(_abi.launch, address or 0)

    def launch(
        noise: tuple | None,
        tensors: tuple[TensorView | None, ...],
        numbers: tuple[int, ...] = (),
        *,
        threads: int = 1,
        device: int = 0,
        stream: int = 0,
    ) -> None:
        if code := launch_at(noise, tensors, numbers, threads, device, stream):
            raise RuntimeError(f"{name}: {error(part, code)}")

    return launch


def view(tensor: Tensor) -> TensorView:
    """Address, dtype, sizes and strides of a tensor of up to five axes, as a launcher reads them."""
    return tensor.data_ptr(), DTYPES[tensor.dtype], tensor.shape, tensor.stride()


def views(tensors: Sequence[Tensor | None]) -> tuple[TensorView | None, ...]:
    return tuple(None if t is None else view(t) for t in tensors)


def launch_cpu(name: str, noise: tuple | None, tensors: Sequence[Tensor | None], numbers: tuple[int, ...] = ()) -> None:
    """Run a launcher of the cpp library, in as many threads as torch has."""
    launcher("cpp", name)(noise, views(tensors), numbers, threads=torch.get_num_threads())


def by_op(*modules: ModuleType) -> dict[str, Callable]:
    """The functions of modules that have an op's name."""
    return {op: getattr(module, op) for module in modules for op in OPS if hasattr(module, op)}


def float_bits(value: float) -> int:
    """The bits of the fp32 number nearest to `value`: launchers take integers only."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def noise_view(noise: NoiseSpec, cols: int = 0, draw: int = 0, row: int = 0, col: int = 0) -> tuple:
    """The choice of noise, as a launcher reads it.

    Args:
        noise: of the whole call.
        cols: of the whole call.
        draw, row, col: where in the call the launch starts.
    """
    key, antithetic, dist, sampler, positions, first_draw, row_offset, col_offset, width = noise
    directions = noise_contract.sobol_directions(key.device).data_ptr() if sampler == "sobol" else 0
    which = (key.data_ptr(), directions, DISTRIBUTIONS[dist], antithetic)
    offsets = (first_draw + draw, row_offset + row, col_offset + col)
    return (*which, *offsets, positions, width or col_offset + cols, sampler == "hadamard")
