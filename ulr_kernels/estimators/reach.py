"""Which losses of a sample a row's noise reaches, where samples have many of both: nodes, tokens, time steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ulr_kernels.estimators.settings import fail, of_layer, unknown_names

Given = Tensor | Mapping[str, Tensor] | None  # as a user says it: of all layers, by layer, or that all reach all
Rows = Mapping[str, Sequence[int]]  # layer -> the rows of noise that a sample has in each of its calls


class Reach:
    """Matrices by layer, fp32 `[rows, losses]`, or `[samples, rows, losses]` where each sample has its own.

    Attributes:
        losses: of each sample.
    """

    def __init__(self, matrices: Mapping[str, Tensor]) -> None:
        self._matrices = matrices
        self.losses = next(iter(matrices.values())).shape[-1]

    def part(self, samples: slice | Tensor) -> Reach:
        """For some of the samples."""
        return Reach({name: each[samples] if each.dim() == 3 else each for name, each in self._matrices.items()})

    @property
    def signature(self) -> tuple:
        """What a plan depends on."""
        return tuple((name, each.shape, each.layout) for name, each in self._matrices.items())

    def check(self, rows: Rows) -> None:
        """Raise if a layer's noise has other rows than its matrix, or a matrix is none of theirs."""
        if unknown := unknown_names(self._matrices, set(rows)):
            fail("reach", f"name layers with noise on their outputs ({', '.join(rows)})", ", ".join(unknown))
        for layer, of_calls in rows.items():
            matrix = self.matrix(layer)
            if matrix is not None and matrix.shape[-2] != sum(of_calls):
                fail(
                    "reach",
                    f"have {sum(of_calls)} rows for layer {layer!r}, as a sample has in all its calls (a mapping from "
                    "layer names gives each its own; the noise of a layer without one reaches all losses)",
                    list(matrix.shape),
                )

    def matrix(self, layer: str) -> Tensor | None:
        """Of a layer; None: all its rows reach all losses."""
        return of_layer(self._matrices, layer)

    @staticmethod
    def sums(matrix: Tensor, values: Tensor) -> Tensor:
        """For each row the sum of the values of the losses it reaches: `[copies, samples, losses]` ->
        `[copies, samples, rows]`."""
        values = values.to(matrix.device)
        with torch.autocast(values.device.type, enabled=False):
            if matrix.dim() == 3:
                return torch.einsum("ipq,ciq->cip", matrix, values)
            return (matrix @ values.flatten(0, 1).T).T.unflatten(0, values.shape[:2])  # it may be sparse

    def beyond(self, layer: str, call: int, losses: Sequence[int], samples: int, rows: Rows) -> Tensor:
        """Which rows of a call do not reach losses[c] of copy c: bool `[copies * samples * rows]`."""
        device, matrix = next(iter(self._matrices.values())).device, self.matrix(layer)
        if matrix is None:
            return torch.zeros(len(losses) * samples * rows[layer][call], dtype=torch.bool, device=device)
        one = F.one_hot(torch.tensor(losses, device=device), self.losses).float().unsqueeze(1).expand(-1, samples, -1)
        return (_of_call(self.sums(matrix, one), rows[layer], call) == 0).flatten()


def read_reach(given: Given, samples: int, device: torch.device) -> Reach | None:
    """What a user gives: None, a matrix for all layers, or a mapping from names; raises if it breaks the rules."""
    if given is None:
        return None
    matrices = dict(given) if isinstance(given, Mapping) else {"": given}
    if not matrices:
        fail("reach", "be a matrix or a mapping from layer names to such, or None", "an empty mapping")
    for each in matrices.values():
        if not isinstance(each, Tensor) or each.is_complex():
            got = each.dtype if isinstance(each, Tensor) else type(each).__name__
            fail("reach", "be or hold tensors of bool or real numbers", got)
        if each.dim() != 2 and (each.dim() != 3 or each.shape[0] != samples or each.layout != torch.strided):
            rule = f"be [rows, losses], or dense [{samples}, rows, losses] by sample"
            fail("reach", rule, f"{list(each.shape)}, {each.layout}")
        if each.device != device:
            fail("reach", f"be on the model's device, {device}", each.device)
    if len({each.shape[-1] for each in matrices.values()}) > 1:
        shapes = ", ".join(f"{name!r}: {list(each.shape)}" for name, each in matrices.items())
        fail("reach", "have a column for each loss of a sample, the same for all layers", shapes)
    made = {id(each): _ones(each) for each in matrices.values()}  # layers may share one
    return Reach({name: made[id(each)] for name, each in matrices.items()})


def _ones(matrix: Tensor) -> Tensor:
    """1 where a matrix is not 0: a weight here, as an adjacency may have, would scale the gradient."""
    if matrix.layout == torch.sparse_coo:
        matrix = matrix.coalesce()
    return matrix.detach().to(torch.float32).abs().sign()


class Weights:
    """What each row of noise counts in the gradient.

    With w = (L - baseline) / (number of losses) a row counts the sum of w over the losses that it reaches: the noise is
    independent of all others, which would add nothing but variance (arXiv 2305.08960, Theorem 1, for each term of a
    loss that is a sum).

    Args:
        loss_weight: w, fp32 `[copies, samples]`, or with a reach `[copies, samples, losses]`.
        reach: None: there is one loss for each sample.
        rows: of the layers.
        riders: layer -> the layer whose noise serves it too, and with it that one's reach.
    """

    def __init__(self, loss_weight: Tensor, reach: Reach | None, rows: Rows, riders: Mapping[str, str]) -> None:
        self._each, self._reach, self._rows, self._riders = loss_weight, reach, rows, riders
        self.of_samples = loss_weight if reach is None else loss_weight.sum(-1)
        self._sums: dict[int, Tensor] = {}  # by id(matrix), which many layers may share

    def of(self, layer: str, call: int) -> Tensor:
        """Of a layer's call: fp32 `[copies, samples]`, or `[copies, samples * rows]` where its rows differ."""
        layer = self._riders.get(layer, layer)
        matrix = None if self._reach is None else self._reach.matrix(layer)
        if matrix is None:
            return self.of_samples
        if id(matrix) not in self._sums:
            self._sums[id(matrix)] = Reach.sums(matrix, self._each)
        return _of_call(self._sums[id(matrix)], self._rows[layer], call).flatten(1)


def _of_call(values: Tensor, rows: Sequence[int], call: int) -> Tensor:
    """The part of `[..., rows of all calls]` that is one call's."""
    return values.narrow(-1, sum(rows[:call]), rows[call])
