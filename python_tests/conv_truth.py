"""Right results of noisy convolutions, in fp64: torch's own convolution, and autograd through it, with the noise as a
constant. Each function returns, per output, the value and its magnitude, as in `truth.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from truth import signed_noise


def convolve(x, weight, *, padding=0, transposed=False, output_padding=0, **window) -> Tensor:
    if transposed:
        return F.conv_transpose2d(x, weight, padding=padding, output_padding=output_padding, **window)
    return F.conv2d(x, weight, padding=padding, **window)


def by_channel(rows: Tensor, like: Tensor) -> Tensor:
    """`[C, R, O]` as `[C, B, O, H', W']`: rows are (image, y, x)."""
    copies, images, features, height, width = like.shape
    return rows.view(copies, images, height, width, features).movedim(-1, 2)


def split(kwargs: dict) -> tuple[dict, dict]:
    names = ("stride", "padding", "dilation", "groups", "transposed", "output_padding")
    return {k: v for k, v in kwargs.items() if k in names}, {k: v for k, v in kwargs.items() if k not in names}


def clean(x: Tensor, weight: Tensor, window: dict) -> Tensor:
    if not x.numel():
        return convolve(x.new_zeros(1, *x.shape[2:]), weight, **window)[None, :0].expand(x.shape[0], -1, -1, -1, -1)
    return torch.stack([convolve(image, weight, **window) for image in x])


def noisy_conv2d(x, weight, bias, sigma, key, *, copies=1, antithetic=False, draw=0, positions=None, **kwargs):
    window, spec = split(kwargs)
    x, weight = x.cpu().double(), weight.cpu().double()
    x = x if x.dim() == 5 else x.expand(copies, *x.shape)
    product, magnitude = clean(x, weight, window), clean(x.abs(), weight.abs(), window)
    features, (height, width) = product.shape[2], product.shape[3:]
    positions = height * width if positions is None else positions
    rows = product.shape[1] * height * width
    eps = signed_noise(copies, rows, features, key, antithetic, draw, positions=positions, **spec)
    noise = by_channel(torch.as_tensor(sigma).cpu().double() * eps, product)
    shift = (torch.zeros(features) if bias is None else bias.cpu()).double()[:, None, None]
    return [(product + shift + noise, magnitude + shift.abs() + noise.abs())]


def noisy_conv2d_grad_(
    grad_weight,
    grad_bias,
    x,
    loss_weight,
    sigma,
    key,
    *,
    kernel_size=None,
    antithetic=False,
    draw=0,
    dist="normal",
    positions=None,
    grad_log_sigma=None,
    **kwargs,
):
    window, spec = split(kwargs)
    copies = loss_weight.shape[0]
    x = x.cpu().double()
    x = x if x.dim() == 5 else x.expand(copies, *x.shape)
    shape = (grad_bias.shape[0], x.shape[2], *kernel_size) if grad_weight is None else grad_weight.shape
    weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    product = clean(x, weight, window)
    features, (height, width) = product.shape[2], product.shape[3:]
    positions = height * width if positions is None else positions
    rows = product.shape[1] * height * width
    noise = {"dist": dist, "positions": positions, **spec}
    eps = signed_noise(copies, rows, features, key, antithetic, draw, **noise)
    score = eps if dist != "laplace" else torch.copysign(torch.tensor(2.0).double().sqrt(), eps)
    loss = loss_weight.cpu().double().repeat_interleave(positions, 1)[:, :, None]
    s = loss * score / torch.as_tensor(sigma).cpu().double()

    def added(buffer, value, magnitude):
        before = buffer.cpu().double()
        return before + value, before.abs() + magnitude

    results = []
    if grad_weight is not None:
        value = torch.autograd.grad((product * by_channel(s, product)).sum(), weight)[0]
        product = clean(x.abs(), weight, window)
        magnitude = torch.autograd.grad((product * by_channel(s.abs(), product)).sum(), weight)[0]
        results.append(added(grad_weight, value, magnitude))
    if grad_bias is not None:
        results.append(added(grad_bias, s.sum((0, 1)), s.abs().sum((0, 1))))
    if grad_log_sigma is not None:
        t = loss * (eps * score - 1)
        over = (0, 1) if grad_log_sigma.dim() else (0, 1, 2)
        results.append(added(grad_log_sigma, t.sum(over), t.abs().sum(over)))
    return results


def noisy_conv2d_recompute_(grad_weight, grad_bias, x, weight, bias, loss_weight, sigma, key, **kwargs):
    forward = {k: v for k, v in kwargs.items() if k != "grad_log_sigma"}
    y = noisy_conv2d(x, weight, bias, sigma, key, copies=loss_weight.shape[0], **forward)
    return y + noisy_conv2d_grad_(
        grad_weight, grad_bias, x, loss_weight, sigma, key, kernel_size=weight.shape[2:], **kwargs
    )
