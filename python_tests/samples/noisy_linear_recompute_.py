"""Samples of noisy_linear_recompute_."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from samples import Sample, values
from samples.noisy_linear_grad_ import samples as gradient_samples


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """The gradient's, with a weight and a bias beside their buffers."""
    for sample in gradient_samples(device, dtype):
        grad_weight, grad_bias, x, *rest = sample.args
        features = next((b.shape[0] for b in (grad_weight, grad_bias) if b is not None), 13)
        weight = values(21, features, x.shape[-1], device=device, dtype=dtype)
        bias = None if sample.id == "shared" else values(22, features, device=device, dtype=dtype)
        yield Sample(sample.id, (grad_weight, grad_bias, x, weight, bias, *rest), sample.kwargs, sample.error)
