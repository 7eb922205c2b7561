"""Corrections of Triton's interpreter, for this process: where it computes otherwise than a GPU."""

from __future__ import annotations

import torch
import triton.language as tl
from triton._C.libtriton import interpreter as library
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from ulr_kernels import noise_contract


def compute_as_a_gpu_does() -> None:
    if not hasattr(library, "fma_fp32"):  # before Triton 3.9
        InterpreterBuilder.create_fma = _fma
        interpreter._patch_lang_tensor = _patch_tensor
    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.cast_impl = _cast


def _fma(self, x, y, z):
    """fma with one rounding; the original rounds the product too."""
    operands = (torch.from_numpy(v.data.copy()) for v in (x, y, z))
    return TensorHandle(noise_contract.fma(*operands).numpy(), z.dtype.scalar)


_patch_tensor_before_numpy_2_4 = interpreter._patch_lang_tensor


def _patch_tensor(tensor, scope) -> None:
    """`range(n)` for a kernel's scalar n, which the interpreter holds in an array of one element."""
    _patch_tensor_before_numpy_2_4(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


_dot_of_numbers = InterpreterBuilder.create_dot


def _dot(self, a, b, total, *options):
    """Products of bf16, which the interpreter keeps as bits and would multiply as integers."""
    return _dot_of_numbers(self, *(_widened(v) for v in (a, b)), total, *options)


def _widened(value: TensorHandle) -> TensorHandle:
    if value.dtype.scalar != tl.bfloat16:
        return value
    return TensorHandle((value.data.astype("uint32") << 16).view("float32"), tl.float32)


_cast_of_numbers = InterpreterBuilder.cast_impl


def _cast(self, source, dtype):
    """fp32 to bf16, rounded to nearest as on a GPU; the original truncates."""
    if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
        return _cast_of_numbers(self, source, dtype)
    rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.int16)
    return TensorHandle(rounded.numpy().view("uint16"), tl.bfloat16)
