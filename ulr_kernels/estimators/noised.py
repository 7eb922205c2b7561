"""A forward in which some layers are noised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree

from ulr_kernels import ops
from ulr_kernels.estimators.meeting import NOISED, SAMPLE, Meeting
from ulr_kernels.nn.call import Call, Noise
from ulr_kernels.nn.local import RowsCall


class NoisedPass(Meeting):
    """A forward in which some layers are noised.

    Args:
        layers: id(parameter) -> the name of its layer.
        parameters: the model's.
        inputs: the model's input.
        noises: the noise of each noised layer; all with the same number of copies.
        samples: of one copy.
        cut: the model is given one copy, and the first noised call makes the others.
    """

    def __init__(
        self,
        layers: Mapping[int, str],
        parameters: Iterable[Tensor],
        inputs: Any,
        noises: Mapping[str, Noise],
        samples: int,
        *,
        cut: bool,
    ) -> None:
        super().__init__(layers, parameters, inputs)
        self._noises = noises
        self._samples = samples
        self._cut = cut
        self._counts: dict[str, int] = {}
        self.calls: list[tuple[str, Call]] = []

    def met(self, call: Call) -> tuple[Tensor, int]:
        layer = self.trained_layer(call)
        noise = self._noises.get(layer) if layer is not None else None
        if layer is None or noise is None:
            return call.clean(), 0
        count = self._counts.get(layer, 0)
        self._counts[layer] = count + 1
        key = ops.fold_in(noise.key, count) if count else noise.key
        shared = not any(self.marks(x) & NOISED for x in call.inputs)
        if isinstance(call, RowsCall):
            x_copies = call.inputs[0].shape[0] // self._samples
        else:
            x_copies = 1 if shared and self._cut else noise.copies
        self.calls.append((layer, call))
        noise = noise._replace(key=key.to(call.inputs[0].device))
        return call.noised(noise, self._samples, x_copies, shared=shared), NOISED

    def prepare(self, args: tuple, kwargs: dict[str, Any], marks: list[tuple[Tensor, int]]) -> tuple[tuple, dict]:
        """Behind the cut, copies of what was made before it, where it meets noise: a residual branch, a mask."""
        clean = [t for t, bits in marks if bits == SAMPLE and t.dim()] if self._cut else []
        if not clean:
            return args, kwargs
        copies = next(iter(self._noises.values())).copies
        repeated = {id(t): t.repeat(copies, *(1 for _ in t.shape[1:])) for t in clean}
        return _pytree.tree_map(lambda leaf: repeated.get(id(leaf), leaf), (args, kwargs))
