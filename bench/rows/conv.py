"""The ops of a convolution: forward, gradient, recompute, with kernels of 3 x 3 and padding 1."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import ulr_kernels as ulr
from bench import rivals
from bench.rows.row import SIGMA, Contestant, Row, compiled, key_of, kind_of, normal, ours, shaped
from ulr_kernels.ops._op import OPS

Sizes = tuple[int, int, int, int]  # images, input channels, height and width, output channels
WINDOW = ([1, 1], [1, 1, 1, 1], [1, 1], 1, False)


def text_of(sizes: Sizes, copies: int, last: bool) -> str:
    images, inputs, side, features = sizes
    text = f"{images}x{inputs}x{side}x{side} to {features}"
    return text + (", channels last" if last else "") + (f", {copies} copies" if copies > 1 else "")


def shapes(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    images, inputs, side, features = sizes
    return shaped(images, inputs, side, side, dtype=dtype), shaped(features, inputs, 3, 3, dtype=dtype)


def operands(i: int, sizes: Sizes, dtype: torch.dtype, device: str, last: bool) -> tuple[Tensor, Tensor, Tensor]:
    images, inputs, side, features = sizes
    x = normal(3 * i, images, inputs, side, side, device=device).to(dtype)
    weight = normal(3 * i + 1, features, inputs, 3, 3, device=device) / (9 * inputs) ** 0.5
    x = x.to(memory_format=torch.channels_last) if last else x
    return x, weight.to(dtype), normal(3 * i + 2, features, device=device).to(dtype)


def conv_row(
    sizes: Sizes, copies: int, dtype: torch.dtype, device: str = "cpu", names=(None,), last: bool = True
) -> Row:
    source = rivals.generator(device)
    contestants = ours(lambda x, w, b, key: ulr.ops.noisy_conv2d(x, w, b, SIGMA, key, padding=1, copies=copies), names)
    contestants["noiseless F.conv2d"] = Contestant(lambda x, w, b, key: F.conv2d(x, w, b, padding=1))
    if copies > 1:
        contestants["eager, input repeated"] = Contestant(
            lambda x, w, b, key: rivals.repeat_conv_input(x, w, b, SIGMA, copies, source)
        )
    name = "eager, product repeated" if copies > 1 else "eager"
    contestants[name] = Contestant(lambda x, w, b, key: rivals.repeat_conv_product(x, w, b, SIGMA, copies, source))
    x, weight = shapes(sizes, dtype)
    return Row(
        name=f"noisy_conv2d {kind_of(dtype)} {text_of(sizes, copies, last)}",
        inputs=lambda i: (*operands(i, sizes, dtype, device, last), key_of(i, device)),
        contestants=contestants,
        cost=OPS["noisy_conv2d"].floor(x, weight, None, None, None, *WINDOW, copies, False),
        kind=kind_of(dtype),
        memory=copies > 1,
    )


def conv_gradient_row(
    sizes: Sizes, copies: int, dtype: torch.dtype, device: str = "cpu", names=(None,), last: bool = True
) -> Row:
    """Antithetic copies that share x. The buffers are fp32; the rivals' results are not even added to them."""
    images, inputs, side, features = sizes
    source = rivals.generator(device)

    def make(i: int) -> tuple:
        buffers = torch.zeros(features, inputs, 3, 3, device=device), torch.zeros(features, device=device)
        loss_weight = normal(3 * i + 2, copies, images, device=device) / (copies * images)
        return *buffers, operands(i, sizes, dtype, device, last)[0], loss_weight, key_of(i, device)

    def keep(repeat: bool, half: bool) -> Callable:
        def kept(gw: Tensor, gb: Tensor, x: Tensor, lw: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            like = torch.empty(copies // 2 * images, features, side, side, device=device, dtype=dtype)
            noise = rivals.conv_noise(like, last, source)
            return x.repeat(copies, 1, 1, 1) if repeat else x, noise if half else torch.cat([noise, -noise])

        return kept

    def rival(function: Callable) -> Callable:
        return lambda gw, gb, x, lw, key, kept: function(*kept, lw.to(dtype), SIGMA)

    def run(gw: Tensor, gb: Tensor, x: Tensor, lw: Tensor, key: Tensor) -> None:
        ulr.ops.noisy_conv2d_grad_(gw, gb, x, lw, SIGMA, key, padding=1, antithetic=True)

    x, weight = shapes(sizes, dtype)
    floor = OPS["noisy_conv2d_grad_"].floor
    return Row(
        name=f"conv gradient {kind_of(dtype)} {text_of(sizes, copies, last)}",
        inputs=make,
        contestants={
            **ours(run, names),
            "stored noise, repeated input": Contestant(
                rival(rivals.repeated_conv_gradient), keep(repeat=True, half=False)
            ),
            "eager, reduced first": Contestant(rival(rivals.reduced_conv_gradient), keep(repeat=False, half=False)),
            "eager, half kept": Contestant(rival(rivals.paired_conv_gradient), keep(repeat=False, half=True)),
            "torch.compile": Contestant(rival(compiled(rivals.reduced_conv_gradient)), keep(repeat=False, half=False)),
        },
        cost=floor(weight, None, None, x, shaped(copies, images), None, None, [3, 3], *WINDOW, True),
        kind=kind_of(dtype),
        memory=True,
    )


def conv_recompute_row(
    sizes: Sizes, copies: int, dtype: torch.dtype, device: str = "cpu", names=(None,), last: bool = True
) -> Row:
    """A second pass with known losses: the noised output and the gradient."""
    gradient = conv_gradient_row(sizes, copies, dtype, device, names, last)

    def make(i: int) -> tuple:
        gw, gb, x, lw, key = gradient.inputs(i)
        return gw, gb, x, *operands(i, sizes, dtype, device, last)[1:], lw, key

    def fused(gw, gb, x, w, b, lw, key):
        return ulr.ops.noisy_conv2d_recompute_(gw, gb, x, w, b, lw, SIGMA, key, padding=1, antithetic=True)

    def apart(gw, gb, x, w, b, lw, key):
        y = ulr.ops.noisy_conv2d(x, w, b, SIGMA, key, padding=1, copies=copies, antithetic=True)
        ulr.ops.noisy_conv2d_grad_(gw, gb, x, lw, SIGMA, key, padding=1, antithetic=True)
        return y

    x, weight = shapes(sizes, dtype)
    window = (weight, None, shaped(copies, sizes[0]), None, None, *WINDOW, True)
    return Row(
        name=f"conv recompute {kind_of(dtype)} {text_of(sizes, copies, last)}",
        inputs=make,
        contestants={**ours(fused, names), "two ops": Contestant(apart, backend=names[0])},
        cost=OPS["noisy_conv2d_recompute_"].floor(weight, None, None, x, *window),
        kind=kind_of(dtype),
    )
