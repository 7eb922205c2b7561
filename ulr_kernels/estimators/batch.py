"""A batch: inputs and targets with samples first, their copies, and the losses of their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ulr_kernels.estimators.reach import Reach
from ulr_kernels.estimators.settings import fail

LossFunction = Callable[[Any, Any], Tensor]


class Batch:
    """Inputs and targets: tensors, tuples or dicts of tensors whose first axis is the sample.

    Attributes:
        samples: how many it has.
        first: the place of its first sample in the whole batch, of which other ranks may have the rest.
        share: its part of the samples, times the number of ranks: what its mean counts in the mean over the ranks.
        reach: which losses of a sample its rows' noise reaches, if it has many; None: a sample has one loss.
        owner: who speaks in its errors.
    """

    def __init__(self, x: Any, y: Any, owner: str = "ulr.ULR") -> None:
        self.x, self.y, self.owner = x, y, owner
        self.reach: Reach | None = None
        self.samples = self.first = 0
        self.share = 1.0
        for argument, value in (("x", x), ("y", y)):
            for leaf in tensors(value):
                if leaf.dim() == 0:
                    self._fail(argument, "hold tensors with samples on the first axis", "a scalar tensor")
                if self.samples and leaf.shape[0] != self.samples:
                    self._fail(argument, f"have {self.samples} samples on the first axis", list(leaf.shape))
                self.samples = leaf.shape[0]
                if not self.samples:
                    self._fail(argument, "have at least one sample", list(leaf.shape))
        if not tensors(x):
            self._fail("x", "be or hold a tensor", type(x).__name__)

    @property
    def signature(self) -> tuple:
        """What a model may decide by before it looks at values of tensors."""
        return _signature(self.x), _signature(self.y), self.reach and self.reach.signature

    @property
    def kind(self) -> tuple:
        """The signature without the sizes of tensors."""
        return _kind(self.signature)

    def part(self, rows: slice) -> Batch:
        """Some of the samples, in their place."""
        if (rows.start, rows.stop) == (0, self.samples):
            return self
        x, y = (_pytree.tree_map_only(Tensor, lambda leaf: leaf[rows], value) for value in (self.x, self.y))
        return self._of(x, y, self.reach and self.reach.part(rows), rows.start)

    def select(self, rows: Tensor, place: int) -> Batch:
        """Some of the samples, as if they were in the batch from a place on."""
        x, y = (_pytree.tree_map_only(Tensor, lambda leaf: leaf[rows.to(leaf.device)], v) for v in (self.x, self.y))
        return self._of(x, y, self.reach and self.reach.part(rows), place)

    def _of(self, x: Any, y: Any, reach: Reach | None, place: int) -> Batch:
        part = Batch(x, y, self.owner)
        part.reach = reach
        part.first = self.first + place
        part.share = self.share * part.samples / self.samples
        return part

    def losses(self, outputs: Any, loss_fn: LossFunction, copies: int) -> Tensor:
        """The loss of each row: fp32 `[copies, samples]`; with a reach `[copies, samples, losses]`."""
        losses = loss_fn(outputs, repeat(self.y, copies))
        rows = copies * self.samples
        shape, rule = [rows], "one loss per row"
        if self.reach is not None:
            shape, rule = [rows, self.reach.losses], "[copies * samples, columns of reach]"
        if not isinstance(losses, Tensor) or list(losses.shape) != shape:
            got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            several = isinstance(losses, Tensor) and losses.dim() > 1 and self.reach is None
            hint = "of several, their mean; or give a reach" if several else "reduction='none'?"
            self._fail("loss_fn", f"return {rule}, {shape} here ({hint})", got)
        return losses.detach().to(torch.float32).unflatten(0, (copies, self.samples))

    def _fail(self, argument: str, rule: str, value: object) -> NoReturn:
        fail(argument, rule, value, self.owner)


def tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _signature(value: Any) -> tuple:
    leaves, structure = _pytree.tree_flatten(value)
    return structure, tuple(map(_leaf_signature, leaves))


def _kind(signature: Any) -> Any:
    """A signature with the number of axes for each shape."""
    if isinstance(signature, torch.Size):
        return len(signature)
    return tuple(map(_kind, signature)) if isinstance(signature, tuple) else signature


def _leaf_signature(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return leaf if isinstance(leaf, bool | int | float | str) else type(leaf)


def repeat(value: Any, copies: int) -> Any:
    """Copies of a batch, copy-major: row c * samples + i is sample i of copy c. Always new memory."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.expand(copies, *leaf.shape).clone(memory_format=torch.contiguous_format).flatten(0, 1)

    return one(value) if isinstance(value, Tensor) else _pytree.tree_map(one, value)  # which takes longer than a copy


def joined(outputs: Sequence[Any]) -> Any:
    """The outputs of forwards as those of one, one behind the other."""
    return _pytree.tree_map(lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0], *outputs)


def apply(model: nn.Module, x: Any) -> Any:
    """The model's output: a tuple is its positional arguments, a dict its keyword arguments."""
    if isinstance(x, dict):
        return model(**x)
    if isinstance(x, tuple | list):
        return model(*x)
    return model(x)
