"""The cuda back end: the arguments of its launchers (csrc/cuda) for each op, and when they can run."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from ulr_kernels.backends import _arguments, _native
from ulr_kernels.backends._native import Arguments
from ulr_kernels.backends.cuda import conv, elementwise, linear, mlp, perturbed, walsh

NEEDED = (8, 0)  # compute capability: cp.async and the mma.sync shapes of the kernels

ARGUMENTS: dict[str, Callable[..., Arguments]] = _native.by_op(
    _arguments, conv, elementwise, linear, mlp, perturbed, walsh
)


@functools.cache
def _why_unusable(device: int) -> str | None:
    """The reason why the library's kernels cannot run on a device: an old driver, or another architecture."""
    code = _native.library("cuda").ulr_cuda_usable(device)  # type: ignore[union-attr]
    return f"its kernels cannot run on this device: {_native.error('cuda', code)}" if code else None


def provider(op: str, device: torch.device) -> Callable | str:
    """The function that runs `op` on `device`, or a sentence on why there is none."""
    if device.type != "cuda":
        return "it runs on a CUDA device"
    library = _native.library("cuda")
    if isinstance(library, str):
        return library
    if not torch.cuda.is_available():
        return "torch sees no CUDA device" if torch.version.cuda else "this torch was built without CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability < NEEDED:
        return f"it needs compute capability {NEEDED[0]}.{NEEDED[1]}, this device has {capability[0]}.{capability[1]}"
    if why := _why_unusable(torch.cuda.current_device() if device.index is None else device.index):
        return why
    if op not in ARGUMENTS:
        return "it has no kernel for this op"
    launcher, arguments = _native.launcher("cuda", op), ARGUMENTS[op]

    def run(*args) -> None:
        call = arguments(*args)
        where = next(t for t in call.tensors if t is not None).device
        stream = torch.cuda.current_stream(where).cuda_stream
        launcher(call.noise, call.views(), call.numbers, device=where.index, stream=stream)

    return run
