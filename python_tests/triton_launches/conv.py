"""Launches of the kernels of the convolutions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ulr_kernels.ops._conv import Conv, ConvGradient, Window
from ulr_kernels.ops._op import NoiseSpec


def launches() -> dict[str, Callable]:
    """A launch of each kernel in each form that compiles to other code, by name."""
    from ulr_kernels.backends.triton.noisy_conv2d import noisy_conv2d_launch
    from ulr_kernels.backends.triton.noisy_conv2d_grad_ import conv_gradient_launch

    key, sigma, images, inputs, features, copies = torch.tensor(1), torch.tensor(0.1), 32, 64, 128, 64
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    window = Window((1, 1), (1, 1, 1, 1), (1, 1), 1)

    def operands(dtype: str, shared: bool, side: int = 16) -> tuple[torch.Tensor, ...]:
        x = (images, inputs, side, side) if shared else (copies, images, inputs, side, side)
        shapes = ((copies, images, features, side, side), x, (features, inputs, 3, 3), (features,))
        return tuple(torch.empty(s, dtype=dtypes[dtype]) for s in shapes)

    def forward(dtype: str, dist: str, antithetic: bool = False, shared: bool = True, form: str = ""):
        def launch():
            side = 14 if form == "14" else 16
            y, x, weight, bias = operands(dtype, shared, side)
            transposed = form == "transposed"
            weight = weight.transpose(0, 1) if transposed else weight
            if form == "channels-last":
                x, weight = (t.to(memory_format=torch.channels_last) for t in (x, weight))
                y = y.movedim(2, -1).contiguous().movedim(-1, 2)
            noise = NoiseSpec(key, antithetic, dist, "iid", side**2)
            own = window._replace(transposed=transposed)
            return noisy_conv2d_launch(y, Conv(x, weight, bias, sigma, own, copies, noise))

        return launch

    def gradient(dtype: str, dist: str, shared: bool = True, recompute: bool = False, log_sigma: bool = False):
        def launch():
            y, x, weight, bias = operands(dtype, shared)
            log = torch.empty(()) if log_sigma else None
            buffers = (torch.empty(weight.shape), torch.empty(features), log)
            y, weight, bias = (y, weight, bias) if recompute else (None, None, None)
            of_images, noise = torch.empty(copies, images), NoiseSpec(key, True, dist, "iid", 256)
            a = ConvGradient(*buffers, x, of_images, sigma, window, noise, weight, bias, [3, 3])
            return conv_gradient_launch(y, a)

        return launch

    return {
        "forward-bf16-normal": forward("bf16", "normal"),
        "forward-bf16-rademacher-antithetic": forward("bf16", "rademacher", antithetic=True),
        "forward-fp32-normal": forward("fp32", "normal"),
        "forward-fp16-laplace-separate": forward("fp16", "laplace", antithetic=True, shared=False),
        "forward-bf16-normal-transposed": forward("bf16", "normal", form="transposed"),
        "forward-bf16-normal-channels-last": forward("bf16", "normal", form="channels-last"),
        "forward-bf16-normal-14x14": forward("bf16", "normal", form="14"),
        "gradient-bf16-normal": gradient("bf16", "normal"),
        "gradient-bf16-normal-separate": gradient("bf16", "normal", shared=False),
        "gradient-bf16-rademacher": gradient("bf16", "rademacher"),
        "gradient-fp16-laplace-log-sigma": gradient("fp16", "laplace", log_sigma=True),
        "gradient-fp32-normal": gradient("fp32", "normal"),
        "gradient-fp32-rademacher": gradient("fp32", "rademacher"),
        "recompute-bf16-normal": gradient("bf16", "normal", recompute=True),
        "recompute-bf16-normal-separate": gradient("bf16", "normal", shared=False, recompute=True),
        "recompute-bf16-rademacher": gradient("bf16", "rademacher", recompute=True),
        "recompute-fp32-normal": gradient("fp32", "normal", recompute=True),
    }
