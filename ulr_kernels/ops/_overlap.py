"""Written arguments must share no memory with themselves or with any other argument."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def tensors_of(argument: object) -> Sequence[Tensor]:
    """The tensors of an argument, which may be a list of them, or None."""
    if isinstance(argument, Tensor):
        return (argument,)
    return argument if isinstance(argument, list | tuple) and argument and isinstance(argument[0], Tensor) else ()


class _Span(NamedTuple):
    """A tensor of a call: its first byte, the byte past its last, and its position in the arguments."""

    start: int
    end: int
    position: int
    place: int  # in a list
    tensor: Tensor


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor and the byte past its last."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def _nests(tensor: Tensor) -> bool:
    """Whether each axis steps past all elements of the faster axes, so that no two elements share memory."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            return False
        reach += (size - 1) * stride
    return True


def _apart(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors whose extents intersect share no memory: they are column ranges of the same rows."""
    pitch = max(first.stride()) * first.element_size()
    if not pitch or pitch != max(second.stride()) * second.element_size():
        return False
    places = []
    for tensor in (first, second):
        start, end = _extent(tensor.select(tensor.stride().index(max(tensor.stride())), 0))
        places.append((start % pitch, end - start))
    (low, width), (high, other_width) = sorted(places)
    return low + width <= high and high + other_width <= low + pitch


def refuse_overlap(op: str, mutates: Container[int], args: tuple) -> None:
    """Raise if a written argument overlaps itself or any other argument: the result would depend on timing.

    Args:
        op: its name.
        mutates: positions of the arguments that it writes.
        args: the schema's arguments.
    """
    spans = [
        _Span(*_extent(tensor), position, place, tensor)
        for position, argument in enumerate(args)
        for place, tensor in enumerate(tensors_of(argument))
        if tensor.numel()
    ]
    spans.sort(key=lambda span: span.start)
    before: list[_Span] = []  # spans that reach past the start of the current one: few, unless many overlap
    for span in spans:
        before = [other for other in before if other.end > span.start]
        if span.position in mutates and not (span.tensor.is_contiguous() or _nests(span.tensor)):
            name = _name(op, args, span)
            raise ValueError(f"ulr::{op}: '{name}' must not overlap itself, got strides {span.tensor.stride()}")
        for other in before:
            _refuse_shared_memory(op, mutates, args, *sorted((other, span), key=lambda s: (s.position, s.place)))
        before.append(span)


def _refuse_shared_memory(op: str, mutates: Container[int], args: tuple, first: _Span, second: _Span) -> None:
    if first.position not in mutates:
        first, second = second, first
    a, b = first.tensor, second.tensor
    if first.position not in mutates or a.device != b.device or (a.dim() and b.dim() and _apart(a, b)):
        return
    raise ValueError(
        f"ulr::{op}: '{_name(op, args, first)}' must not overlap '{_name(op, args, second)}', got shared memory"
    )


def _name(op: str, args: tuple, span: _Span) -> str:
    name = getattr(torch.ops.ulr, op).default._schema.arguments[span.position].name
    return name if isinstance(args[span.position], Tensor) else f"{name}[{span.place}]"
