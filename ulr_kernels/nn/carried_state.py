"""States that modules carry from one forward into the next: membranes, recurrent states, whatever is read anew."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ulr_kernels.backends.capture import capturing
from ulr_kernels.errors import fail
from ulr_kernels.nn.batch import tensors
from ulr_kernels.nn.marks import flat
from ulr_kernels.nn.module_state import Place

_FRESH = {
    torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like,
    Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty, Tensor.detach_,
    *(getattr(Tensor, name).__get__ for name in ("device", "dtype", "is_cuda", "requires_grad")),
}  # fmt: skip
"""Functions by which a model resets a state: they read no value of it, nor a size that a later branch depends on."""


class Readers(TorchFunctionMode):
    """Notes which tensors a forward reads; `read`: their ids."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in _FRESH:
            self.read.update(map(id, flat(args) + flat(kwargs.values())))
        return func(*args, **kwargs)


class CarriedState:
    """The places from which a forward reads what an earlier one has left there.

    The estimator begins each forward with the state before the step. There it must be fresh: a state from an earlier
    forward belongs to that one's samples, and has no rows for copies of others. Some libraries replace a state of
    another size silently, so this does not show in a loss, or only once neurons fire.

    Args:
        model: named in errors.
        places: those that a second forward has read (`estimators/plan.py`).
    """

    def __init__(self, model: nn.Module, places: Iterable[Place] = ()) -> None:
        self._model, self._places = model, list(places)
        self._seen: dict[int, tuple[Any, tuple[int, ...]]] = {}  # number of a place -> its checked value, versions

    def refuse_leftovers(self) -> None:
        """Raise `RuleError` if a place holds rows of an earlier forward.

        Numbers, and tensors whose elements are all equal, are fresh. This waits for the device where a place has a new
        tensor, and looks at none while a CUDA graph is captured, which must not wait.
        """
        found: list[tuple[Place, Tensor]] = []
        for number, place in enumerate(self._places):
            value = place.value
            own = tensors(value)
            versions = tuple(each._version for each in own)
            seen = self._seen.get(number)
            if own and not (seen is not None and seen[0] is value and seen[1] == versions):
                found += [(place, each) for each in own if each.dim() > 1 and each.shape[0] > 1]
            self._seen[number] = value, versions
        if not found or capturing(found[0][1].device):
            return
        differ = [(each.detach() != each.detach().flatten()[:1]).any().to(found[0][1].device) for _, each in found]
        if bool(torch.stack(differ).any()):
            self._seen.clear()
            place, each = next(pair for pair, differs in zip(found, differ, strict=True) if bool(differs))
            refuse_state(f"{list(each.shape)} in {self._name(place)} from an earlier forward")

    def _name(self, place: Place) -> str:
        for path, module in self._model.named_modules():
            own = module.__dict__
            if own is place.holder or any(value is place.holder for value in own.values()):
                return f"{path}.{place.key}" if path else str(place.key)
        return str(place.key)


def refuse_state(got: str) -> None:
    """Raise `RuleError`: a state from an earlier forward reaches into a step."""
    fail(
        "model",
        "begin a step with fresh states: reset them first, before `backward` or at the beginning of the forward "
        "(spikingjelly: functional.reset_net(model); snnTorch: utils.reset(model)); a state to go on from is an input",
        got,
    )
