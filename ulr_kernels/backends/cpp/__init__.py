"""The cpp back end: the CPU library (csrc/cpu), its instruction sets and threads, and the providers of its ops."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import pathlib
from collections.abc import Callable

import torch

from ulr_kernels.backends import _arguments, _native
from ulr_kernels.backends._native import Arguments
from ulr_kernels.backends.cpp import conv, elementwise, linear, mlp, perturbed


@functools.cache
def _library() -> ctypes.CDLL | str:
    library = _native.library("cpp")
    if not isinstance(library, str):
        library.ulr_cpu_isa.restype = ctypes.c_char_p
        library.ulr_cpu_available_isa.restype = ctypes.c_char_p
        library.ulr_cpu_set_omp_parallel(_omp_parallel())
        library.ulr_cpu_set_isa(_available_isas(library)[0].encode())
    return library


@functools.cache
def _available_isas(library: ctypes.CDLL) -> list[str]:
    """The best first. ULR_MAX_CPU_ISA leaves out those that are better than the one it names."""
    names = [name.decode() for name in itertools.takewhile(bool, map(library.ulr_cpu_available_isa, itertools.count()))]
    most = os.environ.get("ULR_MAX_CPU_ISA") or names[0]
    if most not in names:
        raise ValueError(f"ulr: ULR_MAX_CPU_ISA must be one of {', '.join(names)}, got {most!r}")
    return names[names.index(most) :]


def _omp_parallel() -> ctypes.c_void_p | None:
    """GOMP_parallel of torch's OpenMP runtime, or None if it has none.

    torch's library finds the symbol in the runtime that it has loaded: GNU's, or on macOS LLVM's, which has it too.
    """
    path = pathlib.Path(torch.__file__).parent / "lib" / f"libtorch_cpu{_native.SHARED}"
    try:
        return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None


def isa() -> str:
    """The instruction set in use: "avx512", "avx2", "neon" or "portable"."""
    return _opened().ulr_cpu_isa().decode()


def available_isas() -> list[str]:
    """The instruction sets of this build that this machine runs, the best first."""
    return _available_isas(_opened())


def set_isa(name: str | None) -> None:
    """Use one instruction set from now on, in every thread; None: the best. All give the same bits.

    Raises:
        ValueError: this build does not have it, or this machine does not run it.
    """
    available = available_isas()
    chosen = available[0] if name is None else name
    if chosen not in available:
        raise ValueError(f"ulr: 'isa' must be one of {', '.join(available)}, got {name!r}")
    _opened().ulr_cpu_set_isa(chosen.encode())


def _opened() -> ctypes.CDLL:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(f"the cpp back end is absent: {library}")
    return library


def describe() -> str:
    """The machine's instruction sets, for `ulr doctor`."""
    capability = torch.backends.cpu.get_cpu_capability()
    if isinstance(_library(), str):
        return f"torch uses {capability}"
    return f"kernels use {isa()} (of {', '.join(available_isas())}), torch {capability}"


def _launch(op: str, arguments: Callable[..., Arguments], *args) -> None:
    """The provider of an op that is one launch."""
    _native.launch_cpu(op, *arguments(*args))


_PROVIDERS = _native.by_op(conv, elementwise, linear, mlp, perturbed) | {
    op: functools.partial(_launch, op, arguments) for op, arguments in _native.by_op(_arguments).items()
}


def provider(op: str, device: torch.device) -> Callable | str:
    """The function that runs `op` on `device`, or a sentence on why there is none."""
    if device.type != "cpu":
        return "it runs on the CPU"
    library = _library()
    if isinstance(library, str):
        return library
    return _PROVIDERS.get(op, "it has no kernel for this op")
