"""Launches of the kernels of noise and of the linear ops."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ulr_kernels.ops._linear import Linear, LinearGradient
from ulr_kernels.ops._op import NoiseSpec
from ulr_kernels.ops.noise import FoldIn, Noise, Philox


def launches() -> dict[str, Callable]:
    """A launch of each kernel in each form that compiles to other code, by name."""
    from sign_probe import sign_probe_launch

    from ulr_kernels.backends.triton import noise
    from ulr_kernels.backends.triton.noisy_linear import noisy_linear_launch
    from ulr_kernels.backends.triton.noisy_linear_grad_ import gradient_launch

    key, sigma, rows, inputs, features, copies = torch.tensor(1), torch.tensor(0.1), 128, 784, 512, 64
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

    def fill(dist: str, sampler: str = "iid"):
        return lambda: noise.noise_launch(
            torch.empty(rows, 512), Noise([rows, 512], NoiseSpec(key, False, dist, sampler))
        )

    def operands(dtype: str, shared: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        shapes = ((copies, rows, features), (rows, inputs) if shared else (copies, rows, inputs))
        shapes += ((features, inputs), (features,))
        return tuple(torch.empty(s, dtype=dtypes[dtype]) for s in shapes)

    def noise_of(kind: str, antithetic: bool) -> NoiseSpec:
        """`kind`: a distribution, or "hadamard"."""
        if kind == "hadamard":
            return NoiseSpec(key, antithetic, "rademacher", "hadamard")
        return NoiseSpec(key, antithetic, kind)

    def forward(dtype: str, kind: str, antithetic: bool = False, shared: bool = True):
        def launch():
            y, *operands_of = operands(dtype, shared)
            return noisy_linear_launch(y, Linear(*operands_of, sigma, copies, noise_of(kind, antithetic)))

        return launch

    def gradient(dtype: str, kind: str, shared: bool = True, recompute: bool = False, log_sigma: bool = False):
        def launch():
            y, x, weight, bias = operands(dtype, shared)
            buffers = (torch.empty(features, inputs), torch.empty(features), torch.empty(()) if log_sigma else None)
            y, weight, bias = (y, weight, bias) if recompute else (None, None, None)
            a = LinearGradient(*buffers, x, torch.empty(copies, rows), sigma, noise_of(kind, True), weight, bias)
            return gradient_launch(y, a)

        return launch

    counter = torch.empty(64, 4, dtype=torch.int64)
    return {
        "philox4x32": lambda: noise.philox4x32_launch(counter, Philox(counter, torch.tensor([1, 2]))),
        "fold_in": lambda: noise.fold_in_launch(counter[:, 0], FoldIn(counter[:, 0], key)),
        "noise-normal": fill("normal"),
        "noise-laplace": fill("laplace"),
        "noise-rademacher": fill("rademacher"),
        "noise-sobol": fill("normal", "sobol"),
        "packed-signs": sign_probe_launch,
        "forward-bf16-normal": forward("bf16", "normal"),
        "forward-bf16-normal-antithetic": forward("bf16", "normal", antithetic=True),
        "forward-bf16-rademacher": forward("bf16", "rademacher"),
        "forward-bf16-hadamard": forward("bf16", "hadamard"),
        "forward-bf16-hadamard-antithetic": forward("bf16", "hadamard", antithetic=True),
        "forward-fp32-normal": forward("fp32", "normal"),
        "forward-fp16-laplace-separate": forward("fp16", "laplace", antithetic=True, shared=False),
        "gradient-bf16-normal": gradient("bf16", "normal"),
        "gradient-bf16-normal-separate": gradient("bf16", "normal", shared=False),
        "gradient-bf16-rademacher": gradient("bf16", "rademacher"),
        "gradient-bf16-hadamard": gradient("bf16", "hadamard"),
        "gradient-fp16-laplace-log-sigma": gradient("fp16", "laplace", log_sigma=True),
        "gradient-fp32-normal": gradient("fp32", "normal"),
        "gradient-fp32-rademacher": gradient("fp32", "rademacher"),
        "recompute-bf16-normal": gradient("bf16", "normal", recompute=True),
        "recompute-bf16-normal-separate": gradient("bf16", "normal", shared=False, recompute=True),
        "recompute-bf16-rademacher": gradient("bf16", "rademacher", recompute=True),
        "recompute-fp32-normal": gradient("fp32", "normal", recompute=True),
    }
