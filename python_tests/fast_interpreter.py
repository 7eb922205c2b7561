"""Triton's interpreter, with less work for each operation and the same values: for this process, once imported."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton._utils import validate_block_shape
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from ulr_kernels.backends.triton import noise_contract

core = tl.core


# Overflow of integers is looked for at each operation, and reported in debug mode alone, which is off.
builder = interpreter.interpreter_builder
builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


# Every call of a jit function patches the language, which the launch has done.
_patch_lang = interpreter._patch_lang


@functools.cache
def _languages(function: Callable) -> tuple[Any, ...]:
    return tuple(value for value in (tl, core) if any(value is other for other in function.__globals__.values()))


def _patch_once(function: Callable) -> Any:
    if any(core.is_builtin(language.load) for language in _languages(function)):
        return _patch_lang(function)
    return interpreter._LangPatchScope()


interpreter._patch_lang = _patch_once


# Its table is made anew at every call.
_np_dtype = functools.cache(interpreter._get_np_dtype)
interpreter._get_np_dtype = lambda of: _np_dtype(tl.uint64 if of.scalar.is_ptr() else of.scalar)


# Types and shapes are made anew for every tensor. Here tensors of one shape share it.
@functools.cache
def _shape(sizes: tuple[int, ...]) -> tuple[Any, Any]:
    return core.constexpr(math.prod(sizes)), core.tuple([core.constexpr(size) for size in sizes])


@functools.cache
def _block_shape(sizes: tuple[int, ...]) -> tuple[Any, int, str]:
    shape = core.tuple(sizes)
    return shape, validate_block_shape(shape), str(shape)


def _tensor(self, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _shape(tuple(type.shape) if type.is_block() else ())


def _block_type(self, element_ty: Any, shape: Any) -> None:
    self.element_ty = element_ty
    self.shape, self.numel, text = _block_shape(tuple(getattr(size, "value", size) for size in shape))
    self.name = f"<{text}, {element_ty}>"


_broadcast = TritonSemantic.broadcast_impl_value


def _broadcast_shapes(self, lhs: Any, rhs: Any) -> tuple[Any, Any]:
    return (lhs, rhs) if lhs.shape is rhs.shape else _broadcast(self, lhs, rhs)


core.tensor.__init__ = _tensor
core.block_type.__init__ = _block_type
core.block_type.to_ir = lambda self, builder: self
TritonSemantic.broadcast_impl_value = _broadcast_shapes


# Functions of their arguments alone: tests of other dtypes, shapes and passes ask again for the same noise.
def remember(function: Any) -> None:
    """A jit function's value is computed once for each content of its arguments."""
    compute, known = function.rewrite(), {}

    def content(argument: Any) -> Any:
        if isinstance(argument, (tuple, core.tuple)):
            return tuple(content(item) for item in argument)
        data = argument.handle.data
        return argument.type.name, data.shape, data.tobytes()

    def look_up(*arguments: Any) -> Any:
        key = content(arguments)
        if key not in known:
            known[key] = compute(*arguments)
        return known[key]

    function.rewritten_fn[function.fn] = look_up


remember(noise_contract.philox)
remember(noise_contract.quantile)
