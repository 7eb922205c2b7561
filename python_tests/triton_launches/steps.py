"""Launches of the kernels that take several layers at once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ulr_kernels.ops.foreach_noisy_linear_grad_ import LinearGradients


def launches() -> dict[str, Callable]:
    """A launch of each kernel in each form that compiles to other code, by name."""
    from ulr_kernels.backends.triton.foreach_noisy_linear_grad_ import launches as gradients_launches

    key, sigma, rows, inputs, features, copies = torch.tensor(1), torch.tensor(0.1), 128, 784, 512, 64

    def gradients(dtype: torch.dtype, dist: str, shared: bool = True):
        def launch():
            x = torch.empty((rows, inputs) if shared else (copies, rows, inputs), dtype=dtype)
            layer = (torch.empty(features, inputs), torch.empty(features), x, torch.empty(copies, rows), sigma, key)
            lists = ([tensor] * 2 for tensor in layer)
            return next(iter(gradients_launches(LinearGradients(*lists, True, dist, "iid", [], 0, [], [], []))))

        return launch

    return {
        "gradients-bf16-normal": gradients(torch.bfloat16, "normal"),
        "gradients-bf16-normal-separate": gradients(torch.bfloat16, "normal", shared=False),
        "gradients-bf16-rademacher": gradients(torch.bfloat16, "rademacher"),
        "gradients-fp32-normal": gradients(torch.float32, "normal"),
    }
