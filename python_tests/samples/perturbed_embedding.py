"""Samples of perturbed_embedding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from samples import HADAMARD, Sample, values


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    def v(seed: int, *shape: int) -> Tensor:
        return values(seed, *shape, device=device, dtype=dtype)

    table = v(1, 31, 20)
    few, own = (torch.arange(n, device=device) * 17 % 31 for n in (7, 36))
    own = own.view(4, 9)
    pairs = {"copies": 4, "antithetic": True}
    at = {"draw": 9, "row_offset": 1000, "col_offset": 130}
    mask = v(2, 31, 20) > 0
    yield Sample("one", (few, table, 0.3, 11))
    yield Sample("minus", (few, table, -0.3, 11), {"draw": 3})
    yield Sample("repeated", (few * 0 + 5, table, 0.3, 11), {"copies": 2})
    yield Sample("pairs", (own, table, 0.3, -11), {**pairs, "dist": "laplace"})
    yield Sample("signs", (few, v(3, 31, 170), 0.5, 2**63), {**pairs, "dist": "rademacher", **at})
    placed = {**HADAMARD, **at, "draw": 2**16 - 1, "width": 400}
    yield Sample("hadamard", (few, v(3, 31, 170), 0.5, 11), {**pairs, **placed})
    yield Sample("wide", (few, v(4, 31, 2100), 0.5, 12), {"copies": 2, "col_offset": 3})
    yield Sample("mask", (own, table, 0.3, 11), {**pairs, "mask": mask})
    yield Sample("offsets", (few, table, 0.3, 11), {"copies": 2, **at})
    yield Sample("strided", (own.T[:, 1], v(5, 62, 60)[::2, ::3], 0.3, 11), {"mask": mask.to(torch.uint8)})
    yield Sample("expanded", (few[:1].expand(5), v(6, 31, 1).expand(31, 20), 0.3, 11))
    yield Sample("empty", (few[:0], table, 0.3, 11), {"copies": 2})
    yield Sample("no-columns", (few, table[:, :0], 0.3, 11))
    yield Sample("low-rank", (own, table, -0.3, 11), {"rank": 3, **pairs, **at})
    yield Sample("low-rank-signs", (few, v(3, 31, 170), 0.3, 11), {"rank": 2, "copies": 2, "dist": "rademacher"})

    yield Sample("indices-dtype", (few.int(), table, 0.3, 1), error="'indices' must be int64")
    yield Sample("indices-rank", (own[None], table, 0.3, 1), error=r"'indices' must be \[R\] or \[C, R\]")
    yield Sample("indices-copies", (own, table, 0.3, 1), {"copies": 2}, error="'indices' must have 2 copies")
    yield Sample("weight-rank", (few, table[0], 0.3, 1), error=r"'weight' must be \[V, D\]")
    yield Sample("weight-dtype", (few, table.double(), 0.3, 1), error="'weight' must be float32")
    yield Sample("sigma", (few, table, float("inf"), 1), error="'sigma' must be finite")
    yield Sample("mask-shape", (few, table, 0.3, 1), {"mask": mask[:5]}, error=r"'mask' must be \[31, 20\]")
    if device == "cpu":
        yield Sample("too-large", (few + 31, table, 0.3, 1), error=r"'indices' must lie in \[0, 31\), got 31")
        yield Sample("negative", (few - 1, table, 0.3, 1), error=r"'indices' must lie in \[0, 31\), got -1")
