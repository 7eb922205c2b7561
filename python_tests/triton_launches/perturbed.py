"""Launches of the kernels of ops with weight noise."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ulr_kernels.ops._conv import Window
from ulr_kernels.ops._op import NoiseSpec
from ulr_kernels.ops._perturbed import WeightNoise
from ulr_kernels.ops.perturbed_conv2d import PerturbedConv
from ulr_kernels.ops.perturbed_embedding import PerturbedEmbedding
from ulr_kernels.ops.perturbed_linear import PerturbedLinear


def launches() -> dict[str, Callable]:
    """A launch of each kernel in each form that compiles to other code, by name."""
    from ulr_kernels.backends.triton.perturbed_conv2d import perturbed_conv2d_launch
    from ulr_kernels.backends.triton.perturbed_embedding import perturbed_embedding_launch
    from ulr_kernels.backends.triton.perturbed_linear import perturbed_linear_launch

    sigma, key, copies, bf16 = torch.tensor(0.1), torch.tensor(1), 4, torch.bfloat16

    def which(kind: str, antithetic: bool, rank: int | None) -> WeightNoise:
        """`kind`: a distribution, or "hadamard"."""
        dist, sampler = ("rademacher", "hadamard") if kind == "hadamard" else (kind, "iid")
        return WeightNoise(NoiseSpec(key, antithetic, dist, sampler), copies, rank)

    def linear(dtype: torch.dtype, dist: str, antithetic: bool = False, rank: int | None = None):
        def made():
            y, x = (torch.empty(copies, 128, size, dtype=dtype) for size in (512, 768))
            weight, bias = torch.empty(512, 768, dtype=dtype), torch.empty(512, dtype=dtype)
            return perturbed_linear_launch(y, PerturbedLinear(x, weight, bias, sigma, which(dist, antithetic, rank)))

        return made

    def conv(dtype: torch.dtype, dist: str, antithetic: bool = False, rank: int | None = None, groups: int = 1):
        def made():
            images = torch.empty(copies, 32, 128, 16, 16, dtype=dtype)
            weight, bias = torch.empty(128, 128 // groups, 3, 3, dtype=dtype), torch.empty(128, dtype=dtype)
            window = Window((1, 1), (1,) * 4, (1, 1), groups)
            a = PerturbedConv(images, weight, bias, sigma, window, which(dist, antithetic, rank))
            return perturbed_conv2d_launch(images.clone(), a)

        return made

    def embedding(dtype: torch.dtype, dist: str, antithetic: bool = False, rank: int | None = None):
        def made():
            y, weight = torch.empty(copies, 512, 768, dtype=dtype), torch.empty(30000, 768, dtype=dtype)
            indices = torch.zeros(512, dtype=torch.int64)
            return perturbed_embedding_launch(
                y, PerturbedEmbedding(indices, weight, sigma, which(dist, antithetic, rank))
            )

        return made

    return {
        "full-bf16-normal": linear(bf16, "normal"),
        "full-bf16-normal-pairs": linear(bf16, "normal", antithetic=True),
        "full-bf16-rademacher": linear(bf16, "rademacher"),
        "full-bf16-hadamard": linear(bf16, "hadamard"),
        "full-fp32-normal": linear(torch.float32, "normal"),
        "full-fp32-normal-pairs": linear(torch.float32, "normal", antithetic=True),
        "full-fp32-rademacher-pairs": linear(torch.float32, "rademacher", antithetic=True),
        "low-rank-bf16-normal": linear(bf16, "normal", rank=1),
        "low-rank-fp32-rademacher": linear(torch.float32, "rademacher", rank=1),
        "conv-bf16-normal": conv(bf16, "normal"),
        "conv-bf16-normal-pairs": conv(bf16, "normal", antithetic=True),
        "conv-bf16-rademacher-pairs": conv(bf16, "rademacher", antithetic=True),
        "conv-fp32-normal-pairs": conv(torch.float32, "normal", antithetic=True),
        "conv-fp32-rademacher": conv(torch.float32, "rademacher"),
        "conv-bf16-hadamard-pairs": conv(bf16, "hadamard", antithetic=True),
        "conv-bf16-laplace-depthwise": conv(bf16, "laplace", groups=128),
        "conv-bf16-normal-low-rank": conv(bf16, "normal", rank=2),
        "embedding-bf16-normal": embedding(bf16, "normal"),
        "embedding-bf16-rademacher-pairs": embedding(bf16, "rademacher", antithetic=True),
        "embedding-fp32-normal-low-rank": embedding(torch.float32, "normal", rank=2),
    }
