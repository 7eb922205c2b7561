"""The C ABI of the native libraries (csrc/include/ulr/api.h): opening a library, and calling a launcher by its address.

The pybind11 module `_C` makes the calls in the Python that it was built for. In every other Python ctypes makes them:
the same arguments and results, for more time a call (docs/install.md). This file needs no torch.
"""

from __future__ import annotations

import array
import ctypes
import functools
import importlib
import importlib.machinery
import os
import pathlib
import struct
import sys
from types import ModuleType

from ulr_kernels._version import __version__

PACKAGE = pathlib.Path(__file__).parents[1]
ABI_VERSION = 3  # ULR_ABI_VERSION: of the layouts below

TensorView = tuple[int, int, tuple[int, ...], tuple[int, ...]]  # address, dtype, sizes, strides

_TENSOR = struct.Struct("@Pi10q")  # ulr_tensor: address, dtype, five sizes, five strides
_NOISE = struct.Struct("@PPii5qi0q")  # ulr_noise_spec: its fields in their order
_LAUNCH = struct.Struct("@iiPiP")  # ulr_launch: threads, device, stream, number of tensors, address of the numbers
_SEGMENT = struct.Struct("<8xQ16xQ16x")  # of an ELF file's table: where a segment is in the file, and its length there
_ABSENT = _TENSOR.pack(0, 0, *(1,) * 5, *(0,) * 5)
_launcher_at = functools.cache(ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p))


def open_library(path: pathlib.Path) -> ctypes.CDLL | str:
    """A native library, or the sentence that says why it cannot be used."""
    try:
        if _is_cut_short(path):
            return f"{path.name} is damaged: it has {path.stat().st_size} bytes and needs more"
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} cannot be loaded: {error}"
    version, abi_version = _versions(library)
    if (version, abi_version) != (__version__, ABI_VERSION):
        return (
            f"{path.name} belongs to another version of ulr_kernels:"
            f" {version} (ABI {abi_version}), this package is {__version__} (ABI {ABI_VERSION})"
        )
    return library


def _versions(library: ctypes.CDLL) -> tuple[str, int | None]:
    """The versions of the package and of the ABI that a library was built for."""
    try:
        library.ulr_version.restype = ctypes.c_char_p
        return library.ulr_version().decode(), library.ulr_abi_version()
    except AttributeError:
        return "unknown", None


def _is_cut_short(path: pathlib.Path) -> bool:
    """Whether an ELF file lacks bytes of its segments. The loader takes such a file, and the process dies of SIGBUS."""
    with path.open("rb") as file:
        head = file.read(64)
        if head[:6] != b"\x7fELF\x02\x01":
            return False  # the loader reads as much of any other file, and refuses it
        if len(head) < 64:
            return True
        (segments_at,), (count,) = struct.unpack_from("<Q", head, 32), struct.unpack_from("<H", head, 56)
        file.seek(segments_at)
        segments = file.read(count * _SEGMENT.size)
        if len(segments) < count * _SEGMENT.size:
            return True
        ends = [offset + length for offset, length in _SEGMENT.iter_unpack(segments)]
        return max(ends, default=0) > os.fstat(file.fileno()).st_size


def _import_shim() -> ModuleType | str:
    """The module `_C`, or the sentence that says why ctypes makes the calls."""
    found = importlib.machinery.PathFinder.find_spec("ulr_kernels._C", [str(PACKAGE)])
    if found is None or found.origin is None:
        return f"_C was not built for this Python ({sys.implementation.cache_tag})"
    try:
        if _is_cut_short(pathlib.Path(found.origin)):
            return "_C is damaged: its file is cut short"
        shim = importlib.import_module("ulr_kernels._C")
    except (ImportError, OSError) as error:
        return f"_C cannot be imported: {error}"
    return shim if getattr(shim, "ABI_VERSION", None) == ABI_VERSION else "_C belongs to another version of ulr_kernels"


def launch_by_ctypes(
    address: int,
    noise: tuple | None,
    tensors: tuple[TensorView | None, ...],
    numbers: tuple[int, ...] = (),
    threads: int = 1,
    device: int = 0,
    stream: int = 0,
) -> int:
    """Call the launcher at an address, without the GIL.

    Args:
        address: of a launcher of either library.
        noise: the fields of ulr_noise_spec, or None.
        tensors: views of up to five axes; None for an argument that is absent.
        numbers: the op's own integers.
        threads: of the CPU.
        device, stream: of CUDA.

    Returns: ULR_OK (0), or the launcher's error code.
    """
    integers = array.array("q", numbers)
    where = _LAUNCH.pack(threads, device, stream, len(tensors), integers.buffer_info()[0])
    views = b"".join([_tensor(*view) if view else _ABSENT for view in tensors])
    return _launcher_at(address)(noise and _NOISE.pack(*noise), views, where)


def _tensor(address: int, dtype: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """The bytes of an ulr_tensor. Missing leading axes have size 1; so have the last two of a view of up to three."""
    lead = (3 if len(sizes) <= 3 else 5) - len(sizes)
    rest = 5 - lead - len(sizes)
    ones, zeros = (1,), (0,)
    return _TENSOR.pack(*(address, dtype), *ones * lead, *sizes, *ones * rest, *zeros * lead, *strides, *zeros * rest)


_shim = _import_shim()
if isinstance(_shim, str):
    launch, CALLS_BY = launch_by_ctypes, f"ctypes: {_shim}"
else:
    launch, CALLS_BY = _shim.launch, "pybind11"
