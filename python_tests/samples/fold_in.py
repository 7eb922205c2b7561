"""Samples of fold_in."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from samples import Sample


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    keys = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)], device=device)
    yield Sample("scalar", (keys[1], 5))
    yield Sample("unsigned", (keys[1], 2**64 - 1))
    yield Sample("table", (keys[:, None], keys[None, :]))
    yield Sample("empty", (keys[:0], 5))
    yield Sample("axes", (keys[:, None, None, None], torch.arange(12, device=device).view(1, 3, 1, 4)))
    yield Sample("dtype", (keys.int(), 5), error="'key' must be int64")
    yield Sample("broadcast", (keys, keys[:2]), error="'data' must broadcast")
