"""Samples of noisy_conv2d_recompute_."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from samples import Sample, values
from samples.noisy_conv2d_grad_ import samples as gradient_samples


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """The gradient's, with a weight and a bias beside their buffers."""
    for sample in gradient_samples(device, dtype):
        grad_weight, grad_bias, x, *rest = sample.args
        kwargs = {k: v for k, v in sample.kwargs.items() if k != "kernel_size"}
        if sample.id in ("no-kernel", "kernel"):  # which are the weight's here
            continue
        if sample.id in ("bias-only", "no-buffer"):
            shape = (5, 3, 3, 2)
        elif sample.id == "weight-rank":
            shape = (5, 3, 3, 3)
        else:
            shape = grad_weight.shape
        weight = values(21, *shape, device=device, dtype=dtype)
        if sample.id == "channels-last":
            weight = weight.to(memory_format=torch.channels_last)
        features = shape[1] * sample.kwargs.get("groups", 1) if sample.kwargs.get("transposed") else shape[0]
        bias = None if sample.id == "padded" else values(22, features, device=device, dtype=dtype)
        yield Sample(sample.id, (grad_weight, grad_bias, x, weight, bias, *rest), kwargs, sample.error)
