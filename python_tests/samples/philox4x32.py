"""Samples of philox4x32."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from samples import Sample
from ulr_kernels import noise_contract


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    words = torch.arange(7 * 3 * 4, device=device).view(7, 3, 4) * 0x12345678 & noise_contract.WORD
    yield Sample("batch", (words, (1, 2)))
    yield Sample("strided", (words[::2, ::2], (noise_contract.WORD, 0)))
    yield Sample("empty", (words[:0], (1, 2)))
    yield Sample("counter-dtype", (words.int(), (1, 2)), error="'counter' must be int64")
    yield Sample("counter-shape", (words[..., :3], (1, 2)), error=r"'counter' must be \[..., 4\]")
    yield Sample("key-range", (words, (1, 2**32)), error=r"'key' must hold integers in \[0, 2\^32\)")
    yield Sample("key-float", (words, (0.5, 1)), error=r"'key' must hold integers in \[0, 2\^32\), got 0.5")
