"""Launches of the kernels of noise_add, noise_dot, noise_score and scale_shift_grad_."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ulr_kernels.ops._op import NoiseSpec
from ulr_kernels.ops.noise_add import NoiseAdd
from ulr_kernels.ops.noise_dot import NoiseDot
from ulr_kernels.ops.noise_score import NoiseScore
from ulr_kernels.ops.scale_shift_grad_ import ScaleShiftGradient


def launches() -> dict[str, Callable]:
    """A launch of each kernel in each form that compiles to other code, by name."""
    from ulr_kernels.backends.triton.noise_add import noise_add_launch
    from ulr_kernels.backends.triton.noise_dot import noise_dot_launch
    from ulr_kernels.backends.triton.noise_score import noise_score_launch
    from ulr_kernels.backends.triton.scale_shift_grad_ import scale_shift_grad_launch

    key, sigma, copies = torch.tensor(1), torch.tensor(0.1), 16
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    shapes = {"tokens": (8, 128, 768), "image": (8, 64, 32, 32)}

    def where(form: str, dtype: str, shared: bool = True) -> tuple[torch.Tensor, int, int]:
        """x, the feature axis, positions."""
        shape = shapes[form] if shared else (copies, *shapes[form])
        return torch.empty(shape, dtype=dtypes[dtype]), (1 if form == "image" else -1), 1024 if form == "image" else 128

    def add(form: str, dtype: str, dist: str, sampler: str = "iid", shared: bool = True):
        def launch():
            x, axis, positions = where(form, dtype, shared)
            y = torch.empty(copies, *shapes[form], dtype=x.dtype)
            noise = NoiseSpec(key, True, dist, sampler, positions)
            return noise_add_launch(y, NoiseAdd(x, sigma, axis, copies, shared, noise))

        return launch

    def score(form: str, dist: str):
        def launch():
            x, axis, positions = where(form, "fp32")
            loss = torch.empty(copies, 8)
            noise = NoiseSpec(key, True, dist, "iid", positions)
            return noise_score_launch(x, NoiseScore(loss, sigma, list(x.shape), axis, noise))

        return launch

    def noise_dot(form: str, dtype: str, dist: str, sampler: str = "iid"):
        def launch():
            x, axis, positions = where(form, dtype)
            out = torch.empty(copies, 8)
            noise = NoiseSpec(key, True, dist, sampler, positions)
            return noise_dot_launch(out, NoiseDot(x, sigma, copies, axis, noise))

        return launch

    def dot(form: str, dtype: str, dist: str, shared: bool = True, log_sigma: bool = False):
        def launch():
            x, axis, positions = where(form, dtype, shared)
            cols = shapes[form][axis]
            buffers = torch.empty(cols), torch.empty(cols), torch.empty(()) if log_sigma else None
            noise = NoiseSpec(key, True, dist, "iid", positions)
            a = ScaleShiftGradient(*buffers, x, torch.empty(copies, 8), sigma, axis, shared, noise)
            return scale_shift_grad_launch(a)

        return launch

    return {
        "add-tokens-bf16-normal": add("tokens", "bf16", "normal"),
        "add-tokens-fp32-rademacher": add("tokens", "fp32", "rademacher"),
        "add-tokens-fp32-rademacher-separate": add("tokens", "fp32", "rademacher", shared=False),
        "add-image-fp32-normal": add("image", "fp32", "normal"),
        "add-image-fp16-laplace-separate": add("image", "fp16", "laplace", shared=False),
        "add-image-bf16-sobol": add("image", "bf16", "normal", sampler="sobol"),
        "score-tokens-normal": score("tokens", "normal"),
        "score-image-normal": score("image", "normal"),
        "score-image-rademacher": score("image", "rademacher"),
        "noise-dot-tokens-bf16-normal": noise_dot("tokens", "bf16", "normal"),
        "noise-dot-image-fp32-normal": noise_dot("image", "fp32", "normal"),
        "noise-dot-image-bf16-sobol": noise_dot("image", "bf16", "normal", sampler="sobol"),
        "noise-dot-image-fp32-rademacher": noise_dot("image", "fp32", "rademacher"),
        "noise-dot-tokens-bf16-hadamard": noise_dot("tokens", "bf16", "rademacher", sampler="hadamard"),
        "dot-tokens-bf16-normal": dot("tokens", "bf16", "normal"),
        "dot-tokens-fp32-rademacher": dot("tokens", "fp32", "rademacher"),
        "dot-image-fp32-normal": dot("image", "fp32", "normal"),
        "dot-image-fp16-laplace-log-sigma": dot("image", "fp16", "laplace", log_sigma=True),
        "dot-image-bf16-normal-separate": dot("image", "bf16", "normal", shared=False),
    }
