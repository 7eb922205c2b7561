"""noisy_conv2d: a convolution with logit noise, y = conv(x, weight) + b + sigma * eps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ulr_kernels.ops import _conv, _linear
from ulr_kernels.ops._conv import WINDOW_SCHEMA, Pair, Window
from ulr_kernels.ops._linear import values
from ulr_kernels.ops._op import (
    NOISE_SCHEMA,
    Check,
    Cost,
    Op,
    Output,
    Sample,
    key_tensor,
    refuse_tangents,
    register,
    sigma_tensor,
)


def noisy_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: float | Tensor,
    key: int | Tensor,
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: Pair = 0,
    copies: int = 1,
    antithetic: bool = False,
    dist: str = "normal",
    sampler: str = "iid",
    positions: int | None = None,
    draw: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
) -> Tensor:
    """y[c] = conv(x[c], weight) + b + sigma * eps_c for each copy c: ULR's noised module (arXiv 2305.08960).

    Noise has a row for each (image, y, x) of the output and a column for each channel, whatever the memory format. It
    is made on the way out of the product and never stored; there is one product however many copies share x. A
    convolution in one dimension is one of height 1.

    Args:
        x: `[B, I, H, W]`, shared by the copies, or `[C, B, I, H, W]`; fp32, bf16 or fp16; any strides.
        weight: `[O, I / groups, kh, kw]`, of x's dtype; transposed: `[I, O / groups, kh, kw]`.
        bias: `[O]`, of x's dtype, or None.
        sigma: noise scale in units of y, >= 0: a float, or fp32 `[]` or `[O]`.
        key: of the noise site: an integer in [-2^63, 2^64) or an int64 scalar tensor.
        stride, padding, dilation, groups: as in `F.conv2d`: an integer or (height, width), in pixels; padding may be
            "same" or "valid".
        transposed, output_padding: set for a convolution as in `F.conv_transpose2d`.
        copies: C.
        antithetic: the second half of the copies uses the first half's noise, negated; C must be even.
        dist, sampler, draw, row_offset, col_offset: which noise, as in `ulr.noise`; copy c uses draw + c. Image b of a
            larger batch starts at row_offset = b * H' * W'.
        positions: rows per sample, for Sobol's dimensions; None: H' * W', one image.

    Returns:
        `[C, B, O, H', W']` of x's dtype, channels last where x or the weight is. Sums are fp32. Differentiable in x,
        weight, bias and sigma (pathwise).

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above; nothing has been computed.
        NotImplementedError: an input carries a forward-mode tangent.
    """
    rules = Check("noisy_conv2d")
    _conv.check_images(rules, x)
    _conv.check_kernel(rules, "weight", weight, transposed)
    kernel = weight.shape[2:]
    window = _conv.resolve_window("noisy_conv2d", kernel, stride, padding, dilation, groups, transposed, output_padding)
    key = key_tensor("noisy_conv2d", key, x.device)
    scale = sigma_tensor("noisy_conv2d", sigma, x.device, zero=True)
    positions = _conv.resolve_positions(window, x, kernel, positions)
    spec = (*window, copies, antithetic, dist, sampler, positions, draw, row_offset, col_offset)
    refuse_tangents("noisy_conv2d", "F.conv2d and ulr.noise", x, weight, bias, scale)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, scale)):
        return _Pathwise.apply(x, weight, bias, scale, key, *spec)
    return torch.ops.ulr.noisy_conv2d.default(x, weight, bias, scale, key, *spec)


class _Pathwise(torch.autograd.Function):
    """The ordinary gradient through y at fixed noise: half-order estimators cut backpropagation above or below it."""

    @staticmethod
    def forward(ctx, x, weight, bias, sigma, key, *spec):
        ctx.save_for_backward(x, weight, bias, sigma, key)
        ctx.spec = spec
        return torch.ops.ulr.noisy_conv2d.default(x, weight, bias, sigma, key, *spec)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, sigma, key = ctx.saved_tensors
        window, which = Window.of(*ctx.spec[:5]), ctx.spec[5:]
        grad = grad.to(weight.dtype)  # autocast may have computed y in a narrower type
        by_output = grad.sum(0) if x.dim() == 4 else grad.flatten(0, 1)  # copies that share x add up
        images = x if x.dim() == 4 else x.flatten(0, 1)
        grad_x, grad_weight = window.backward(by_output, images.to(grad.dtype), weight, ctx.needs_input_grad[:2])
        grad_x = grad_x if grad_x is None else grad_x.reshape(x.shape)
        grad_bias = by_output.sum((0, 2, 3)) if bias is not None and ctx.needs_input_grad[2] else None
        grad_sigma = None
        if ctx.needs_input_grad[3]:
            # A linear layer without inputs gives sigma * eps, of the same rows and columns; with sigma 1 eps itself.
            by_row = grad.float().movedim(2, -1).flatten(1, 3)
            nothing = by_row.new_zeros(by_row.shape[1], 0)
            unit = torch.ones_like(sigma)
            eps = torch.ops.ulr.noisy_linear.default(
                nothing, nothing.new_zeros(grad.shape[2], 0), None, unit, key, *which
            )
            grad_sigma = (by_row * eps).sum((0, 1))
            grad_sigma = grad_sigma if sigma.dim() else grad_sigma.sum()
        return grad_x, grad_weight, grad_bias, grad_sigma, None, *(None for _ in ctx.spec)


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    key: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
    copies: int,
    antithetic: bool,
    dist: str,
    sampler: str,
    positions: int,
    draw: int,
    row_offset: int,
    col_offset: int,
) -> Output:
    rules = Check("noisy_conv2d")
    draws = rules.copies(copies, antithetic)
    _conv.check_images(rules, x)
    _conv.check_kernel(rules, "weight", weight, transposed)
    window = Window.of(stride, padding, dilation, groups, transposed)
    _conv.check_window(rules, window)
    sizes = _conv.check_sizes(rules, x, weight.shape, window, copies, "weight")
    _conv.check_weight(rules, x, weight, bias, sizes)
    _linear.check_sigma(rules, "sigma", sigma, sizes.features, (torch.float32,))
    rules.device("x", x.device, weight=weight, bias=bias, sigma=sigma, key=key)
    rules.noise(key, sizes.rows, sizes.features, draws, dist, sampler, positions, draw, row_offset, col_offset)
    return _conv.output(x, weight, sizes, window)


def reference(
    y, x, weight, bias, sigma, key, stride, padding, dilation, groups, transposed, copies, antithetic, *spec
) -> None:
    window = Window.of(stride, padding, dilation, groups, transposed)
    sizes = _conv.sizes_of(x, weight.shape, window, copies)
    _conv.forward_reference(y, x, weight, bias, sigma, sizes, window, key, antithetic, *spec)


def cost(x, weight, bias, sigma, key, stride, padding, dilation, groups, transposed, copies, antithetic, *spec) -> Cost:
    window = Window.of(stride, padding, dilation, groups, transposed)
    sizes = _conv.sizes_of(x, weight.shape, window, copies)
    out = sizes.rows * sizes.features
    draws = copies // 2 if antithetic else copies
    return Cost(
        x.element_size() * (x.numel() + weight.numel() + copies * out),
        2 * _conv.products(window, sizes),
        draws * out,
    )


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    def v(seed: int, *shape: int) -> Tensor:
        return values(seed, *shape, device=device, dtype=dtype)

    x, w, b = v(1, 2, 3, 7, 6), v(2, 5, 3, 3, 3), v(3, 5)
    scale = values(4, 5, device=device, dtype=torch.float32).abs() + 0.1
    same = {"padding": 1}
    last = torch.channels_last
    yield Sample("one", (x, w, b, 0.3, 11))
    yield Sample("padded", (x, w, b, 0.3, 11), {"copies": 3, "draw": 5, **same})
    yield Sample("per-channel", (x, w, b, scale, -11), {"copies": 4, "antithetic": True, "padding": (1, 0)})
    yield Sample("stride", (x, w, None, 0.3, 11), {"copies": 2, "stride": (2, 3), **same})
    yield Sample("dilation", (x, w, b, 0.3, 11), {"copies": 2, "dilation": (2, 1), "padding": (2, 1), "stride": 2})
    yield Sample("groups", (v(5, 2, 4, 5, 5), v(6, 6, 2, 3, 3), v(7, 6), 0.3, 11), {"groups": 2, "copies": 2, **same})
    yield Sample("depthwise", (v(5, 2, 4, 5, 5), v(6, 4, 1, 3, 2), v(7, 4), 0.3, 11), {"groups": 4, "stride": 2})
    yield Sample("same", (x, v(8, 5, 3, 2, 4), b, 0.3, 11), {"padding": "same", "dilation": (1, 2), "copies": 2})
    yield Sample("point", (x, v(9, 5, 3, 1, 1), b, 0.3, 11), {"stride": 2, "padding": "valid"})
    yield Sample("separate", (v(10, 4, 2, 3, 6, 5), w, b, 0.3, 11), {"copies": 4, "antithetic": True, "stride": 2})
    yield Sample(
        "channels-last", (x.to(memory_format=last), w, b, scale, 11), {"copies": 4, "antithetic": True, **same}
    )
    yield Sample(
        "separate-channels-last",
        (v(10, 2, 2, 6, 5, 3).movedim(-1, 2), w.to(memory_format=last), b, 0.3, 11),
        {"copies": 2, "dist": "laplace"},
    )
    yield Sample(
        "one-dimension", (v(11, 3, 4, 1, 20), v(12, 7, 4, 1, 5), None, 0.3, 11), {"stride": (1, 2), "copies": 2}
    )
    transposed = {"transposed": True, "copies": 2, "stride": (2, 3), "padding": (1, 2), "output_padding": (1, 0)}
    yield Sample("transposed", (x, v(13, 3, 5, 3, 4), b, 0.3, 11), transposed)
    yield Sample(
        "transposed-groups",
        (v(5, 2, 2, 4, 4, 3), v(6, 4, 3, 3, 3), v(7, 6), 0.3, 11),
        {"transposed": True, "groups": 2, "copies": 2, "dilation": 2, "output_padding": (0, 1)},
    )
    signs = {"copies": 2, "dist": "rademacher", "groups": 2}
    yield Sample("signs", (v(14, 1, 4, 6, 6), v(15, 150, 2, 2, 2), None, 0.5, 2**63), signs)
    yield Sample("wide", (v(16, 3, 17, 9, 8), v(17, 70, 17, 3, 3), v(18, 70), 0.5, 12), {"copies": 3, **same})
    yield Sample("sobol", (x, w, b, 0.3, 11), {"copies": 4, "sampler": "sobol", "row_offset": 40, **same})
    yield Sample("frames", (x, w, b, 0.3, 11), {"copies": 4, "sampler": "sobol", "positions": 40})
    offsets = {"copies": 2, "draw": 9, "row_offset": 1000, "col_offset": 129}
    yield Sample("offsets", (x, w, b, 0.3, 11), offsets)
    strided = v(19, 4, 7, 12, 3)[::2].permute(0, 3, 1, 2)[..., ::2]
    yield Sample(
        "strided", (strided, v(20, 5, 3, 3, 6)[..., ::2], v(21, 10)[::2], scale[:1].expand(5), 11), {"copies": 2}
    )
    yield Sample("no-images", (x[:0], w, b, 0.3, 11), {"copies": 2})

    yield Sample("x-rank", (x[0], w, b, 0.3, 1), error=r"'x' must be \[B, I, H, W\] or \[C, B, I, H, W\]")
    yield Sample("x-channels", (x[:, :2], w, b, 0.3, 1), error=r"'x' must have 3 channels \(weight is \[5, 3, 3, 3\]\)")
    yield Sample("x-dtype", (x.double(), w, b, 0.3, 1), error="'x' must be float32")
    yield Sample("x-copies", (v(10, 4, 2, 3, 6, 5), w, b, 0.3, 1), {"copies": 2}, error="'x' must have 2 copies")
    yield Sample("x-small", (x[:, :, :2], w, b, 0.3, 1), error="'x' must have images large enough for a kernel of")
    yield Sample("weight-rank", (x, w[0], b, 0.3, 1), error=r"'weight' must be \[O, I / groups, kh, kw\]")
    yield Sample("weight-dtype", (x, w.double(), b, 0.3, 1), error="'weight' must be")
    yield Sample("bias-shape", (x, w, b[:4], 0.3, 1), error=r"'bias' must be \[5\]")
    yield Sample("sigma-shape", (x, w, b, scale[:3], 1), error=r"'sigma' must be a scalar or \[5\]")
    yield Sample("sigma-negative", (x, w, b, -0.5, 1), error="'sigma' must be finite and at least 0, got -0.5")
    yield Sample("stride-zero", (x, w, b, 0.3, 1), {"stride": (0, 1)}, error="'stride' must be at least 1")
    yield Sample("stride-form", (x, w, b, 0.3, 1), {"stride": (1, 1, 1)}, error="'stride' must be an integer or a pair")
    yield Sample("stride-float", (x, w, b, 0.3, 1), {"stride": 1.5}, error="'stride' must be an integer or a pair")
    yield Sample("dilation-zero", (x, w, b, 0.3, 1), {"dilation": 0}, error="'dilation' must be at least 1")
    yield Sample("padding-negative", (x, w, b, 0.3, 1), {"padding": -1}, error="'padding' must be at least 0, got -1")
    yield Sample("padding-name", (x, w, b, 0.3, 1), {"padding": "full"}, error="'padding' must be an integer, a pair, ")
    strides = {"padding": "same", "stride": 2}
    yield Sample("same-stride", (x, w, b, 0.3, 1), strides, error="'padding' must be no 'same' where stride is not 1")
    yield Sample("groups-rule", (x, w, b, 0.3, 1), {"groups": 2}, error="'groups' must divide the 5 channels of weight")
    yield Sample("groups-zero", (x, w, b, 0.3, 1), {"groups": 0}, error="'groups' must be at least 1")
    yield Sample("output-padding", (x, w, b, 0.3, 1), {"output_padding": 1}, error="'output_padding' must be 0 where")
    yield Sample(
        "output-padding-large",
        (x, v(13, 3, 5, 3, 3), b, 0.3, 1),
        {"transposed": True, "stride": 2, "output_padding": 2},
        error="'output_padding' must be at least 0 and less than stride or dilation, got 2",
    )
    yield Sample("copies", (x, w, b, 0.3, 1), {"copies": 0}, error="'copies' must be at least 1, got 0")
    yield Sample("rows", (x, w, b, 0.3, 1), {"row_offset": 2**32 - 6}, error="'row_offset' must leave room for 40")


register(
    Op(
        name="noisy_conv2d",
        schema=f"(Tensor x, Tensor weight, Tensor? bias, Tensor sigma, Tensor key, {WINDOW_SCHEMA}, int copies=1, "
        f"bool antithetic=False, {NOISE_SCHEMA}) -> Tensor",
        function=noisy_conv2d,
        check=check,
        reference=reference,
        samples=samples,
        cost=cost,
        autocast=(0, 1, 2),
    )
)
