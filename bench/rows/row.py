"""A row of the benchmark, and helpers for the makers of rows."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import ulr_kernels as ulr
from ulr_kernels.ops._op import Cost

SIGMA = 0.1
ROTATE_BYTES = 64 * 2**20  # twice the largest last-level cache of the machines at hand


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to do a row's work.

    Attributes:
        run: takes a set of inputs, and what `keep` returned if there is one.
        keep: makes what this way has kept since the forward pass. Not timed; its memory counts.
        threads: overrides the row's.
        backend: the library's back end; None for the one that it chooses.
    """

    run: Callable[..., Any]
    keep: Callable[..., Any] | None = None
    threads: int | None = None
    backend: str | None = None

    @contextlib.contextmanager
    def settings(self, row: Row) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or row.threads or before)
        try:
            with ulr.use_backend(self.backend) if self.backend else contextlib.nullcontext():
                yield
        finally:
            torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. `inputs(i)` makes the i-th set of inputs; the library's contestants come first.

    `in_cache`: one set of inputs, used over and over: for what threads add, free of what memory allows.
    """

    name: str
    inputs: Callable[[int], tuple]
    contestants: dict[str, Contestant]
    cost: Cost
    dist: str = "normal"
    kind: str = "fp32"
    threads: int | None = None
    memory: bool = False
    in_cache: bool = False

    def floor(self) -> dict[str, Any]:
        """The parts of the row's floor: counts, and the kinds of product and noise."""
        return dataclasses.asdict(self.cost) | {"kind": self.kind, "dist": self.dist}

    def sets(self) -> list[tuple]:
        """Sets of inputs to rotate through, enough of them that no cache keeps one until its turn comes again."""
        first = self.inputs(0)
        if self.in_cache:
            return [first]
        size = sum(t.numel() * t.element_size() for t in tree_leaves(first) if isinstance(t, Tensor))
        count = min(16, max(2, -(-ROTATE_BYTES // max(size, 1))))
        return [first, *(self.inputs(i) for i in range(1, count))]


def normal(seed: int, *shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return ulr.noise(shape, ulr.fold_in(0, seed), device=device).to(dtype)


def compiled(function: Callable) -> Callable:
    """torch.compile, one graph per shape; compiled by the first call."""
    return torch.compile(function, dynamic=False)


def ours(run: Callable, names: tuple[str | None, ...]) -> dict[str, Contestant]:
    """The library's contestants: the chosen back end, or each named one."""
    return {"ulr" if name is None else f"ulr {name}": Contestant(run, backend=name) for name in names}


def shaped(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without values, for the cost of a call."""
    return torch.empty(shape, dtype=dtype, device="meta")


def key_of(i: int, device: str) -> Tensor:
    return torch.tensor(ulr.fold_in(1, i), device=device)


def threads_text(threads: int | None) -> str:
    return "" if threads is None else f", {threads} thread{'s' * (threads > 1)}"


def kind_of(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
