"""Samples of scale_shift_grad_."""

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

    x, image, scale = v(1, 6, 13), v(2, 3, 13, 5, 4), f(4, 13).abs() + 0.1
    w, b = f(2, 13), f(3, 13)
    channels = {"feature_dim": 1, "positions": 20}
    pairs = {"antithetic": True}
    yield Sample("one", (w, b, x, f(5, 1, 6), 0.3, 11))
    yield Sample("shared", (w, b, x, f(5, 5, 6), scale, -11), {"draw": 5})
    yield Sample("pairs", (w, b, x, f(5, 4, 6), scale, 11), pairs)
    yield Sample("separate", (w, b, v(6, 4, 6, 13), f(5, 4, 6), scale, 11), {"shared": False, **pairs})
    yield Sample("separate-odd", (w, b, v(6, 3, 6, 13), f(5, 3, 6), 0.3, 11), {"shared": False, "dist": "laplace"})
    yield Sample("tokens", (w, b, v(6, 2, 5, 13), f(5, 4, 2), scale, 11), {"positions": 5, **pairs})
    yield Sample("image", (w, b, image, f(5, 4, 3), scale, 11), {**channels, **pairs, "grad_log_sigma": f(7, 13)})
    yield Sample(
        "image-separate", (w, b, v(6, 4, 3, 13, 5, 4), f(5, 4, 3), 0.3, 11), {**channels, **pairs, "shared": False}
    )
    yield Sample(
        "channels-last", (w, b, image.contiguous(memory_format=torch.channels_last), f(5, 3, 3), scale, 11), channels
    )
    yield Sample("laplace", (w, b, x, f(5, 4, 6), 0.3, 11), {"dist": "laplace", "grad_log_sigma": f(7, 13)})
    yield Sample("log-sigma", (w, b, x, f(5, 4, 6), scale, 11), {**pairs, "grad_log_sigma": f(7)})
    yield Sample("log-sigma-alone", (None, None, x, f(5, 4, 6), scale, 11), {"grad_log_sigma": f(7)})
    yield Sample("gate", (f(7), f(8), image, f(5, 4, 3), 0.3, 11), channels)
    yield Sample("signs", (f(2, 150), f(3, 150), v(8, 34, 150), f(9, 2, 34), 0.5, 2**63), {"dist": "rademacher"})
    yield Sample(
        "image-signs",
        (f(2, 131), f(3, 131), v(8, 2, 131, 3, 11), f(9, 2, 2), 0.5, 2**63),
        {"dist": "rademacher", "feature_dim": 1, "positions": 33},
    )
    yield Sample("wide", (f(2, 1100), f(3, 1100), v(8, 5, 1100), f(9, 3, 5), 0.5, 12))
    yield Sample("tall", (f(2, 3), f(3, 3), v(8, 1300, 3), f(9, 3, 1300), 0.5, 12), {"grad_log_sigma": f(7)})
    yield Sample("image-tall", (w, b, v(8, 2, 13, 17, 31), f(9, 3, 2), 0.5, 12), {"feature_dim": 1, "positions": 527})
    yield Sample("sobol", (w, b, image, f(5, 4, 3), scale, 11), {"sampler": "sobol", **channels})
    crossing = {**HADAMARD, "draw": 2**16 - 2, "row_offset": 3, "col_offset": 37, "width": 200, **pairs}
    images = {"feature_dim": 1, "positions": 33}
    few = (f(2, 131), f(3, 131), v(8, 2, 131, 3, 11), f(9, 6, 2), 0.5, 11)
    yield Sample("hadamard", few, {**crossing, **images})
    each = (w, b, v(6, 4, 6, 13), f(5, 4, 3), 0.3, 11)
    yield Sample("hadamard-separate", each, {"shared": False, "positions": 2, **crossing})
    yield Sample("hadamard-bias", (None, *each[1:]), {"shared": False, "positions": 2, **crossing})
    yield Sample("offsets", (w, b, x, f(5, 2, 6), 0.3, 11), {"draw": 9, "row_offset": 1000, "col_offset": 129})
    yield Sample("same-dtype", (v(2, 13), v(3, 13), x, f(5, 4, 6), 0.3, 11))
    yield Sample("weight-only", (w, None, x, f(5, 4, 6), 0.3, 11))
    yield Sample("bias-only", (None, b, x, f(5, 4, 6), 0.3, 11))
    yield Sample(
        "strided",
        (f(2, 26)[::2], f(3, 39)[::3], v(13, 12, 26)[::2, ::2], f(5, 6, 8).T[::2], scale.repeat_interleave(2)[::2], 11),
    )
    yield Sample("cropped", (w, b, v(14, 3, 13, 7, 6)[:, :, 1:-1, 1:-1], f(5, 2, 3), scale, 11), channels)
    yield Sample("expanded", (w, b, v(11, 1, 13).expand(6, 13), f(5, 1, 1).expand(4, 6), 0.3, 11))
    yield Sample("no-rows", (w, b, x[:0], f(5, 4, 6)[:, :0], 0.3, 11))
    yield Sample("no-features", (w[:0], b[:0], x[:, :0], f(5, 4, 6), 0.3, 11))

    loss = f(5, 4, 6)
    yield Sample("sigma-zero", (w, b, x, loss, 0.0, 1), error="'sigma' must be finite and positive, got 0.0")
    yield Sample("loss-shape", (w, b, x, loss[:, :5], 0.3, 1), error=r"'loss_weight' must be \[copies, 6\]")
    yield Sample(
        "positions-rule", (w, b, x, loss, 0.3, 1), {"positions": 4}, error="'positions' must divide the 6 rows"
    )
    yield Sample("no-copies", (w, b, x, loss[:0], 0.3, 1), error="'copies' must be at least 1, got 0")
    yield Sample("odd", (w, b, x, loss[:3], 0.3, 1), pairs, error="'copies' must be even")
    yield Sample("x-copies", (w, b, v(6, 3, 6, 13), loss, 0.3, 1), {"shared": False}, error="'x' must have 4 copies")
    yield Sample("x-dtype", (w, b, x.double(), loss, 0.3, 1), error="'x' must be float32")
    yield Sample("axis", (w, b, x, loss, 0.3, 1), {"feature_dim": 2}, error="'feature_dim' must be an axis")
    yield Sample("weight-shape", (w[:5], b, x, loss, 0.3, 1), error=r"'grad_weight' must be a scalar or \[13\]")
    yield Sample("bias-shape", (w, b[:5], x, loss, 0.3, 1), error=r"'grad_bias' must be a scalar or \[13\]")
    yield Sample("no-buffer", (None, None, x, loss, 0.3, 1), error="'grad_weight' must be given")
    yield Sample("buffer-dtype", (w.double(), b, x, loss, 0.3, 1), error="'grad_weight' must be float32")
    yield Sample(
        "density",
        (w, b, x, loss, 0.3, 1),
        {"dist": "rademacher", "grad_log_sigma": f(7)},
        error="'grad_log_sigma' must be None where dist is 'rademacher'",
    )
    yield Sample("self-overlap", (w[:1].expand(13), b, x, loss, 0.3, 1), error="'grad_weight' must not overlap itself")
    yield Sample("overlap", (w, w, x, loss, 0.3, 1), error="'grad_weight' must not overlap 'grad_bias'")
