"""Launches of the kernels of noise_add, noise_score and noise_dot_."""

from __future__ import annotations

from collections.abc import Callable

import torch


def launches() -> dict[str, Callable]:
    """A launch of each kernel in each form that compiles to other code, by name."""
    from ulr_kernels.backends.triton.noise_add import noise_add_launch
    from ulr_kernels.backends.triton.noise_dot_ import noise_dot_launch
    from ulr_kernels.backends.triton.noise_score import noise_score_launch

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
            return noise_add_launch(y, x, sigma, key, axis, copies, shared, True, dist, sampler, positions, 0, 0, 0)

        return launch

    def score(form: str, dist: str):
        def launch():
            x, axis, positions = where(form, "fp32")
            loss = torch.empty(copies, 8)
            return noise_score_launch(x, loss, sigma, key, list(x.shape), axis, True, dist, "iid", positions, 0, 0, 0)

        return launch

    def dot(form: str, dtype: str, dist: str, shared: bool = True, log_sigma: bool = False):
        def launch():
            x, axis, positions = where(form, dtype, shared)
            cols = shapes[form][axis]
            buffers = torch.empty(cols), torch.empty(cols), torch.empty(()) if log_sigma else None
            return noise_dot_launch(
                *buffers, x, torch.empty(copies, 8), sigma, key, axis, shared, True, dist, "iid", positions, 0, 0, 0
            )

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
        "dot-tokens-bf16-normal": dot("tokens", "bf16", "normal"),
        "dot-tokens-fp32-rademacher": dot("tokens", "fp32", "rademacher"),
        "dot-image-fp32-normal": dot("image", "fp32", "normal"),
        "dot-image-fp16-laplace-log-sigma": dot("image", "fp16", "laplace", log_sigma=True),
        "dot-image-bf16-normal-separate": dot("image", "bf16", "normal", shared=False),
    }
