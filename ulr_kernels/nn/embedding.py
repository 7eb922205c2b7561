"""Embedding: a table of parameters, read at the samples' indices."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ulr_kernels.nn.call import Call, Origin, gradient_buffers


class EmbeddingCall(Call):
    """v = table[indices], with indices `[samples, ...]`."""

    def __init__(self, indices: Tensor, table: Tensor, padding: int | None, origin: Origin) -> None:
        """`padding`: the index whose entry gets no gradient."""
        self._table, self._padding = table, padding
        self._owned = origin(table)
        super().__init__((indices,), (self._owned,))

    def forward(self, *inputs: Tensor) -> Tensor:
        return F.embedding(inputs[0], self._table, self._padding)

    def add_gradient(self, loss_weight: Tensor, draw: int, log_sigma: Tensor | None) -> None:
        with gradient_buffers(self._owned) as (table,):
            for score, indices in self._scores(loss_weight, draw, log_sigma):
                if self._padding is not None:
                    score = score.masked_fill_((indices == self._padding).unsqueeze(-1), 0)
                if table is not None:
                    table.index_add_(0, indices.flatten(), score.flatten(0, -2).to(table.dtype))


def _embedding(args: tuple, kwargs: dict[str, Any], origin: Origin) -> EmbeddingCall | None:
    def call(
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> EmbeddingCall | None:
        owned = origin(weight)
        if scale_grad_by_freq and owned is not None and owned.tensor.requires_grad:
            raise ValueError(
                "ulr.ULR: an embedding must have scale_grad_by_freq=False (a gradient so scaled is no gradient of the "
                f"loss, and depends on who shares the batch), got True for a table {list(weight.shape)}"
            )
        if max_norm is not None or owned is None:
            return None
        padding = None if padding_idx is None else padding_idx % weight.shape[0]
        return EmbeddingCall(input, weight, padding, origin)

    return call(*args, **kwargs)


READERS = {F.embedding: _embedding}
