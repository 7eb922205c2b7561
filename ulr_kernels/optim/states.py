"""Checks of a state dict before an optimiser takes over any of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ulr_kernels.optim.update import SKIPPED, Rule


class StateCheck:
    """Each check calls `fail(rule, value)`, which raises, where a part of the state breaks its rule."""

    def __init__(self, fail: Callable[[str, object], NoReturn]) -> None:
        self._fail = fail

    def keys(self, part: str, found: Mapping[str, Any], expected: Mapping[str, Any], more: bool = False) -> None:
        """Check the names in a part: all that are expected, and `more` only in groups, to which schedulers add."""
        if not isinstance(found, Mapping):
            self._fail(f"hold a dict as {part!r}", type(found).__name__)
        for name in sorted(expected.keys() - found.keys()):
            self._fail(f"hold {name!r} in {part!r}", ", ".join(found) or "nothing")
        for name in () if more else sorted(found.keys() - expected.keys()):
            self._fail(f"hold only {', '.join(expected)} in {part!r}", repr(name))

    def names(self, found: tuple[tuple[str, ...], ...], expected: tuple[tuple[str, ...], ...]) -> None:
        """Check that the state has the optimiser's parameters in its groups; the error names the first that differs."""

        def places(names: tuple[tuple[str, ...], ...]) -> list[str]:
            return [f"{name!r} in group {group}" for group, here in enumerate(names) for name in here]

        for mine, other in itertools.zip_longest(places(expected), places(found), fillvalue="no more"):
            if mine != other:
                self._fail(f"be of the parameters that this optimiser has, here {mine}", other)

    def tensors(self, found: Any, parameters: Sequence[Tensor], rule: Rule) -> dict[int, Mapping[str, Tensor]]:
        """The state of each parameter: empty before its first step, then all tensors that the rule needs."""
        self.keys("state", found, {}, more=True)
        numbers = {str(number): number for number in range(len(parameters))}  # JSON makes text of them
        for index, values in found.items():
            if str(index) not in numbers:
                self._fail(f"number parameters from 0 to {len(parameters) - 1} in 'state'", repr(index))
            part, shape = f"state[{index}]", parameters[numbers[str(index)]].shape
            counted = values.get(SKIPPED) if isinstance(values, Mapping) else None
            if counted is not None:
                if not isinstance(counted, Tensor) or counted.dtype != torch.float32 or counted.dim():
                    self._fail(f"hold a float32 scalar as {SKIPPED!r} in {part!r}", repr(counted))
                values = {name: value for name, value in values.items() if name != SKIPPED}
            self.keys(part, values, dict.fromkeys(rule.state_names() if values else ()))
            for name, value in values.items():
                if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.shape != shape:
                    got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                    self._fail(f"hold a float32 tensor {list(shape)} as {name!r} in {part!r}", got)
        return {numbers[str(index)]: values for index, values in found.items()}
