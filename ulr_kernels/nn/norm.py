"""Normalisation layers: v = gain * normalised(x) + shift, batch normalisation by its running statistics."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ulr_kernels import ops
from ulr_kernels.nn.call import Call, ParametersOf, gradient_buffers


class NormCall(Call):
    """One call of a normalisation with a gain and a shift for each feature."""

    def __init__(
        self,
        x: Tensor,
        normalise: Callable[..., Tensor],
        gain: Tensor | None,
        shift: Tensor | None,
        parameters_of: ParametersOf,
        feature_dim: int,
        elementwise: bool,
    ) -> None:
        """`normalise(x, gain, shift)` -> the output; gain, shift: `[features]`, or None.

        `elementwise`: each element is normalised by constants, as by running statistics.
        """
        self.elementwise = elementwise
        self._normalise, self._w, self._b = normalise, gain, shift
        self._gain, self._shift = parameters_of(gain), parameters_of(shift)
        self.feature_dim = feature_dim
        super().__init__((x,), (self._gain, self._shift))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._normalise(*inputs, self._w, self._b)

    def add_gradient(self, loss_weight: Tensor, draw: int, log_sigma: Tensor | None) -> None:
        with self._as_called():
            normalised = self._normalise(*self._operands, None, None)
        if not self._shared:
            normalised = normalised.unflatten(0, (self.noise.copies, -1))
        spec = self._gradient_spec(self._spec(self._positions, loss_weight), draw, loss_weight, log_sigma)
        with gradient_buffers(self._gain, self._shift) as (gain, shift):
            ops.scale_shift_grad_(gain, shift, normalised, feature_dim=self.feature_dim, shared=self._shared, **spec)


def _reader(func: Callable[..., Tensor], feature_dim: int) -> Callable:
    signature = inspect.signature(func)

    def read(args: tuple, kwargs: dict[str, Any], parameters_of: ParametersOf) -> NormCall | None:
        given = signature.bind(*args, **kwargs).arguments
        x, gain, shift = given.pop("input"), given.pop("weight", None), given.pop("bias", None)
        if any(t is not None and t.dim() != 1 for t in (gain, shift)):  # several axes normalised at once
            return None

        def normalise(x: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
            return func(x, weight=gain, **({"bias": shift} if "bias" in signature.parameters else {}), **given)

        elementwise = func is F.batch_norm and not given.get("training", False)
        return NormCall(x, normalise, gain, shift, parameters_of, feature_dim, elementwise)

    return read


READERS = {
    F.layer_norm: _reader(F.layer_norm, -1),
    F.rms_norm: _reader(F.rms_norm, -1),
    F.batch_norm: _reader(F.batch_norm, 1),
    F.group_norm: _reader(F.group_norm, 1),
    F.instance_norm: _reader(F.instance_norm, 1),
}
