"""Random numbers of a loss: every forward of a step draws the same ones."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import operator
import pickle
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class SameDraws:
    """The generators of torch on the CPU and on some devices, of Python, of NumPy if it is imported, and those noted.

    Each forward of a micro-batch starts with their states at its beginning. After `finish` they are as after one
    forward, so that the next micro-batch draws anew.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._generators: list[_Generator] = [
            _Generator(torch.get_rng_state, torch.set_rng_state, torch.equal),
            _Generator(random.getstate, random.setstate, operator.eq),
        ]
        if "numpy" in sys.modules:
            self._generators.append(_numpy())
        for device in devices:
            if device.type == "cuda":
                get = functools.partial(torch.cuda.get_rng_state, device)
                put = functools.partial(torch.cuda.set_rng_state, device=device)
                self._generators.append(_Generator(get, put, torch.equal))
        self._start = [each.get() for each in self._generators]
        self._end: list[Any] | None = None  # after the first forward
        self._noted: dict[int, _Noted] = {}

    def note(self, generator: torch.Generator) -> None:
        """Treat this generator, which a forward is about to draw from, in the same way."""
        if id(generator) not in self._noted:
            self._noted[id(generator)] = _Noted(generator, generator.get_state())

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """One forward runs in this block."""
        if self._end is not None:
            self._put(self._start)
            for each in self._noted.values():
                each.generator.set_state(each.start)
        yield
        for each in self._noted.values():
            each.end = each.generator.get_state() if each.end is None else each.end
        if self._end is None:  # from here on those count that the forward has drawn from
            states = [
                (each, start, each.get())
                for each, start in zip(self._generators, self._start, strict=True)
                if each.drawn is None or each.drawn(start)
            ]
            used = [(each, start, end) for each, start, end in states if not each.same(start, end)]
            self._generators, self._start, self._end = map(list, zip(*used, strict=True)) if used else ([], [], [])

    def finish(self) -> None:
        """Put the states after the first forward."""
        if self._end is not None:
            self._put(self._end)
        for each in self._noted.values():
            each.generator.set_state(each.start if each.end is None else each.end)

    def _put(self, states: list[Any]) -> None:
        for each, state in zip(self._generators, states, strict=True):
            each.put(state)


@dataclasses.dataclass
class _Noted:
    """A generator of torch that a function got as an argument."""

    generator: torch.Generator
    start: Tensor  # its state before the first forward that draws from it
    end: Tensor | None = None  # after this


class _Generator(NamedTuple):
    """A generator of random numbers."""

    get: Callable[[], Any]  # its state
    put: Callable[[Any], object]
    same: Callable[[Any, Any], bool]  # whether two states are one
    drawn: Callable[[Any], bool] | None = None  # quickly: whether it may have been drawn from since a state


class _NumPy:
    """NumPy's global generator, whose state takes long to get: it is kept, with the words in memory that show its use.

    A normal number that was made in a pair waits outside these words: then the state is not kept.
    """

    def __init__(self) -> None:
        from numpy import random as numpy_random

        self._random = numpy_random.mtrand._rand
        self._words, self._state = b"", {}  # type: tuple[bytes, dict[str, Any]]

    def get(self) -> dict[str, Any]:
        words = self._in_memory()
        if not words or words != self._words or self._state["has_gauss"]:
            self._words, self._state = words, self._random.get_state(legacy=False)
        return self._state

    def put(self, state: dict[str, Any]) -> None:
        self._random.set_state(state)

    def drawn(self, state: dict[str, Any]) -> bool:
        """Whether it may have been drawn from since a state, the last that was got."""
        return self.get() is not state

    def _in_memory(self) -> bytes:
        generator = self._random._bit_generator
        if type(generator).__name__ != "MT19937":
            return b""
        return ctypes.string_at(generator.ctypes.state_address, 4 * 625)


def _same_numpy(state: dict[str, Any], other: dict[str, Any]) -> bool:
    return pickle.dumps(state) == pickle.dumps(other)


@functools.cache
def _numpy() -> _Generator:
    own = _NumPy()
    return _Generator(own.get, own.put, _same_numpy, own.drawn)
