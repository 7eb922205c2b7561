"""Samples of noisy_conv2d."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from samples import HADAMARD, Sample, values


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
    crossing = {**HADAMARD, "draw": 2**16 - 2, "row_offset": 30, "col_offset": 37, "width": 200, "antithetic": True}
    yield Sample("hadamard", (x, w, b, scale, 11), {"copies": 6, **crossing})
    yield Sample("hadamard-separate", (v(10, 4, 2, 3, 6, 5), w, b, 0.3, 11), {"copies": 4, **crossing})
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
