"""Samples of noise_score."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from samples import HADAMARD, Sample, values


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    def f(seed: int, *shape: int) -> Tensor:
        return values(seed, *shape, device=device, dtype=torch.float32)

    scale, image, channels = f(4, 13).abs() + 0.1, (3, 13, 5, 4), {"feature_dim": 1}
    yield Sample("one", ((6, 20), f(5, 1, 6), 0.3, 11))
    yield Sample("vector", ((20,), f(5, 4, 1), 0.3, 11), {"draw": 5})
    yield Sample("tokens", ((2, 5, 13), f(5, 4, 2), scale, -11), {"positions": 5, "antithetic": True})
    yield Sample("image", (image, f(5, 4, 3), scale, 11), {"positions": 20, "antithetic": True, **channels})
    yield Sample("image-laplace", (image, f(5, 3, 60), 0.3, 11), {"dist": "laplace", **channels})
    yield Sample(
        "image-signs", ((2, 131, 3, 11), f(5, 3, 2), 0.5, 2**63), {"dist": "rademacher", "positions": 33} | channels
    )
    yield Sample("signs", ((33, 150), f(5, 2, 33), 0.5, 2**63), {"dist": "rademacher", "antithetic": True})
    yield Sample("wide", ((5, 1100), f(5, 3, 5), 0.5, 12))
    yield Sample("image-wide", ((1, 70, 9, 17), f(5, 5, 1), 0.5, 12), {"positions": 153, **channels})
    yield Sample("sobol", (image, f(5, 4, 3), scale, 11), {"sampler": "sobol", "positions": 20, **channels})
    crossing = {**HADAMARD, "draw": 2**16 - 2, "row_offset": 3, "positions": 33, "col_offset": 37, "width": 200}
    yield Sample("hadamard", ((2, 131, 3, 11), f(5, 6, 2), 0.5, 11), {"antithetic": True, **crossing, **channels})
    yield Sample("hadamard-draws", ((6, 20), f(5, 5, 6), 0.3, 11), {**HADAMARD, "draw": 8})
    yield Sample("offsets", ((6, 20), f(5, 2, 6), 0.3, 11), {"draw": 9, "row_offset": 1000, "col_offset": 129})
    yield Sample(
        "strided-losses", ((6, 13), f(5, 18, 8).T[::2, ::3], scale.repeat_interleave(2)[::2], 11), {"positions": 1}
    )
    yield Sample("no-rows", ((0, 20), f(5, 4, 0), 0.3, 11))
    yield Sample("no-features", ((6, 0), f(5, 4, 6), 0.3, 11))

    loss = f(5, 4, 6)
    yield Sample("sigma-zero", ((6, 20), loss, 0.0, 1), error="'sigma' must be finite and positive, got 0.0")
    yield Sample("sigma-shape", ((6, 20), loss, scale, 1), error=r"'sigma' must be a scalar or \[20\]")
    yield Sample("loss-shape", ((5, 20), loss, 0.3, 1), error=r"'loss_weight' must be \[copies, 5\]")
    yield Sample("loss-dtype", ((6, 20), loss.double(), 0.3, 1), error="'loss_weight' must be float32")
    yield Sample(
        "positions-rule", ((6, 20), loss, 0.3, 1), {"positions": 4}, error="'positions' must divide the 6 rows"
    )
    yield Sample("no-copies", ((6, 20), loss[:0], 0.3, 1), error="'copies' must be at least 1, got 0")
    yield Sample("odd", ((6, 20), loss[:3], 0.3, 1), {"antithetic": True}, error="'copies' must be even")
    yield Sample("scalar", ((), loss, 0.3, 1), error="'shape' must have at least one axis")
    yield Sample("negative-size", ((6, -1), loss, 0.3, 1), error="'shape' must have sizes of at least 0")
    yield Sample(
        "axis", ((6, 20), loss, 0.3, 1), {"feature_dim": -3}, error="'feature_dim' must be an axis of a copy's"
    )
