"""Running statistics of batch normalisation: each step moves them towards those of its batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class RunningStatistics:
    """The batch normalisations of a model that are in train mode, and the sums of their inputs in a step.

    torch normalises by the batch's statistics in train mode, and moves the running ones on the way. Here all forwards
    of a step normalise by the running ones as they were before the step, so that samples do not mix. The inputs of one
    forward without noise then move them, by torch's rule: once a step, also for a module that is called several times.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            module
            for module in model.modules()
            if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None
        ]
        self._sums: dict[_BatchNorm, Tensor] = {}  # fp64 `[3, features]`: number of values, sum, sum of squares

    def __bool__(self) -> bool:
        return bool(self._modules)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """The block that runs a forward without noise of each sample."""
        hooks = [module.register_forward_pre_hook(self._add) for module in self._modules]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def sums(self) -> list[Tensor]:
        """Those of all modules, in their order, to be added up over ranks. Zeros: no forward called the module."""
        for module in self._modules:
            if module not in self._sums:
                assert module.running_mean is not None
                self._sums[module] = module.running_mean.new_zeros(3, module.num_features, dtype=torch.float64)
        return [self._sums[module] for module in self._modules]

    def update(self) -> None:
        """Move the running statistics by the sums."""
        for module, (count, total, squares) in zip(self._modules, self.sums(), strict=True):
            assert module.running_mean is not None and module.running_var is not None
            mean, seen = total / count, count[0] > 0
            variance = (squares - total * mean) / (count - 1).clamp_min(1)
            share: float | Tensor = 0.0 if module.momentum is None else module.momentum
            if module.num_batches_tracked is not None:
                module.num_batches_tracked.add_(seen)
                share = 1 / module.num_batches_tracked if module.momentum is None else module.momentum
            for running, new in ((module.running_mean, mean), (module.running_var, variance)):
                running.copy_(torch.where(seen, running + share * (new - running), running))

    def _add(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, _BatchNorm)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            x = args[0]
            over = [axis for axis in range(x.dim()) if axis != 1]
            variance, mean = torch.var_mean(x.float(), over, correction=0)
            count = torch.full_like(mean, x.numel() / x.shape[1], dtype=torch.float64)
            mean = mean.double()
            sums = torch.stack([count, mean * count, (variance.double() + mean.square()) * count])
            self._sums[module] = sums + self._sums.get(module, 0.0)
