"""A batch: inputs and targets with samples first, their copies, and the losses of their rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ulr_kernels.errors import fail
from ulr_kernels.nn.affects import AffectedLosses

LossFunction = Callable[[Any, Any], Tensor]


class Batch:
    """Inputs and targets: tensors, or tuples, lists and mappings of tensors, whose first axis is the sample.

    A list, tuple or array with as many entries as there are samples (texts, labels, records) has one for each. Other
    values are the same for all samples.

    Args:
        x, y: inputs and targets; `y` may be None.
        owner: the name that errors begin with.
        affects: the losses that each row's noise can change, if samples have many losses; None: a sample has one.
        names: of `x` and `y` in errors.

    Attributes:
        one_row_is_like_many: a forward of one sample tells what one of many does. A model of rows may do without the
            samples' axis where there is one alone, as `squeeze` does.
        samples: their number.
        first: the place of the first sample in the whole batch; other ranks may have the rest.
        share: samples of this batch over those of the whole batch, times the number of ranks. The mean of this batch
            counts so much in the mean over the ranks.

    Raises:
        RuleError: a tensor is a scalar, is empty, is not dense, or has another number of samples than the first one; or
            a value with as many entries as samples cannot be told from a constant.
    """

    one_row_is_like_many = False

    def __init__(
        self,
        x: Any,
        y: Any,
        owner: str = "ulr.ULR",
        affects: AffectedLosses | None = None,
        names: tuple[str, str] = ("x", "y"),
    ) -> None:
        x, y = _plain(x), _plain(y)
        self.owner, self.affects = owner, affects
        self.first, self.share = 0, 1.0
        self.samples = 0
        first: Tensor | None = None
        for argument, value in zip(names, (x, y), strict=True):
            for leaf in tensors(value):
                if leaf.is_nested or leaf.layout != torch.strided:
                    got = "a nested one" if leaf.is_nested else leaf.layout
                    self._fail(argument, "hold dense tensors (pad them, or use to_dense())", got)
                if leaf.dim() == 0:
                    self._fail(argument, "hold tensors with samples on the first axis", "a scalar tensor")
                if self.samples and leaf.shape[0] != self.samples:
                    assert first is not None
                    time_first = names[0] == "x" and first.dim() > 1 and first.shape[1] == leaf.shape[0]
                    hint = " (if x has time first, move that axis inside the model)" if time_first else ""
                    self._fail(argument, f"have {self.samples} samples on the first axis{hint}", list(leaf.shape))
                first, self.samples = leaf if first is None else first, leaf.shape[0]
                if not self.samples:
                    self._fail(argument, "have at least one sample", list(leaf.shape))
        if not tensors(x):
            self._fail(names[0], "be or hold a tensor", type(x).__name__)
        self.x, self.y = self._with_entries(names[0], x), self._with_entries(names[1], y)

    def _with_entries(self, argument: str, value: Any) -> Any:
        """The same with `PerSampleValues` in the place of whatever has an entry for each sample and is no tensor."""

        def is_sequence(value: Any) -> bool:
            return _is_array(value) or (isinstance(value, list | tuple) and not tensors(value))

        def one(value: Any) -> Any:
            if isinstance(value, str | bytes | dict) or not hasattr(value, "__len__") or len(value) != self.samples:
                return value
            if not is_sequence(value):
                if isinstance(value, Tensor | torch.Size) or not isinstance(value, Sequence):
                    return value
                self._fail(
                    argument, "hold a tensor, list, tuple or array of what each sample has", type(value).__name__
                )
            if argument == "x" and isinstance(value, tuple) and all(isinstance(each, int | float) for each in value):
                self._fail(
                    argument,
                    f"hold a tensor or list of what each of the {self.samples} samples has, and bind constants to the "
                    "model (functools.partial): a tuple of as many numbers may be either",
                    value,
                )
            return PerSampleValues(value)

        return _pytree.tree_map(one, value, is_leaf=is_sequence)

    @property
    def signature(self) -> tuple:
        """Everything that a model can decide by before it reads values of tensors: shapes, dtypes, devices, numbers."""
        return _signature(self.x), _signature(self.y), self.affects and self.affects.signature

    @property
    def kind(self) -> tuple:
        """The signature without the sizes of tensors."""
        return _kind(self.signature)

    @property
    def many(self) -> bool:
        """Whether forwards of one copy of this batch tell what those of several do."""
        return self.samples > 1 or self.one_row_is_like_many

    def inputs(self, copies: int) -> Any:
        """The model's input for so many copies, copy-major."""
        return repeat(self.x, copies)

    def located(self, first: int, share: float) -> Batch:
        """The same samples, at another place in the whole batch."""
        batch = copy.copy(self)
        batch.first, batch.share = first, share
        return batch

    def part(self, rows: slice | Tensor, first: int) -> Batch:
        """Some of the samples, `first` being the place of the first of them in this batch.

        `rows`: a range, or int64 `[samples]`, whose noise is that of a range from `first` on.
        """
        if isinstance(rows, slice) and (rows.start, rows.stop) == (0, self.samples):
            return self

        def of(leaf: Tensor | PerSampleValues) -> Tensor | PerSampleValues:
            if isinstance(leaf, PerSampleValues):
                return leaf.part(rows)
            return leaf[rows if isinstance(rows, slice) else rows.to(leaf.device)]

        part = copy.copy(self)
        part.x, part.y = (_pytree.tree_map_only((Tensor, PerSampleValues), of, value) for value in (self.x, self.y))
        part.affects = self.affects and self.affects.part(rows)
        part.samples = len(range(self.samples)[rows]) if isinstance(rows, slice) else len(rows)
        return part.located(self.first + first, self.share * part.samples / self.samples)

    def losses(self, outputs: Any, loss_fn: LossFunction, copies: int) -> Tensor:
        """The loss of each row: fp32 `[copies, samples]`, or with `affects` `[copies, samples, losses]`.

        Raises:
            RuleError: `loss_fn` returns something else than a tensor of that shape, or differentiates its outputs.
        """
        losses = self._call(loss_fn, outputs, repeat(self.y, copies))
        rows = copies * self.samples
        shape, rule = [rows], "one loss per row"
        if self.affects is not None:
            shape, rule = [rows, self.affects.losses], "[copies * samples, columns of affects]"
        if not isinstance(losses, Tensor) or list(losses.shape) != shape:
            got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            several = isinstance(losses, Tensor) and losses.dim() > 1 and self.affects is None
            hint = "of several, their mean; or give affects" if several else "reduction='none'?"
            self._fail("loss_fn", f"return {rule}, {shape} here ({hint})", got)
        return losses.to(torch.float32).unflatten(0, (copies, self.samples))

    def _call(self, loss_fn: LossFunction, outputs: Any, targets: Any) -> Any:
        """What `loss_fn` returns. Raises `RuleError` if it differentiates its outputs."""
        try:
            return loss_fn(outputs, targets)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            rule = (
                "need no graph of the outputs, which have none (a derivative in them: use "
                "outputs.detach().requires_grad_() inside torch.enable_grad())"
            )
            fail("loss_fn", rule, f"torch.autograd.grad or backward(): {error}", self.owner, error)

    def _fail(self, argument: str, rule: str, value: object) -> NoReturn:
        fail(argument, rule, value, self.owner)


class ModelInput:
    """A model's input that is no tree of tensors, such as a graph.

    Attributes:
        tensors: those that it holds.
    """

    tensors: list[Tensor]

    def call(self, model: nn.Module) -> Any:
        """The model's output."""
        raise NotImplementedError


class PerSampleValues:
    """A list, tuple or array that has an entry for each sample."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def part(self, rows: slice | Tensor) -> PerSampleValues:
        """Those of some samples."""
        if isinstance(rows, slice):
            return PerSampleValues(self.values[rows])
        places = rows.tolist()
        if _is_array(self.values):
            return PerSampleValues(self.values[places])
        return PerSampleValues(type(self.values)(self.values[place] for place in places))

    def repeated(self, copies: int) -> Any:
        """The values of copies of the samples, copy-major."""
        return self.values[[*range(len(self.values))] * copies] if _is_array(self.values) else self.values * copies


def _is_array(value: Any) -> bool:
    """Whether a value is an array of NumPy, which this library does not need, with at least one axis."""
    return type(value).__module__ == "numpy" and bool(getattr(value, "shape", ()))


def _plain(value: Any) -> Any:
    """The value with a dict in the place of any other mapping, such as a tokenizer's output."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    return value


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a tree of tuples, lists and dicts."""
    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _signature(value: Any) -> tuple:
    leaves, structure = _pytree.tree_flatten(value)
    return structure, tuple(map(_leaf_signature, leaves))


def _leaf_signature(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return leaf if isinstance(leaf, bool | int | float | str) else type(leaf)


def _kind(signature: Any) -> Any:
    """A signature with the number of axes in the place of each shape."""
    if isinstance(signature, torch.Size):
        return len(signature)
    return tuple(map(_kind, signature)) if isinstance(signature, tuple) else signature


def repeat(value: Any, copies: int) -> Any:
    """Copies of a batch, copy-major: row c * samples + i is sample i of copy c. Always new memory."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, PerSampleValues):
            return leaf.repeated(copies)
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.expand(copies, *leaf.shape).clone(memory_format=torch.contiguous_format).flatten(0, 1)

    return (
        one(value) if isinstance(value, Tensor) else _pytree.tree_map(one, value)
    )  # the tree takes longer than a copy


def apply(model: nn.Module, x: Any) -> Any:
    """The model's output: a tuple is its positional arguments, a dict its keyword arguments."""
    if isinstance(x, ModelInput):
        return x.call(model)
    if isinstance(x, dict):
        return model(**x)
    if isinstance(x, tuple | list):
        return model(*x)
    return model(x)
