"""Samples of perturbed_conv2d."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from samples import HADAMARD, Sample, values


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    def v(seed: int, *shape: int) -> Tensor:
        return values(seed, *shape, device=device, dtype=dtype)

    x, w, b = v(1, 2, 3, 9, 8), v(2, 6, 3, 3, 3), v(3, 6)
    own, pairs = v(4, 4, 2, 3, 9, 8), {"copies": 4, "antithetic": True}
    mask = v(5, 6, 3, 3, 3) > 0
    at = {"draw": 9, "row_offset": 1000, "col_offset": 130}
    yield Sample("one", (x, w, b, 0.3, 11))
    yield Sample("minus", (x, w, None, -0.3, 11), {"padding": 1, "stride": (2, 1)})
    yield Sample("pairs", (own, w, v(6, 4, 6), 0.3, -11), {**pairs, "padding": (2, 1), "dilation": 2})
    yield Sample("signs", (x, w, b, 0.3, 11), {"dist": "rademacher", "copies": 3, **at})
    placed = {**HADAMARD, **at, "draw": 2**16 - 1, "width": 200}
    yield Sample("hadamard", (own, w, b, 0.3, 11), {**pairs, **placed})
    yield Sample("depthwise", (x, v(7, 6, 1, 3, 2), b, 0.3, 11), {"groups": 3, "padding": "same", "dist": "laplace"})
    yield Sample("pointwise", (x, v(8, 6, 3, 1, 1), b, 0.3, 11), {"copies": 2, "padding": "valid"})
    yield Sample("mask", (x, w, b, 0.3, 11), {"mask": mask, **pairs})
    channels_last = (x.to(memory_format=torch.channels_last), w.to(memory_format=torch.channels_last), b, 0.3, 11)
    yield Sample("channels-last", channels_last, {"copies": 2, "mask": mask.to(torch.uint8)})
    yield Sample("strided", (v(9, 4, 3, 9, 16)[::2, :, :, ::2], v(10, 6, 6, 3, 3)[:, ::2], v(11, 12)[::2], 0.3, 11))
    yield Sample("low-rank", (own, w, b, -0.3, 11), {"rank": 2, **pairs, **at})
    yield Sample("no-images", (x[:0], w, b, 0.3, 11), {"copies": 2})

    yield Sample("x-channels", (x[:, :2], w, b, 0.3, 1), error="'x' must have 3 channels")
    yield Sample("x-rank", (x[0], w, b, 0.3, 1), error=r"'x' must be \[B, I, H, W\] or \[C, B, I, H, W\]")
    yield Sample("x-copies", (own, w, b, 0.3, 1), {"copies": 2}, error="'x' must have 2 copies")
    yield Sample("x-small", (x[..., :2], w, b, 0.3, 1), error="'x' must have images large enough for a kernel of")
    yield Sample("weight-rank", (x, w[0], b, 0.3, 1), error=r"'weight' must be \[O, I / groups, kh, kw\]")
    yield Sample("no-filters", (x, w[:0], b[:0], 0.3, 1), error="'weight' must be .*, none of them 0")
    yield Sample("bias-shape", (x, w, b[:5], 0.3, 1), error=r"'bias' must be \[6\], or \[1, 6\]")
    yield Sample("groups", (x, w, b, 0.3, 1), {"groups": 4}, error="'groups' must divide the 6 channels of weight")
    yield Sample("stride", (x, w, b, 0.3, 1), {"stride": 0}, error="'stride' must be at least 1")
    yield Sample("padding", (x, w, b, 0.3, 1), {"padding": (1, -1)}, error="'padding' must be at least 0")
    yield Sample("padding-name", (x, w, b, 0.3, 1), {"padding": "full"}, error="'padding' must be an integer, a pair, ")
    same = {"padding": "same", "stride": 2}
    yield Sample("same-stride", (x, w, b, 0.3, 1), same, error="'padding' must be no 'same' where stride is not 1")
    yield Sample("three", (x, w, b, 0.3, 1), {"dilation": (1, 1, 1)}, error="'dilation' must be an integer or a pair")
    yield Sample("mask-shape", (x, w, b, 0.3, 1), {"mask": mask[:5]}, error=r"'mask' must be \[6, 3, 3, 3\]")
