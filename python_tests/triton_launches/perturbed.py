"""Launches of the kernels of ops with weight noise."""

from __future__ import annotations

from collections.abc import Callable

import torch


def launches() -> dict[str, Callable]:
    """A launch of each kernel in each form that compiles to other code, by name."""
    from ulr_kernels.backends.triton.perturbed_linear import perturbed_linear_launch

    members, rows, inputs, features = 4, 128, 768, 512

    def launch(dtype: torch.dtype, dist: str, antithetic: bool = False, rank: int | None = None):
        def made():
            y, x = (torch.empty(members, rows, size, dtype=dtype) for size in (features, inputs))
            weight, bias = torch.empty(features, inputs, dtype=dtype), torch.empty(features, dtype=dtype)
            which = (torch.tensor(0.1), torch.tensor(1), members, antithetic, rank, dist)
            return perturbed_linear_launch(y, x, weight, bias, *which)

        return made

    return {
        "full-bf16-normal": launch(torch.bfloat16, "normal"),
        "full-bf16-normal-pairs": launch(torch.bfloat16, "normal", antithetic=True),
        "full-bf16-rademacher": launch(torch.bfloat16, "rademacher"),
        "full-fp32-normal": launch(torch.float32, "normal"),
        "low-rank-bf16-normal": launch(torch.bfloat16, "normal", rank=1),
    }
