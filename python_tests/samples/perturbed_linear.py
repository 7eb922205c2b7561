"""Samples of perturbed_linear."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from samples import HADAMARD, Sample, values


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    def v(seed: int, *shape: int) -> Tensor:
        return values(seed, *shape, device=device, dtype=dtype)

    x, w, b, many = v(1, 7, 20), v(2, 13, 20), v(3, 13), v(4, 40, 20)
    own, pairs = v(5, 4, 7, 20), {"copies": 4, "antithetic": True}
    mask = v(6, 13, 20) > 0
    yield Sample("one", (x, w, b, 0.3, 11))
    yield Sample("minus", (x, w, b, -0.3, 11))
    yield Sample("no-bias", (x, w, None, 0.3, 11), {"copies": 3, "draw": 5})
    yield Sample("silent", (x, w, b, 0.0, 11), {"copies": 2})
    yield Sample("many-rows", (many, w, b, 0.3, 11), {"copies": 2})
    yield Sample("pairs", (x, w, v(7, 4, 13), 0.3, -11), pairs)
    yield Sample("separate", (own, w, b, 0.3, 11), {**pairs, "dist": "laplace"})
    yield Sample("separate-many-rows", (v(8, 2, 70, 20), w, v(7, 2, 13), 0.3, 11), {"copies": 2, "antithetic": True})
    yield Sample("signs", (v(9, 33, 170), v(10, 150, 170), None, 0.5, 2**63), {"copies": 2, "dist": "rademacher"})
    yield Sample("wide", (v(11, 5, 1100), v(12, 70, 1100), None, 0.1, 12), {"copies": 2})
    yield Sample("mask", (x, w, b, 0.3, 11), {"mask": mask})
    yield Sample("mask-bytes", (many, w, b, 0.3, 11), {**pairs, "mask": mask.to(torch.uint8).T.contiguous().T})
    at = {"draw": 9, "row_offset": 1000, "col_offset": 130}
    yield Sample("offsets", (x, w, b, 0.3, 11), {"copies": 2, **at})
    yield Sample("offsets-many-rows", (many, w, b, 0.3, 11), {"draw": 9, "row_offset": 1001, "col_offset": 129})
    placed = {**HADAMARD, **at, "draw": 2**16 - 1, "width": 200}
    yield Sample("hadamard", (own, w, b, 0.3, 11), {**pairs, **placed})
    yield Sample(
        "hadamard-many-rows", (v(20, 40, 170), v(10, 13, 170), b, 0.3, 11), {"copies": 2, **HADAMARD, "draw": 5}
    )
    yield Sample("offsets-signs", (x, w, b, 0.3, 11), {"dist": "rademacher", **at})
    yield Sample("transposed", (v(13, 20, 7).T, v(14, 20, 13).T, b, 0.3, 11), {"copies": 2})
    strided = (v(15, 14, 40)[::2, ::2], v(16, 26, 60)[::2, ::3], v(17, 26)[::2], 0.3, 11)
    yield Sample("strided", strided)
    yield Sample("strided-bias", (many, w, v(17, 26)[::2], 0.3, 11))
    yield Sample("expanded-bias", (many, w, v(17, 1).expand(13), 0.3, 11))
    yield Sample("expanded", (v(18, 1, 20).expand(70, 20), v(19, 13, 1).expand(13, 20), b, 0.3, 11))
    yield Sample("no-rows", (x[:0], w, b, 0.3, 11), {"copies": 2})
    yield Sample("no-features", (x, w[:0], b[:0], 0.3, 11))
    yield Sample("no-inputs", (x[:, :0], w[:, :0], b, 0.3, 11), {"copies": 2})
    yield Sample("low-rank", (x, w, b, 0.3, 11), {"rank": 1})
    yield Sample("low-rank-copies", (own, w, v(7, 4, 13), -0.3, 11), {"rank": 3, **pairs})
    yield Sample("low-rank-shared", (many, w, None, 0.3, 11), {"rank": 2, "copies": 3, "dist": "rademacher", **at})
    yield Sample("low-rank-wide", (v(9, 33, 170), v(10, 150, 170), None, 0.5, 12), {"rank": 17})
    yield Sample("low-rank-strided", strided, {"rank": 2, "dist": "laplace"})
    yield Sample("low-rank-no-inputs", (x[:, :0], w[:, :0], b, 0.3, 11), {"rank": 2})
    yield Sample("low-rank-no-rows", (own[:, :0], w, b, 0.3, 11), {"rank": 2, **pairs})

    yield Sample("x-features", (v(1, 7, 21), w, b, 0.3, 1), error=r"'x' must have 20 features .*, got \[7, 21\]")
    yield Sample("x-rank", (v(1, 20), w, b, 0.3, 1), error=r"'x' must be \[R, K\] or \[C, R, K\]")
    yield Sample("x-dtype", (x.double(), w, b, 0.3, 1), error="'x' must be float32")
    yield Sample("x-copies", (own, w, b, 0.3, 1), {"copies": 2}, error="'x' must have 2 copies")
    yield Sample("weight-dtype", (x, w.double(), b, 0.3, 1), error="'weight' must be")
    yield Sample("weight-rank", (x, b, b, 0.3, 1), error=r"'weight' must be \[N, K\]")
    yield Sample("bias-shape", (x, w, b[:5], 0.3, 1), error=r"'bias' must be \[13\], or \[1, 13\]")
    yield Sample("sigma-nan", (x, w, b, float("nan"), 1), error="'sigma' must be finite in fp32, got nan")
    yield Sample("sigma-infinite", (x, w, b, -float("inf"), 1), error="'sigma' must be finite")
    yield Sample("sigma-overflow", (x, w, b, 1e39, 1), error=r"'sigma' must be finite in fp32, got 1e\+39")
    yield Sample("sigma-text", (x, w, b, "abc", 1), error="'sigma' must hold finite numbers, got 'abc'")
    yield Sample("sigma-none", (x, w, b, None, 1), error="'sigma' must be a finite number or a tensor, got None")
    yield Sample("sigma-shape", (x, w, b, b.float(), 1), error="'sigma' must be a scalar")
    yield Sample("copies", (x, w, b, 0.3, 1), {"copies": 0}, error="'copies' must be at least 1, got 0")
    yield Sample("odd", (x, w, b, 0.3, 1), {"copies": 3, "antithetic": True}, error="'copies' must be even")
    yield Sample("rank-zero", (x, w, b, 0.3, 1), {"rank": 0}, error="'rank' must be None or at least 1, got 0")
    yield Sample("draws", (x, w, b, 0.3, 1), {"copies": 2, "draw": 2**32 - 1}, error="'draw' must leave room for 2")
    yield Sample("rows", (x, w, b, 0.3, 1), {"row_offset": 2**32 - 6}, error="'row_offset' must leave room for 13")
    yield Sample("dist", (x, w, b, 0.3, 1), {"dist": "cauchy"}, error="'dist' must be one of")
    yield Sample("mask-dtype", (x, w, b, 0.3, 1), {"mask": w}, error="'mask' must be bool or uint8")
    yield Sample("mask-shape", (x, w, b, 0.3, 1), {"mask": mask[:5]}, error=r"'mask' must be \[13, 20\]")
    yield Sample("mask-rank", (x, w, b, 0.3, 1), {"mask": mask, "rank": 1}, error="'mask' must be None where rank")
