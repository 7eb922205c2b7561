"""The keys of a step's noise, made on the model's device from the step that is counted there."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from ulr_kernels import noise_contract, ops
from ulr_kernels.errors import fail


class StepKeys:
    """A seed and the number of the next step.

    The step is a tensor on the device of the keys: a CUDA graph of a training step advances it, and its keys with it.

    Attributes:
        seed: integer in [-2^63, 2^64).
    """

    def __init__(self, seed: int) -> None:
        self.seed = check_seed(seed)
        with torch.inference_mode(False):  # a tensor that may be written to later
            self._step = torch.zeros((), dtype=torch.int64)

    @property
    def step(self) -> int:
        """The number of the next step, from 0. Reading it synchronises."""
        return int(self._step)

    @step.setter
    def step(self, value: int) -> None:
        self._step.fill_(check_step(value))

    def advance(self) -> None:
        """Go on to the next step."""
        self._step.add_(1)

    def of_sites(self, names: tuple[str, ...], sites: Tensor) -> dict[str, Tensor]:
        """The keys of this step, int64 `[]` by name; `sites`: int64 `[names]`, their site numbers on the device."""
        if self._step.device != sites.device:  # the model has been moved
            self._step = self._step.to(sites.device)
        seed = torch.full((), noise_contract.signed64(self.seed), dtype=torch.int64, device=sites.device)
        return dict(zip(names, ops.fold_in(ops.fold_in(seed, self._step), sites).unbind(), strict=True))


def check_seed(seed: int) -> int:
    """The seed. Raises `RuleError` unless it is an integer in [-2^63, 2^64)."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not -(2**63) <= seed < 2**64:
        fail("seed", "be an integer in [-2^63, 2^64)", repr(seed))
    return int(seed)


def check_step(step: int) -> int:
    """The step. Raises `RuleError` unless it is an integer in [0, 2^63)."""
    if isinstance(step, bool) or not isinstance(step, Integral) or not 0 <= step < 2**63:
        fail("step", "be an integer in [0, 2^63)", repr(step))
    return int(step)
