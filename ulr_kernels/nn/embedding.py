"""Embedding: a table of parameters, read at the samples' indices."""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ulr_kernels.errors import RuleError
from ulr_kernels.nn.call import Call, ParametersOf, gradient_buffers

_BAG = inspect.signature(F.embedding_bag)


def refuse_scaling(table: Tensor) -> None:
    """Raise `RuleError`: a trained table has `scale_grad_by_freq`."""
    raise RuleError(
        "ulr.ULR: an embedding must have scale_grad_by_freq=False (a gradient so scaled is no gradient of the "
        f"loss, and depends on who shares the batch), got True for a table {list(table.shape)}"
    )


class EmbeddingCall(Call):
    """v = table[indices], with indices `[samples, ...]`."""

    def __init__(self, indices: Tensor, table: Tensor, padding: int | None, parameters_of: ParametersOf) -> None:
        """`padding`: the index whose entry gets no gradient."""
        self._table, self._padding = table, padding
        self._derived = parameters_of(table)
        super().__init__((indices,), (self._derived,))

    def forward(self, *inputs: Tensor) -> Tensor:
        return F.embedding(inputs[0], self._table, self._padding)

    def add_gradient(self, loss_weight: Tensor, draw: int, log_sigma: Tensor | None) -> None:
        with gradient_buffers(self._derived) as (table,):
            for score, indices in self._scores(loss_weight, draw, log_sigma):
                if self._padding is not None:
                    score = score.masked_fill_((indices == self._padding).unsqueeze(-1), 0)
                if table is not None:
                    table.index_add_(0, indices.flatten(), score.flatten(0, -2).to(table.dtype))


def _embedding(args: tuple, kwargs: dict[str, Any], parameters_of: ParametersOf) -> EmbeddingCall | None:
    def call(
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> EmbeddingCall | None:
        derived = parameters_of(weight)
        if scale_grad_by_freq and derived is not None and derived.tensor.requires_grad:
            refuse_scaling(weight)
        if max_norm is not None or derived is None:
            return None
        padding = None if padding_idx is None else padding_idx % weight.shape[0]
        return EmbeddingCall(input, weight, padding, parameters_of)

    return call(*args, **kwargs)


def _embedding_bag(args: tuple, kwargs: dict[str, Any], parameters_of: ParametersOf) -> None:
    given = _BAG.bind(*args, **kwargs).arguments
    for table in (given["input"], given["weight"]):  # the order of older versions is the other one
        derived = parameters_of(table)
        if given.get("scale_grad_by_freq") and derived is not None and derived.tensor.requires_grad:
            refuse_scaling(table)


READERS = {F.embedding: _embedding, F.embedding_bag: _embedding_bag}
