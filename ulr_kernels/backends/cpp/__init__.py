"""The cpp back end: the CPU library (csrc/cpu), its instruction sets and threads, and the providers of its ops."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import pathlib
from collections.abc import Callable

import torch
from torch import Tensor

from ulr_kernels.backends import _native, _parameters
from ulr_kernels.backends.cpp import conv, elementwise, linear, mlp, perturbed
from ulr_kernels.ops.combine_ import Combine
from ulr_kernels.ops.noise import FoldIn, Noise, Philox
from ulr_kernels.ops.perturb_ import Perturb


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
    """GOMP_parallel of torch's OpenMP runtime, or None if it has none."""
    path = pathlib.Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None


def isa() -> str:
    """The instruction set in use: "avx512", "avx2" or "portable"."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Noise and the primitives below it.


def _philox4x32(out: Tensor, a: Philox) -> None:
    rows = (out.view(-1, 4), a.counter.reshape(-1, 4), a.key)
    _native.launcher("cpp", "philox4x32")(None, _native.views(rows))


def _fold_in(out: Tensor, a: FoldIn) -> None:
    shape = (1,) * (3 - out.dim()) + out.shape if out.dim() <= 3 else (1, 1, out.numel())
    flat = [t.expand(out.shape).reshape(shape) for t in (out, a.key, a.data)]  # kept alive: some are copies
    _native.launcher("cpp", "fold_in")(None, _native.views(flat))


def _noise(out: Tensor, a: Noise) -> None:
    cols = a.shape[-1] if a.shape else 1
    if out.numel():
        _native.launch_cpu("noise", _native.noise_view(a.noise, cols), (out.view(-1, cols),))


def _on_list(op: str, a: Perturb | Combine) -> None:
    call = getattr(_parameters, op)(a)
    _native.launch_cpu(op, *call)


# ---------------------------------------------------------------------------------------------------------------------


_PROVIDERS: dict[str, Callable] = {
    "philox4x32": _philox4x32,
    "fold_in": _fold_in,
    "noise": _noise,
    "noise_add": elementwise.noise_add,
    "noise_score": elementwise.noise_score,
    "scale_shift_grad_": elementwise.scale_shift_grad_,
    "noisy_conv2d": conv.noisy_conv2d,
    "noisy_conv2d_grad_": conv.noisy_conv2d_grad_,
    "noisy_conv2d_recompute_": conv.noisy_conv2d_recompute_,
    "noisy_linear": linear.noisy_linear,
    "noisy_linear_grad_": linear.noisy_linear_grad_,
    "foreach_noisy_linear_grad_": linear.foreach_noisy_linear_grad_,
    "noisy_linear_recompute_": linear.noisy_linear_recompute_,
    "noisy_mlp_step": mlp.noisy_mlp_step,
    "perturbed_linear": perturbed.perturbed_linear,
    "perturbed_conv2d": perturbed.perturbed_conv2d,
    "perturbed_embedding": perturbed.perturbed_embedding,
    "perturb_": functools.partial(_on_list, "perturb_"),
    "combine_": functools.partial(_on_list, "combine_"),
}


def provider(op: str, device: torch.device) -> Callable | str:
    """The function that runs `op` on `device`, or a sentence on why there is none."""
    if device.type != "cpu":
        return "it runs on the CPU"
    library = _library()
    if isinstance(library, str):
        return library
    return _PROVIDERS.get(op, "it has no kernel for this op")
