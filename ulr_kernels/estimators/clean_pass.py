"""The forward without noise of a step with guides or supports, which looks at the functions that read the outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ulr_kernels.estimators.view import ModelView
from ulr_kernels.nn.call import Call
from ulr_kernels.nn.gates import Gate, Gates
from ulr_kernels.nn.interceptor import LayerInterceptor

Site = tuple[str, int]  # a layer and the number of its call
Rows = slice | Tensor  # the places of samples in the whole batch
OPEN = Gate(None, None)


def of_rows(tensor: Tensor, rows: Rows) -> Tensor:
    """The rows of some samples, wherever their places are held."""
    return tensor[rows if isinstance(rows, slice) else rows.to(tensor.device)]


class CleanPass(NamedTuple):
    """The result of a forward without noise."""

    losses: Tensor  # fp32 `[samples]`
    features: Tensor | None  # of the samples' errors, fp32 `[samples, features]`, for guides
    gates: Mapping[Site, Gate]  # of each noised call's output

    @staticmethod
    def joined(parts: Sequence[CleanPass]) -> CleanPass:
        """Those of parts of the samples as one."""
        if len(parts) == 1:
            return parts[0]

        def together(tensors: Sequence[Tensor | None]) -> Tensor | None:
            return None if any(t is None for t in tensors) else torch.cat([t for t in tensors if t is not None])

        losses, features, gates = zip(*parts, strict=True)
        of_sites = {
            site: Gate(*map(together, zip(*(each.get(site, OPEN) for each in gates), strict=True))) for site in gates[0]
        }
        return CleanPass(torch.cat(losses), together(features), of_sites)

    def gate(self, site: Site, rows: Rows) -> Gate:
        """The gate of a call's output for some samples, `[samples, elements of one]`."""
        samples = len(self.losses)

        def part(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None or tensor.numel() % samples else of_rows(tensor.reshape(samples, -1), rows)

        return Gate(*map(part, self.gates.get(site, OPEN)))


class CleanForward(LayerInterceptor):
    """A forward without noise that finds the gates of the layers' outputs.

    Args:
        view: of the model.
        inputs: the model's input.
        sigma: the largest scale of a layer's noise, a number or `[]`.
        with_support: find the supports too.
    """

    def __init__(
        self, view: ModelView, inputs: Any, sigma: Callable[[str], float | Tensor], with_support: bool
    ) -> None:
        super().__init__(view.layers, view.followed, inputs)
        self._numbers: dict[str, int] = {}
        self._sigma = sigma
        self._gates = Gates(with_support)

    def on_layer_call(self, call: Call) -> tuple[Tensor, int]:
        with torch.no_grad():
            output = call.clean()
        self._gates.follow_call(call, output)
        layer = self.trained_layer(call)
        if layer is not None:
            number = self._numbers.get(layer, 0)
            self._numbers[layer] = number + 1
            self._gates.begin((layer, number), output, self._sigma(layer))
        return output, 0

    def after_call(self, func: Callable, args: tuple, kwargs: dict[str, Any], marks: list, result: Any) -> None:
        self._gates.follow(func, args, kwargs, result)

    def gates(self) -> dict[Site, Gate]:
        """The gate of each call. The model has returned, and its output is still held."""
        return self._gates.found()
