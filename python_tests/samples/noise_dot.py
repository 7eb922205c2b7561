"""Samples of noise_dot."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from samples import Sample, values


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    def x(seed: int, *shape: int) -> Tensor:
        return values(seed, *shape, device=device, dtype=dtype)

    scale, channels = values(4, 13, device=device, dtype=torch.float32).abs() + 0.1, {"feature_dim": 1}
    signs = {"dist": "rademacher", "sampler": "hadamard"}
    yield Sample("one", (x(5, 6, 20), 0.3, 11))
    yield Sample("vector", (x(5, 20), 0.3, 11), {"draw": 5, "copies": 4})
    yield Sample("tokens", (x(5, 2, 5, 13), scale, -11), {"positions": 5, "copies": 4, "antithetic": True})
    yield Sample("image", (x(5, 3, 13, 5, 4), scale, 11), {"positions": 20, "copies": 6, **channels})
    yield Sample("wide", (x(5, 2, 1100), 0.5, 12), {"copies": 3, "dist": "laplace"})
    yield Sample("signs", (x(5, 8, 150), 0.5, 2**63), {"copies": 4, "positions": 8, "dist": "rademacher"})
    yield Sample("sobol", (x(5, 6, 20), 0.3, 11), {"sampler": "sobol", "positions": 2, "copies": 3})
    yield Sample("hadamard", (x(5, 3, 13, 5, 4), scale, 11), {"positions": 20, "copies": 16, **channels, **signs})
    yield Sample("hadamard-blocks", (x(5, 6, 140), 0.3, 11), {"draw": 2**16 - 3, "copies": 6, "positions": 3, **signs})
    crossing = {"draw": 2**16 - 3, "copies": 600, "antithetic": True}
    yield Sample("hadamard-many-copies", (x(5, 2, 20), 0.3, 11), {**crossing, **signs})
    yield Sample("offsets", (x(5, 6, 20), 0.3, 11), {"draw": 9, "row_offset": 1000, "col_offset": 129})
    yield Sample("strided", (x(5, 20, 12).T[::2], 0.3, 11), {"copies": 2})
    yield Sample("no-rows", (x(5, 0, 20), 0.3, 11))
    yield Sample("no-features", (x(5, 6, 0), 0.3, 11), {"copies": 2})

    yield Sample("sigma-negative", (x(5, 6, 20), -0.1, 1), error="'sigma' must be finite and at least 0, got -0.1")
    yield Sample("sigma-shape", (x(5, 6, 20), scale, 1), error=r"'sigma' must be a scalar or \[20\]")
    yield Sample("positions-rule", (x(5, 6, 20), 0.3, 1), {"positions": 4}, error="'positions' must divide the 6 rows")
    yield Sample("no-copies", (x(5, 6, 20), 0.3, 1), {"copies": 0}, error="'copies' must be at least 1, got 0")
    yield Sample("dtype", (x(5, 6, 20).long(), 0.3, 1), error="'x' must be float32 or bfloat16 or float16")
