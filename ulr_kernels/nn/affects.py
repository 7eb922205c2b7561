"""Which losses of a sample the noise of a row can change, where samples have many rows and losses: nodes, tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ulr_kernels.errors import fail
from ulr_kernels.nn.names import unknown_names, value_of_layer

Affects = Tensor | Mapping[str, Tensor] | None  # the user's argument: one for all layers, by layer, or all affect all
NoiseRows = Mapping[str, Sequence[int]]  # layer -> the rows of noise that a sample has in each of its calls


class AffectedLosses:
    """Matrices by layer, fp32 `[rows, losses]`, or `[samples, rows, losses]` where each sample has its own.

    Attributes:
        losses: their number in each sample.
    """

    def __init__(self, matrices: Mapping[str, Tensor]) -> None:
        self._matrices = matrices
        self.losses = next(iter(matrices.values())).shape[-1]

    def part(self, samples: slice | Tensor) -> AffectedLosses:
        """The matrices of some of the samples."""
        return AffectedLosses({name: m[samples] if m.dim() == 3 else m for name, m in self._matrices.items()})

    @property
    def signature(self) -> tuple:
        """Names, shapes and layouts."""
        return tuple((name, matrix.shape, matrix.layout) for name, matrix in self._matrices.items())

    def check(self, rows: NoiseRows) -> None:
        """Raise `RuleError` if a layer's noise has other rows than its matrix, or a name is no layer's."""
        if unknown := unknown_names(self._matrices, set(rows)):
            fail("affects", f"name layers with noise on their outputs ({', '.join(rows)})", ", ".join(unknown))
        for layer, of_calls in rows.items():
            matrix = self.matrix(layer, of_calls)
            if matrix is not None and matrix.shape[-2] != sum(of_calls):
                fail(
                    "affects",
                    f"have {sum(of_calls)} rows for layer {layer!r}, as a sample has in all its calls (a mapping from "
                    "layer names gives each its own; the noise of a layer without one affects all losses)",
                    list(matrix.shape),
                )

    @property
    def device(self) -> torch.device:
        """That of the matrices."""
        return next(iter(self._matrices.values())).device

    def matrix(self, layer: str, rows: Sequence[int]) -> Tensor | None:
        """The matrix of a layer with so many rows of noise in each of its calls; None if all rows affect all losses."""
        return value_of_layer(self._matrices, layer)

    @staticmethod
    def sums(matrix: Tensor, values: Tensor) -> Tensor:
        """For each row the sum of the values of the losses that it affects.

        `values`: `[copies, samples, losses]`. Returns `[copies, samples, rows]`.
        """
        values = values.to(matrix.device)
        with torch.autocast(values.device.type, enabled=False):
            if matrix.dim() == 3:
                return torch.einsum("ipq,ciq->cip", matrix, values)
            return (matrix @ values.flatten(0, 1).T).T.unflatten(0, values.shape[:2])  # the matrix may be sparse

    def unaffecting_rows(self, layer: str, call: int, losses: Sequence[int], samples: int, rows: NoiseRows) -> Tensor:
        """The rows of a call that do not affect losses[c] of copy c: bool `[copies * samples * rows]`."""
        device, matrix = self.device, self.matrix(layer, rows[layer])
        if matrix is None:
            return torch.zeros(len(losses) * samples * rows[layer][call], dtype=torch.bool, device=device)
        one = F.one_hot(torch.tensor(losses, device=device), self.losses).float().unsqueeze(1).expand(-1, samples, -1)
        return (_of_call(self.sums(matrix, one), rows[layer], call) == 0).flatten()


def read_affects(given: Affects, samples: int, device: torch.device) -> AffectedLosses | None:
    """The user's argument, checked: None, a matrix for all layers, or a mapping from names.

    Raises:
        RuleError: a matrix has another type, shape or device than it must have.
    """
    if given is None:
        return None
    matrices = dict(given) if isinstance(given, Mapping) else {"": given}
    if not matrices:
        fail("affects", "be a matrix or a mapping from layer names to such, or None", "an empty mapping")
    for each in matrices.values():
        if not isinstance(each, Tensor) or each.is_complex():
            got = each.dtype if isinstance(each, Tensor) else type(each).__name__
            fail("affects", "be or hold tensors of bool or real numbers", got)
        if each.dim() != 2 and (each.dim() != 3 or each.shape[0] != samples or each.layout != torch.strided):
            rule = f"be [rows, losses], or dense [{samples}, rows, losses] by sample"
            fail("affects", rule, f"{list(each.shape)}, {each.layout}")
        if each.device != device:
            fail("affects", f"be on the model's device, {device}", each.device)
    if len({each.shape[-1] for each in matrices.values()}) > 1:
        shapes = ", ".join(f"{name!r}: {list(each.shape)}" for name, each in matrices.items())
        fail("affects", "have a column for each loss of a sample, the same for all layers", shapes)
    ones = {id(each): _ones(each) for each in matrices.values()}  # layers may share one
    return AffectedLosses({name: ones[id(each)] for name, each in matrices.items()})


def _ones(matrix: Tensor) -> Tensor:
    """1 where a matrix is not 0: other numbers, as an adjacency may have, would scale the gradient."""
    if matrix.layout == torch.sparse_coo:
        matrix = matrix.coalesce()
    return matrix.detach().to(torch.float32).abs().sign()


class RowWeights:
    """The weight of each row of noise in the gradient.

    With w = (L - baseline) / (number of losses) a row's weight is the sum of w over the losses that it affects: the
    noise is independent of all other losses, which would add nothing but variance (arXiv 2305.08960, Theorem 1, for
    each term of a loss that is a sum).

    Args:
        loss_weight: w, fp32 `[copies, samples]`, or with `affects` `[copies, samples, losses]`.
        affects: None: there is one loss for each sample.
        rows: of the layers.
        shared_noise: layer -> the layer whose noise and matrix it has.
    """

    def __init__(
        self, loss_weight: Tensor, affects: AffectedLosses | None, rows: NoiseRows, shared_noise: Mapping[str, str]
    ) -> None:
        self._each, self._affects, self._rows, self._shared_noise = loss_weight, affects, rows, shared_noise
        self.of_samples = loss_weight if affects is None else loss_weight.sum(-1)
        self._sums: dict[int, Tensor] = {}  # by id(matrix), which many layers may share

    def of(self, layer: str, call: int) -> Tensor:
        """The weights of a layer's call: fp32 `[copies, samples]`, or `[copies, samples * rows]` where rows differ."""
        layer = self._shared_noise.get(layer, layer)
        matrix = None if self._affects is None else self._affects.matrix(layer, self._rows[layer])
        if matrix is None:
            return self.of_samples
        if id(matrix) not in self._sums:
            self._sums[id(matrix)] = AffectedLosses.sums(matrix, self._each)
        return _of_call(self._sums[id(matrix)], self._rows[layer], call).flatten(1)


def _of_call(values: Tensor, rows: Sequence[int], call: int) -> Tensor:
    """The part of `[..., rows of all calls]` that belongs to one call."""
    return values.narrow(-1, sum(rows[:call]), rows[call])
