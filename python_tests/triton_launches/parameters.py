"""Launches of the kernel of the ops on lists of parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ulr_kernels.ops._parameters import ListNoise


def launches() -> dict[str, Callable]:
    from ulr_kernels.backends.triton import parameters

    keys, scale, coefficients = torch.tensor([1]), torch.tensor(0.1), torch.empty(16)
    step = parameters.Rule(scale, torch.tensor(1), (0.1, 0.0, 0.9, 0.999, 1e-8))

    def list_launch(
        dtype: torch.dtype,
        dist: str,
        amounts: torch.Tensor,
        states: int = 0,
        rank: int | None = None,
        rounded: bool = False,
        sampler: str = "iid",
    ):
        def launch():
            tensors = [torch.empty(512, 512, dtype=dtype)]
            kept = [[torch.empty(512, 512)] for _ in range(states)]
            rule = step if states else parameters.Rule()
            noise = ListNoise(keys, dist, rank, rounded, 0, [], [], sampler)
            return next(iter(parameters.launches(tensors, kept, amounts, rule, noise)))

        return launch

    f32, bf16 = torch.float32, torch.bfloat16
    return {
        "perturb-fp32-normal": list_launch(f32, "normal", scale),
        "perturb-fp32-rademacher": list_launch(f32, "rademacher", scale),
        "perturb-bf16-normal-rounded": list_launch(bf16, "normal", scale, rounded=True),
        "perturb-fp16-laplace-rank": list_launch(torch.float16, "laplace", scale, rank=4),
        "combine-fp32-normal": list_launch(f32, "normal", coefficients),
        "combine-bf16-rademacher": list_launch(bf16, "rademacher", coefficients),
        "combine-bf16-hadamard": list_launch(
            bf16, "rademacher", parameters.walsh_sums(coefficients, 0), sampler="hadamard"
        ),
        "combine-fp32-normal-rank": list_launch(f32, "normal", coefficients, rank=4),
        "combine-bf16-normal-momentum": list_launch(bf16, "normal", coefficients, states=1),
        "combine-fp32-normal-adam": list_launch(f32, "normal", coefficients, states=2),
    }
