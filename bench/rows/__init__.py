"""The rows of the benchmark: what is timed, on which inputs, beside which rivals, and the floor of the work.

A row is made for a device and a size, so that the CPU's rows (`cpu_rows`) and the GPU's (`gpu_rows`) share every line.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch

from bench.rows.conv import conv_gradient_row, conv_recompute_row, conv_row
from bench.rows.elementwise import add_row, dot_row, noise_dot_row
from bench.rows.grouped import grouped_row
from bench.rows.linear import gradient_row, linear_row, recompute_row
from bench.rows.mezo import installed, mezo_row
from bench.rows.noise import noise_row, randn_row
from bench.rows.parameters import combine_row, language_model, perturb_row
from bench.rows.perturbed import perturbed_conv_row, perturbed_embedding_row, perturbed_row
from bench.rows.population import eggroll_row, full_rank_row
from bench.rows.row import Contestant, Row, kind_of
from bench.rows.step import step_row, vgg_row

# Inputs and features of the layers of MiniLM and of SmolLM2.
PERTURBED_SHAPES = ((384, 384), (384, 1536), (1536, 384), (576, 576), (576, 1536), (1536, 576))

__all__ = ["GPU_TABLE", "Contestant", "Row", "cpu_rows", "gpu_rows"]

# The GPU's rows that README's table is made of: what a few minutes of a device are spent on first.
GPU_TABLE = (
    "normal",
    "rademacher",
    "linear-bf16-4096",
    "linear-copies-bf16",
    "gradient-bf16",
    "step-small",
    "perturbed-normal-bf16",
    "conv-gradient-bf16",
    "perturb-normal",
)


def cpu_rows() -> dict[str, Callable[[], Row]]:
    """Makers of the CPU's rows by name: a row is made when its turn comes, and dropped afterwards."""
    f32, bf16 = torch.float32, torch.bfloat16
    makers: dict[str, Callable[[], Row]] = {
        "normal": lambda: noise_row("normal", 2**20, threads=1),
        "laplace": lambda: noise_row("laplace", 2**20, threads=1),
        "rademacher": lambda: noise_row("rademacher", 2**20, threads=1),
        "randn": lambda: randn_row(2**20, threads=1),
        "linear-fp32": lambda: linear_row(1024, 1024, 1024, 1, f32),
        "linear-bf16": lambda: linear_row(1024, 1024, 1024, 1, bf16),
        "linear-fp32-1-thread": lambda: linear_row(1024, 1024, 1024, 1, f32, threads=1),
        "linear-bf16-1-thread": lambda: linear_row(1024, 1024, 1024, 1, bf16, threads=1),
        "linear-copies": lambda: linear_row(128, 784, 512, 64, f32),
        "gradient": lambda: gradient_row(128, 784, 512, 64, f32),
        "recompute": lambda: recompute_row(128, 784, 512, 64, f32),
        "add-tokens": lambda: add_row((32, 64, 768), -1, 16, f32),
        "add-image": lambda: add_row((32, 32, 32, 32), 1, 16, f32),
        "dot-tokens": lambda: dot_row((32, 64, 768), -1, 64, f32),
        "dot-image": lambda: dot_row((32, 32, 32, 32), 1, 64, f32),
        "conv": lambda: conv_row((32, 32, 16, 32), 32, f32),
        "conv-nchw": lambda: conv_row((32, 32, 16, 32), 32, f32, last=False),
        "conv-bf16": lambda: conv_row((32, 32, 16, 32), 32, bf16),
        "conv-resnet": lambda: conv_row((8, 64, 56, 64), 1, f32),
        "conv-gradient": lambda: conv_gradient_row((32, 32, 16, 32), 64, f32),
        "conv-gradient-bf16": lambda: conv_gradient_row((32, 32, 16, 32), 64, bf16),
        "conv-recompute": lambda: conv_recompute_row((32, 32, 16, 32), 32, f32),
        "step": lambda: step_row(100, 64),
        "vgg": lambda: vgg_row(25, autocast=False),
        "vgg-bf16": lambda: vgg_row(25, autocast=True),
        "perturb-normal": lambda: perturb_row("normal"),
        "perturb-rademacher": lambda: perturb_row("rademacher"),
        "combine-16": lambda: combine_row(16),
    }
    for inputs, features in PERTURBED_SHAPES:
        for dist in ("normal", "rademacher"):
            makers[f"perturbed-{dist}-{inputs}x{features}"] = functools.partial(
                perturbed_row, 1024, inputs, features, dist
            )
    makers["perturbed-few-rows"] = lambda: perturbed_row(4, 576, 1536)
    for dist in ("normal", "rademacher"):
        makers[f"perturbed-conv-{dist}"] = functools.partial(perturbed_conv_row, (8, 64, 28, 128), dist)
        makers[f"perturbed-embedding-{dist}"] = functools.partial(perturbed_embedding_row, 1024, (30522, 384), dist)
    makers["eggroll"] = lambda: eggroll_row(1024, 256, 1, 16)
    makers["population"] = lambda: full_rank_row(256, 64, 16)
    for model in installed():
        makers[f"mezo-{model}-gaussian"] = functools.partial(mezo_row, model, "normal")
        makers[f"mezo-{model}-signs"] = functools.partial(mezo_row, model, "rademacher")
    if len(os.sched_getaffinity(0)) > 1:
        makers["normal-2-threads"] = lambda: noise_row("normal", 2**22, threads=2, in_cache=True)
    return makers


def gpu_rows(names: tuple[str, ...], small: bool = False, device: str = "cuda") -> dict[str, Callable[[], Row]]:
    """Makers of the GPU's rows, for the back ends named, those that a limit of time must not cut off first; `small`
    sizes check the script where there is no GPU."""
    f32, bf16 = torch.float32, torch.bfloat16
    size, wide, rows, copies = (2**14, 64, 32, 4) if small else (2**27, 4096, 1024, 64)
    makers: dict[str, Callable[[], Row]] = {
        dist: functools.partial(noise_row, dist, size, device, names=names)
        for dist in ("normal", "laplace", "rademacher")
    }
    makers["randn"] = lambda: randn_row(size, device, names=names)
    makers["step"] = lambda: step_row(100, copies, device, names=names, plain=True)
    makers["step-small"] = lambda: step_row(128, 4 if small else 32, device, names=names, plain=True)
    for dtype in (bf16, f32):
        kind = kind_of(dtype)
        for inputs in (64, wide // 4, wide):
            makers[f"linear-{kind}-{inputs}"] = functools.partial(
                linear_row, 2 * wide, inputs, wide, 1, dtype, device, names=names
            )
        for prefix, function in (
            ("linear-copies", linear_row),
            ("gradient", gradient_row),
            ("recompute", recompute_row),
        ):
            makers[f"{prefix}-{kind}"] = functools.partial(
                function, rows, wide // 4, wide // 2, copies, dtype, device, names=names
            )
        for dist in ("normal", "rademacher"):
            makers[f"perturbed-{dist}-{kind}"] = functools.partial(
                perturbed_row, rows, wide, wide, dist, dtype, device, names=names
            )
            makers[f"perturbed-conv-{dist}-{kind}"] = functools.partial(
                perturbed_conv_row, (4, 16, 8, 16) if small else (64, 128, 32, 128), dist, dtype, device, names
            )
            makers[f"perturbed-embedding-{dist}-{kind}"] = functools.partial(
                perturbed_embedding_row, rows, (8 * wide, wide // 4), dist, dtype, device, names
            )
    tokens, image = (rows // 8, 16, wide // 4), (rows // 8, wide // 64, 16, 16)
    for name, row in (("add", add_row), ("noise-dot", noise_dot_row), ("dot", dot_row)):
        makers[f"{name}-tokens"] = functools.partial(row, tokens, -1, copies, bf16, device, names)
        makers[f"{name}-image"] = functools.partial(row, image, 1, copies, bf16, device, names)
    makers["gradients-grouped"] = lambda: grouped_row(8, wide // 16, 128, copies, bf16, device, names)
    makers["eggroll"] = lambda: eggroll_row(wide // 4, 4 * copies, 1, 16, device, names)
    convolutions = {"conv": conv_row, "conv-gradient": conv_gradient_row, "conv-recompute": conv_recompute_row}
    sizes = (4, 16, 8, 16) if small else (64, 128, 32, 128)
    for prefix, convolution in convolutions.items():
        for dtype in (bf16, f32):
            makers[f"{prefix}-{kind_of(dtype)}"] = functools.partial(convolution, sizes, copies, dtype, device, names)
    shapes = language_model(1, 64, 128, 64, 256) if small else language_model(30, 576, 1536, 192, 49152)
    for dist in ("normal", "rademacher"):
        makers[f"perturb-{dist}"] = functools.partial(perturb_row, dist, shapes, device, names)
    makers["combine-16"] = lambda: combine_row(16, shapes, device, names)
    return makers
