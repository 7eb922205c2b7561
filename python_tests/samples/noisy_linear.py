"""Samples of noisy_linear."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from samples import HADAMARD, Sample, values


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    def v(seed: int, *shape: int) -> Tensor:
        return values(seed, *shape, device=device, dtype=dtype)

    x, w, b = v(1, 7, 20), v(2, 13, 20), v(3, 13)
    scale = values(4, 13, device=device, dtype=torch.float32).abs() + 0.1
    yield Sample("one", (x, w, b, 0.3, 11))
    yield Sample("no-bias", (x, w, None, 0.3, 11), {"copies": 3, "draw": 5})
    yield Sample("per-feature", (x, w, b, scale, -11), {"copies": 4, "antithetic": True})
    yield Sample("silent", (x, w, b, 0.0, 11), {"copies": 2})
    yield Sample("separate", (v(5, 4, 7, 20), w, b, 0.3, 11), {"copies": 4, "antithetic": True, "dist": "laplace"})
    yield Sample("signs", (v(6, 33, 70), v(7, 150, 70), None, 0.5, 2**63), {"copies": 2, "dist": "rademacher"})
    yield Sample("wide", (v(8, 65, 129), v(9, 131, 129), v(10, 131), 0.5, 12), {"copies": 3})
    yield Sample("sobol", (x, w, b, 0.3, 11), {"copies": 4, "sampler": "sobol", "row_offset": 3})
    yield Sample("sobol-positions", (v(5, 6, 20), w, b, 0.3, 11), {"copies": 4, "sampler": "sobol", "positions": 3})
    crossing = {**HADAMARD, "draw": 2**16 - 2, "row_offset": 3, "col_offset": 37, "positions": 2, "width": 200}
    yield Sample("hadamard", (v(6, 8, 20), v(7, 150, 20), None, 0.5, 11), {"copies": 6, "antithetic": True, **crossing})
    yield Sample("hadamard-separate", (v(5, 3, 7, 20), w, b, 0.3, 11), {"copies": 3, "draw": 5, **HADAMARD})
    yield Sample("offsets", (x, w, b, 0.3, 11), {"copies": 2, "draw": 9, "row_offset": 1000, "col_offset": 129})
    yield Sample("transposed", (v(11, 20, 7).T, v(12, 20, 13).T, b, 0.3, 11), {"copies": 2})
    yield Sample("strided", (v(13, 14, 40)[::2, ::2], v(14, 26, 60)[::2, ::3], v(15, 26)[::2], 0.3, 11))
    yield Sample("expanded", (v(16, 1, 20).expand(7, 20), w, b, scale[:1].expand(13), 11), {"copies": 2})
    yield Sample("no-rows", (x[:0], w, b, 0.3, 11), {"copies": 2})
    yield Sample("no-features", (x, w[:0], b[:0], 0.3, 11))
    yield Sample("no-inputs", (x[:, :0], w[:, :0], b, 0.3, 11), {"copies": 2})

    yield Sample("x-features", (v(1, 7, 21), w, b, 0.3, 1), error=r"'x' must have 20 features .*, got \[7, 21\]")
    yield Sample("x-rank", (v(1, 20), w, b, 0.3, 1), error=r"'x' must be \[R, K\] or \[C, R, K\]")
    yield Sample("x-dtype", (x.double(), w, b, 0.3, 1), error="'x' must be float32")
    yield Sample("x-copies", (v(5, 4, 7, 20), w, b, 0.3, 1), {"copies": 2}, error="'x' must have 2 copies")
    yield Sample("weight-dtype", (x, w.double(), b, 0.3, 1), error="'weight' must be")
    yield Sample("weight-rank", (x, b, b, 0.3, 1), error=r"'weight' must be \[N, K\]")
    yield Sample("bias-shape", (x, w, b[:5], 0.3, 1), error=r"'bias' must be \[13\]")
    yield Sample("sigma-negative", (x, w, b, -0.5, 1), error="'sigma' must be finite and at least 0, got -0.5")
    yield Sample("sigma-nan", (x, w, b, float("nan"), 1), error="'sigma' must be finite")
    yield Sample("sigma-text", (x, w, b, "abc", 1), error="'sigma' must be a finite number or a tensor, got 'abc'")
    yield Sample("sigma-shape", (x, w, b, scale[:5], 1), error=r"'sigma' must be a scalar or \[13\]")
    yield Sample("copies", (x, w, b, 0.3, 1), {"copies": 0}, error="'copies' must be at least 1, got 0")
    yield Sample("odd", (x, w, b, 0.3, 1), {"copies": 3, "antithetic": True}, error="'copies' must be even")
    yield Sample("draws", (x, w, b, 0.3, 1), {"copies": 2, "draw": 2**32 - 1}, error="'draw' must leave room for 2")
    yield Sample("rows", (x, w, b, 0.3, 1), {"row_offset": 2**32 - 6}, error="'row_offset' must leave room for 7")
    yield Sample("dist", (x, w, b, 0.3, 1), {"dist": "cauchy"}, error="'dist' must be one of")
