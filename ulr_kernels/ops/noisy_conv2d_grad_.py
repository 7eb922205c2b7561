"""noisy_conv2d_grad_: the likelihood-ratio gradient of a convolution, from noise that is made again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ulr_kernels.ops import _conv, _linear
from ulr_kernels.ops._conv import WINDOW_SCHEMA, Pair, Window
from ulr_kernels.ops._linear import values
from ulr_kernels.ops._op import NOISE_SCHEMA, Check, Cost, Op, Sample, key_tensor, register, sigma_tensor


def noisy_conv2d_grad_(
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    x: Tensor,
    loss_weight: Tensor,
    sigma: float | Tensor,
    key: int | Tensor,
    *,
    kernel_size: Pair | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: Pair = 0,
    antithetic: bool = False,
    dist: str = "normal",
    sampler: str = "iid",
    positions: int | None = None,
    draw: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
    grad_log_sigma: Tensor | None = None,
) -> None:
    """Add the gradients of ULR (arXiv 2305.08960, Theorem 1, for a convolution) to their buffers, as raw sums.

    With S_c[b, o, y, x] = loss_weight[c, r // positions] * score_c[r, o] / sigma[o], where r = (b * H' + y) * W' + x:

        grad_weight    += sum over c of the weight's gradient of conv(x[c], weight) for the output gradient S_c
        grad_bias      += sum over c, r of  S_c
        grad_log_sigma += sum over c, r of  loss_weight[c, r // positions] * (eps_cr * score_cr - 1)

    The noise is that of `noisy_conv2d` with the same key, draw and offsets; it is made again, never stored. Where the
    copies share x, the sum over copies comes first and one product with x follows.

    Args:
        grad_weight: `[O, I / groups, kh, kw]`, or, transposed, `[I, O / groups, kh, kw]`; fp32 or x's dtype, any
            strides; or None.
        grad_bias: `[O]`, likewise; or None. One of the two must be given.
        x: `[B, I, H, W]`, shared by the copies, or `[C, B, I, H, W]`; fp32, bf16 or fp16; any strides.
        loss_weight: `[C, B]`, fp32: what each copy of each image counts, (L - baseline) / (C * B) for a mean. With
            positions given: `[C, B * H' * W' // positions]`, one for each sample.
        sigma: noise scale, > 0: a float, or fp32 `[]` or `[O]`.
        key: of the noise site: an integer in [-2^63, 2^64) or an int64 scalar tensor.
        kernel_size: kh and kw, needed where grad_weight is None.
        stride, padding, dilation, groups, transposed, output_padding: the convolution, as in `noisy_conv2d`.
        antithetic, dist, sampler, draw, row_offset, col_offset: as in `noisy_conv2d`.
        positions: rows per sample, which must divide B * H' * W'; None: H' * W', one image.
        grad_log_sigma: `[]` or `[O]`, fp32 or x's dtype, or None; an error for Rademacher noise, which has no density.

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above, or a buffer overlaps another
            argument; nothing has been written.
    """
    op = "noisy_conv2d_grad_"
    _conv.check_images(Check(op), x)
    kernel = _conv.kernel_of(op, grad_weight, kernel_size, transposed)
    window = _conv.resolve_window(op, kernel, stride, padding, dilation, groups, transposed, output_padding)
    key = key_tensor(op, key, x.device)
    sigma = sigma_tensor(op, sigma, x.device, zero=False)
    torch.ops.ulr.noisy_conv2d_grad_.default(
        grad_weight,
        grad_bias,
        grad_log_sigma,
        x,
        loss_weight,
        sigma,
        key,
        kernel,
        *window,
        antithetic,
        dist,
        sampler,
        _conv.resolve_positions(window, x, kernel, positions),
        draw,
        row_offset,
        col_offset,
    )


def check(
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_log_sigma: Tensor | None,
    x: Tensor,
    loss_weight: Tensor,
    sigma: Tensor,
    key: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
    antithetic: bool,
    dist: str,
    sampler: str,
    positions: int,
    draw: int,
    row_offset: int,
    col_offset: int,
) -> None:
    rules = Check("noisy_conv2d_grad_")
    window = Window.of(stride, padding, dilation, groups, transposed)
    sizes = _conv.check_gradients(
        rules, grad_weight, grad_bias, grad_log_sigma, x, loss_weight, kernel, window, positions, dist
    )
    draws = rules.copies(sizes.copies, antithetic)
    _linear.check_sigma(rules, "sigma", sigma, sizes.features, (torch.float32,))
    rules.device(
        "x",
        x.device,
        grad_weight=grad_weight,
        grad_bias=grad_bias,
        grad_log_sigma=grad_log_sigma,
        loss_weight=loss_weight,
        sigma=sigma,
        key=key,
    )
    rules.noise(key, sizes.rows, sizes.features, draws, dist, sampler, positions, draw, row_offset, col_offset)


def reference(
    grad_weight,
    grad_bias,
    grad_log_sigma,
    x,
    loss_weight,
    sigma,
    key,
    kernel,
    stride,
    padding,
    dilation,
    groups,
    transposed,
    *spec,
) -> None:
    window = Window.of(stride, padding, dilation, groups, transposed)
    buffers = (grad_weight, grad_bias, grad_log_sigma)
    sizes = _conv.gradient_sizes(grad_weight, grad_bias, x, loss_weight, kernel, window)
    _conv.gradient_reference(buffers, x, loss_weight, sigma, sizes, window, kernel, key, *spec)


def cost(
    grad_weight,
    grad_bias,
    grad_log_sigma,
    x,
    loss_weight,
    sigma,
    key,
    kernel,
    stride,
    padding,
    dilation,
    groups,
    transposed,
    antithetic,
    *spec,
) -> Cost:
    window = Window.of(stride, padding, dilation, groups, transposed)
    sizes = _conv.gradient_sizes(grad_weight, grad_bias, x, loss_weight, kernel, window)
    buffers = [b for b in (grad_weight, grad_bias, grad_log_sigma) if b is not None]
    draws = sizes.copies // 2 if antithetic else sizes.copies
    return Cost(
        x.element_size() * x.numel() + 2 * sum(b.numel() * b.element_size() for b in buffers),
        2 * _conv.products(window, sizes),
        draws * sizes.rows * sizes.features,
    )


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    def v(seed: int, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return values(seed, *shape, device=device, dtype=dtype)

    def f(seed: int, *shape: int) -> Tensor:
        return v(seed, *shape, dtype=torch.float32)

    x, scale = v(1, 2, 3, 7, 6), f(4, 5).abs() + 0.1
    last = torch.channels_last

    def buffers(*shape: int, features: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        return v(2, *(shape or (5, 3, 3, 3)), dtype=dtype), v(3, features, dtype=dtype)

    same = {"padding": 1}
    yield Sample("one", (*buffers(), x, f(5, 1, 2), 0.3, 11))
    yield Sample("padded", (*buffers(), x, f(5, 5, 2), scale, -11), {"draw": 5, **same})
    yield Sample("antithetic", (*buffers(), x, f(5, 4, 2), scale, 11), {"antithetic": True, "padding": (1, 0)})
    yield Sample("stride", (*buffers(), x, f(5, 3, 2), 0.3, 11), {"stride": (2, 3), **same})
    yield Sample("dilation", (*buffers(), x, f(5, 2, 2), 0.3, 11), {"dilation": (2, 1), "padding": (2, 1), "stride": 2})
    grouped = (*buffers(6, 2, 3, 3, features=6), v(6, 2, 4, 5, 5), f(5, 2, 2), 0.3, 11)
    yield Sample("groups", grouped, {"groups": 2, **same})
    depthwise = (*buffers(4, 1, 3, 2, features=4), v(6, 2, 4, 5, 5), f(5, 2, 2), 0.3, 11)
    yield Sample("depthwise", depthwise, {"groups": 4, "stride": 2})
    dilated = {"padding": "same", "dilation": (1, 2)}
    yield Sample("same", (*buffers(5, 3, 2, 4), x, f(5, 2, 2), 0.3, 11), dilated)
    yield Sample("point", (*buffers(5, 3, 1, 1), x, f(5, 2, 2), 0.3, 11), {"stride": 2, "padding": "valid"})
    pairs = {"antithetic": True, "stride": 2}
    yield Sample(
        "separate", (*buffers(), v(7, 4, 2, 3, 6, 5), f(5, 4, 2), 0.3, 11), {**pairs, "grad_log_sigma": f(8, 5)}
    )
    yield Sample("channels-last", (*buffers(), x.to(memory_format=last), f(5, 4, 2), scale, 11), {**pairs, **same})
    columns = v(7, 2, 2, 6, 5, 3).movedim(-1, 2)
    yield Sample("separate-channels-last", (*buffers(), columns, f(5, 2, 2), 0.3, 11), {"dist": "laplace"})
    laplace = {"dist": "laplace", "grad_log_sigma": f(8, 5)}
    yield Sample("laplace", (*buffers(), x, f(5, 4, 2), 0.3, 11), laplace)
    yield Sample("log-sigma", (*buffers(), x, f(5, 4, 2), scale, 11), {"antithetic": True, "grad_log_sigma": f(8)})
    line = (*buffers(7, 4, 1, 5, features=7), v(9, 3, 4, 1, 20), f(5, 2, 3), 0.3, 11)
    yield Sample("one-dimension", line, {"stride": (1, 2)})
    transposed = {"transposed": True, "stride": (2, 3), "padding": (1, 2), "output_padding": (1, 0)}
    yield Sample("transposed", (*buffers(3, 5, 3, 4), x, f(5, 2, 2), 0.3, 11), transposed)
    yield Sample(
        "transposed-groups",
        (*buffers(4, 3, 3, 3, features=6), v(6, 2, 2, 4, 4, 3), f(5, 2, 2), 0.3, 11),
        {"transposed": True, "groups": 2, "dilation": 2, "output_padding": (0, 1)},
    )
    signs = (*buffers(150, 2, 2, 2, features=150), v(10, 1, 4, 6, 6), f(5, 2, 1), 0.5, 2**63)
    yield Sample("signs", signs, {"dist": "rademacher", "groups": 2})
    wide = (*buffers(70, 17, 3, 3, features=70), v(11, 3, 17, 9, 8), f(5, 3, 3), 0.5, 12)
    yield Sample("wide", wide, same)
    yield Sample("positions", (*buffers(), x, f(5, 4, 10), 0.3, 11), {"positions": 4, "row_offset": 9})
    yield Sample("sobol", (*buffers(), x, f(5, 4, 2), 0.3, 11), {"sampler": "sobol", "row_offset": 40, **same})
    yield Sample("offsets", (*buffers(), x, f(5, 2, 2), 0.3, 11), {"draw": 9, "row_offset": 1000, "col_offset": 129})
    yield Sample("same-dtype", (*buffers(dtype=dtype), x, f(5, 4, 2), 0.3, 11), same)
    yield Sample("weight-only", (buffers()[0], None, x, f(5, 4, 2), 0.3, 11))
    yield Sample("bias-only", (None, buffers()[1], x, f(5, 4, 2), 0.3, 11), {"kernel_size": (3, 2)})
    strided = v(13, 4, 7, 12, 3)[::2].permute(0, 3, 1, 2)[..., ::2]
    buffer = f(2, 5, 3, 3, 6)[..., ::2].permute(0, 1, 3, 2)
    yield Sample("strided", (buffer, f(3, 10)[::2], strided, f(5, 2, 8).T[::2], scale[:1].expand(5), 11))
    yield Sample("no-images", (*buffers(), x[:0], f(5, 4, 2)[:, :0], 0.3, 11))

    w, b = buffers()
    loss = f(5, 4, 2)
    yield Sample("x-rank", (w, b, x[0], loss, 0.3, 1), error=r"'x' must be \[B, I, H, W\] or \[C, B, I, H, W\]")
    yield Sample(
        "x-channels", (w, b, x[:, :2], loss, 0.3, 1), error=r"'x' must have 3 channels \(grad_weight is \[5, 3"
    )
    yield Sample("weight-rank", (w[0], b, x, loss, 0.3, 1), error=r"'grad_weight' must be \[O, I / groups, kh, kw\]")
    yield Sample("sigma-zero", (w, b, x, loss, 0.0, 1), error="'sigma' must be finite and positive, got 0.0")
    yield Sample("loss-shape", (w, b, x, loss[:, :1], 0.3, 1), error=r"'loss_weight' must be \[copies, 2\]")
    yield Sample("loss-dtype", (w, b, x, loss.double(), 0.3, 1), error="'loss_weight' must be float32")
    yield Sample(
        "positions-rule", (w, b, x, loss, 0.3, 1), {"positions": 7}, error="'positions' must divide the 40 rows"
    )
    yield Sample("no-copies", (w, b, x, loss[:0], 0.3, 1), error="'copies' must be at least 1, got 0")
    yield Sample("odd", (w, b, x, loss[:3], 0.3, 1), {"antithetic": True}, error="'copies' must be even")
    yield Sample("bias-buffer", (w, b[:4], x, loss, 0.3, 1), error="'grad_bias' must be")
    yield Sample("no-buffer", (None, None, x, loss, 0.3, 1), {"kernel_size": 3}, error="'grad_weight' must be given")
    yield Sample("no-kernel", (None, b, x, loss, 0.3, 1), error="'kernel_size' must be given where grad_weight is None")
    kernel = {"kernel_size": 5}
    yield Sample("kernel", (w, b, x, loss, 0.3, 1), kernel, error=r"'kernel_size' must be \[3, 3\] like grad_weight's")
    yield Sample("buffer-dtype", (w.double(), b, x, loss, 0.3, 1), error="'grad_weight' must be float32")
    density = {"dist": "rademacher", "grad_log_sigma": f(8)}
    yield Sample("density", (w, b, x, loss, 0.3, 1), density, error="'grad_log_sigma' must be None where dist is 'rade")
    overlapping = w[:1].expand(5, 3, 3, 3)
    yield Sample("self-overlap", (overlapping, b, x, loss, 0.3, 1), error="'grad_weight' must not overlap itself")
    yield Sample("overlap", (w, w[:, 0, 0, 0], x, loss, 0.3, 1), error="'grad_weight' must not overlap 'grad_bias'")


register(
    Op(
        name="noisy_conv2d_grad_",
        schema="(Tensor(a!)? grad_weight, Tensor(b!)? grad_bias, Tensor(c!)? grad_log_sigma, Tensor x, "
        f"Tensor loss_weight, Tensor sigma, Tensor key, int[] kernel, {WINDOW_SCHEMA}, bool antithetic=False, "
        f"{NOISE_SCHEMA}) -> ()",
        function=noisy_conv2d_grad_,
        check=check,
        reference=reference,
        samples=samples,
        cost=cost,
        mutates=(0, 1, 2),
        autocast=(3,),
    )
)
