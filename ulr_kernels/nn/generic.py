"""Calls that no layer type reads: any torch function of samples and parameters, by its own derivative.

`x + position_embeddings`, `gain * x`, `conv_transpose2d`, `prelu`, `bilinear`, `einsum` and many more need no file of
their own: the score takes the place of the output's gradient; torch's derivative of this one function does the rest.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree
from torch.utils.hooks import RemovableHandle

from ulr_kernels.nn.call import Call, DerivedParameter, backward_to_parameters, gradient_buffers

CHANNELS_FIRST = {F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
                  F.batch_norm, F.group_norm, F.instance_norm, F.prelu, torch.prelu}  # fmt: skip
SUMS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__, Tensor.__radd__}
ELEMENTWISE = SUMS | {torch.sub, torch.mul, torch.div, torch.where, torch.cat, torch.concat, torch.stack, torch.lerp,
                      Tensor.sub, Tensor.mul, Tensor.div, Tensor.sub_, Tensor.mul_, Tensor.div_, Tensor.where,
                      Tensor.__sub__, Tensor.__rsub__, Tensor.__isub__, Tensor.__mul__, Tensor.__rmul__,
                      Tensor.__imul__, Tensor.__truediv__, Tensor.__rtruediv__, Tensor.__rdiv__,
                      Tensor.__itruediv__}  # fmt: skip
"""Functions that join a parameter that has a row for each sample, if there is one, with the samples row by row."""
EXPAND_FUNCTIONS = {Tensor.expand, Tensor.expand_as, Tensor.repeat, Tensor.tile, torch.tile, torch.broadcast_to,
           Tensor.broadcast_to}  # fmt: skip

BACKWARD_HOOKS = {Tensor.register_hook, Tensor.retain_grad}
"""Functions of a tensor's own backward pass, which a forward without graph does not have: they do nothing there."""
METADATA_FUNCTIONS = {Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as, Tensor.to}
"""Functions that take no more from an argument than its shape, its dtype or its device."""


def ignored_hook(func: Callable) -> RemovableHandle | None:
    """The result of one of `BACKWARD_HOOKS` for a tensor without graph: a handle of a hook that never runs."""
    return RemovableHandle(collections.OrderedDict()) if func is Tensor.register_hook else None


class AutogradCall(Call):
    """v = func(samples, parameters), for any torch function.

    Attributes:
        name: of the function.
    """

    generic = True

    def __init__(
        self,
        func: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        samples: list[Tensor],
        derived: list[DerivedParameter],
    ):
        """`samples`, `derived`: the arguments that depend on samples, and on parameters alone."""
        self.name = getattr(func, "__name__", str(func))
        self._func, self._in_place = _out_of_place(func)
        given = tuple(samples)
        if self._in_place:  # the gradient needs the value before the call
            self._target, before = args[0], args[0].clone()
            args, samples = (before, *args[1:]), [before if s is args[0] else s for s in samples]
        self._leaves, self._structure = _pytree.tree_flatten((args, kwargs))
        self._places = [next(i for i, leaf in enumerate(self._leaves) if leaf is s) for s in samples]
        self.feature_dim = 1 if func in CHANNELS_FIRST else -1
        self.additive = func in SUMS and not kwargs and len(samples) == 1
        super().__init__(tuple(samples), tuple(derived))
        self.given = given

    def forward(self, *inputs: Tensor) -> Tensor:
        leaves = list(self._leaves)
        for place, x in zip(self._places, inputs, strict=True):
            leaves = [x if leaf is self._leaves[place] else leaf for leaf in leaves]
        args, kwargs = _pytree.tree_unflatten(leaves, self._structure)
        return self._func(*args, **kwargs)

    def differentiable(self) -> Tensor | None:
        """The output, if it is one tensor with a derivative in the parameters."""
        if self._func is Tensor.__setitem__:  # it returns nothing
            return None
        with torch.enable_grad():
            y = self.forward(*self.inputs)
        fits = isinstance(y, Tensor) and y.is_floating_point() and y.requires_grad
        return y.detach() if fits else None

    def clean(self) -> Tensor:
        return self._written(super().clean())

    def noised(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._written(super().noised(*args, **kwargs))

    def _written(self, y: Tensor) -> Tensor:
        """The tensor that an operation in place has written; a new one if its target has fewer copies."""
        return self._target.copy_(y) if self._in_place and y.shape == self._target.shape else y

    def add_gradient(self, loss_weight: Tensor, draw: int, log_sigma: Tensor | None) -> None:
        trained = [each.tensor for each in self.derived if each.tensor.requires_grad]
        with gradient_buffers(*self.derived) as given:
            buffers = [buffer for buffer in given if buffer is not None]
            for score, *inputs in self._scores(loss_weight, draw, log_sigma):
                with torch.enable_grad(), self._as_called():
                    y = self.forward(*inputs)
                found = torch.autograd.grad(y, trained, score.to(y.dtype), allow_unused=True)
                for buffer, part in zip(buffers, found, strict=True):
                    if part is not None:
                        buffer.add_(part)


class RowsCall(Call):
    """A parameter that is expanded to a row for each sample, as a class token is: v = theta."""

    expands_rows = True

    def __init__(self, derived: DerivedParameter) -> None:
        self._derived = derived
        super().__init__((derived.tensor.detach(),), (derived,))

    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[0]

    def clean(self) -> Tensor:
        rows = self._derived.tensor
        return rows.view_as(rows) if torch.is_grad_enabled() else self.inputs[0]  # autograd may be watching

    def of_sample(self, sample: int, samples: int) -> Tensor:
        with torch.enable_grad():
            return self._derived.tensor.unflatten(0, (samples, -1))[sample]

    def add_output_gradient(self, gradient: Tensor) -> None:
        total = torch.zeros_like(self._derived.tensor, dtype=torch.float32)
        total[: len(gradient)] += gradient
        backward_to_parameters(self._derived.tensor, self._derived.parameters, total)

    def add_gradient(self, loss_weight: Tensor, draw: int, log_sigma: Tensor | None) -> None:
        total = torch.zeros_like(self._derived.tensor, dtype=torch.float32)
        rows = self._shape[0]
        for score, _ in self._scores(loss_weight, draw, log_sigma):
            total[:rows].add_(score)
        backward_to_parameters(self._derived.tensor, self._derived.parameters, total)


def _out_of_place(func: Callable) -> tuple[Callable, bool]:
    """The form of a function that writes nothing in place, and whether the function writes in place."""
    name = getattr(func, "__name__", "")
    if name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}"):
        return getattr(Tensor, f"__{name[3:]}"), True
    if name.endswith("_") and not name.endswith("__") and hasattr(Tensor, name[:-1]):
        return getattr(Tensor, name[:-1]), True
    return func, False
