"""Launches of the kernels that take several layers, or a whole step, at once."""

from __future__ import annotations

from collections.abc import Callable

import torch


def launches() -> dict[str, Callable]:
    """A launch of each kernel in each form that compiles to other code, by name."""
    from ulr_kernels.backends.triton.noisy_linear_cross_entropy_ import head_launch
    from ulr_kernels.backends.triton.noisy_linear_grads_ import launches as gradients_launches

    key, sigma, rows, inputs, features, copies = torch.tensor(1), torch.tensor(0.1), 128, 784, 512, 64

    def gradients(dtype: torch.dtype, dist: str, shared: bool = True):
        def launch():
            x = torch.empty((rows, inputs) if shared else (copies, rows, inputs), dtype=dtype)
            layer = (torch.empty(features, inputs), torch.empty(features), x, torch.empty(copies, rows), sigma, key)
            which = (True, dist, "iid", [], 0, [], [])
            return next(iter(gradients_launches(*([tensor] * 2 for tensor in layer), *which)))

        return launch

    def head(dtype: torch.dtype, dist: str, baseline: str = "mean", smoothing: float = 0.0):
        def launch():
            losses, x = torch.empty(copies, rows), torch.empty(rows, inputs, dtype=dtype)
            weight, bias = torch.empty(features, inputs, dtype=dtype), torch.empty(features, dtype=dtype)
            tensors = (torch.empty(features, inputs), torch.empty(features), x, torch.arange(rows), weight, bias)
            return head_launch(
                losses, *tensors, sigma, key, copies, True, smoothing, baseline, dist, 0, 0, programs=132
            )

        return launch

    return {
        "gradients-bf16-normal": gradients(torch.bfloat16, "normal"),
        "gradients-bf16-normal-separate": gradients(torch.bfloat16, "normal", shared=False),
        "gradients-bf16-rademacher": gradients(torch.bfloat16, "rademacher"),
        "gradients-fp32-normal": gradients(torch.float32, "normal"),
        "head-bf16-normal": head(torch.bfloat16, "normal"),
        "head-bf16-rademacher": head(torch.bfloat16, "rademacher"),
        "head-fp32-normal-clean": head(torch.float32, "normal", "clean"),
        "head-bf16-normal-smoothed": head(torch.bfloat16, "normal", smoothing=0.1),
    }
