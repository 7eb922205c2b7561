"""Samples of noise_add."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from samples import HADAMARD, Sample, values


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    def v(seed: int, *shape: int) -> Tensor:
        return values(seed, *shape, device=device, dtype=dtype)

    x, image = v(1, 7, 20), v(2, 3, 13, 5, 4)
    scale = values(4, 13, device=device, dtype=torch.float32).abs() + 0.1
    channels = {"feature_dim": 1}
    yield Sample("one", (x, 0.3, 11))
    yield Sample("vector", (x[0], 0.3, 11), {"copies": 3, "draw": 5})
    yield Sample("tokens", (v(3, 2, 5, 13), scale, -11), {"copies": 4, "antithetic": True})
    yield Sample("separate", (v(5, 4, 7, 20), 0.3, 11), {"copies": 4, "shared": False, "antithetic": True})
    yield Sample("image", (image, scale, 11), {"copies": 4, "antithetic": True, "dist": "laplace", **channels})
    yield Sample("image-separate", (image, 0.3, 11), {"copies": 3, "shared": False, "feature_dim": 0})
    yield Sample("channels-last", (image.contiguous(memory_format=torch.channels_last), scale, 11), channels)
    yield Sample(
        "channels-last-copies",
        (v(6, 4, 3, 5, 2, 13).movedim(-1, 2), scale, 11),
        {"copies": 4, "shared": False, "antithetic": True, **channels},
    )
    yield Sample("image-signs", (v(7, 2, 131, 3, 11), 0.5, 2**63), {"copies": 2, "dist": "rademacher", **channels})
    yield Sample("signs", (v(8, 33, 150), 0.5, 2**63), {"copies": 2, "dist": "rademacher", "antithetic": True})
    yield Sample("wide", (v(9, 5, 1100), 0.5, 12), {"copies": 2})
    yield Sample("image-wide", (v(10, 1, 70, 9, 17), 0.5, 12), {"copies": 5, **channels})
    yield Sample("silent", (x, 0.0, 11), {"copies": 2})
    yield Sample(
        "sobol",
        (image, scale, 11),
        {"copies": 4, "sampler": "sobol", "positions": 20, "row_offset": 40, "antithetic": True, **channels},
    )
    crossing = {**HADAMARD, "draw": 2**16 - 2, "row_offset": 3, "positions": 33, "col_offset": 37, "width": 200}
    yield Sample("hadamard", (v(7, 2, 131, 3, 11), 0.5, 11), {"copies": 6, "antithetic": True, **crossing, **channels})
    yield Sample("offsets", (x, 0.3, 11), {"copies": 2, "draw": 9, "row_offset": 1000, "col_offset": 129})
    yield Sample("strided", (v(11, 14, 40)[::2, ::2], 0.3, 11), {"copies": 2})
    yield Sample("transposed", (v(12, 20, 7).T, 0.3, 11), {"copies": 2, "antithetic": True})
    yield Sample("sequence-first", (v(13, 5, 2, 13).transpose(0, 1), scale, 11), {"copies": 2})
    yield Sample("cropped", (v(14, 3, 13, 7, 6)[:, :, 1:-1, 1:-1], scale, 11), {"copies": 2, **channels})
    yield Sample("expanded", (v(15, 1, 20).expand(7, 20), 0.3, 11), {"copies": 2})
    yield Sample("many-axes", (v(16, 2, 3, 2, 2, 5).permute(2, 0, 3, 1, 4)[:, :, :, ::2], 0.3, 11), {"copies": 2})
    yield Sample("no-rows", (x[:0], 0.3, 11), {"copies": 2})
    yield Sample("no-features", (x[:, :0], 0.3, 11))
    yield Sample("no-images", (image[:0], 0.3, 11), {"copies": 2, **channels})

    yield Sample("x-dtype", (x.double(), 0.3, 1), error="'x' must be float32")
    yield Sample("x-scalar", (x[0, 0], 0.3, 1), error=r"'x' must have at least one axis, got \[\]")
    yield Sample("x-copies", (x, 0.3, 1), {"copies": 2, "shared": False}, error="'x' must have 2 copies on its first")
    yield Sample("axis", (x, 0.3, 1), {"feature_dim": 2}, error=r"'feature_dim' must be an axis of a copy's \[7, 20\]")
    yield Sample("sigma-negative", (x, -0.5, 1), error="'sigma' must be finite and at least 0, got -0.5")
    yield Sample("sigma-shape", (image, scale[:5], 1), channels, error=r"'sigma' must be a scalar or \[13\]")
    yield Sample("copies", (x, 0.3, 1), {"copies": 0}, error="'copies' must be at least 1, got 0")
    yield Sample("odd", (x, 0.3, 1), {"copies": 3, "antithetic": True}, error="'copies' must be even")
    yield Sample("rows", (x, 0.3, 1), {"row_offset": 2**32 - 6}, error="'row_offset' must leave room for 7")
    yield Sample("dist", (x, 0.3, 1), {"dist": "cauchy"}, error="'dist' must be one of")
