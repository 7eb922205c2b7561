"""Samples of noisy_conv2d_grad_."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from samples import HADAMARD, Sample, values


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
    crossing = {**HADAMARD, "draw": 2**16 - 2, "row_offset": 30, "col_offset": 37, "width": 200, **pairs}
    yield Sample("hadamard", (*buffers(), x, f(5, 6, 2), scale, 11), crossing)
    yield Sample("hadamard-separate", (*buffers(), v(7, 4, 2, 3, 6, 5), f(5, 4, 2), 0.3, 11), crossing)
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
