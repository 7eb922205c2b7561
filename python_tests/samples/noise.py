"""Samples of noise."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from samples import HADAMARD, Sample
from ulr_kernels import noise_contract


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    on = {"device": device}
    for dist in noise_contract.DISTRIBUTIONS:
        yield Sample(f"{dist}-scalar", ((), 1), {"dist": dist, **on})
        yield Sample(f"{dist}-vector", (13, -5), {"dist": dist, **on})
        yield Sample(f"{dist}-odd", ((3, 5, 131), 2**63 - 1), {"dist": dist, "draw": 7, **on})
        yield Sample(f"{dist}-narrow", ((67, 3), 9), {"dist": dist, **on})
        yield Sample(
            f"{dist}-offset", ((4, 300), 77), {"dist": dist, "row_offset": 2**32 - 4, "col_offset": 2**34 - 300, **on}
        )
        yield Sample(f"{dist}-slice", ((5, 9), 77), {"dist": dist, "row_offset": 3, "col_offset": 130, **on})
        yield Sample(f"{dist}-empty", ((4, 0), 77), {"dist": dist, **on})
    for dist in ("normal", "laplace"):
        yield Sample(f"{dist}-sobol", ((6, 37), 3), {"dist": dist, "sampler": "sobol", "draw": 12345, **on})
        yield Sample(
            f"{dist}-sobol-positions",
            ((7, 37), 3),
            {"dist": dist, "sampler": "sobol", "positions": 3, "draw": 2**30 - 1, "row_offset": 5, **on},
        )
    for draw in (0, 1, 0xFFFF, 0x1ABCD, 2**32 - 1):
        at = {"draw": draw, "row_offset": 5, "col_offset": 101, "positions": 3, "width": 300}
        yield Sample(f"hadamard-{draw}", ((7, 170), 3), {**HADAMARD, **at, **on})
    yield Sample("hadamard-narrow", ((67, 3), 9), {**HADAMARD, "draw": 0x35, **on})
    last = {"positions": 2**32, "row_offset": 2**32 - 3, "col_offset": 2**34 - 9, "width": 2**34}
    yield Sample("hadamard-limits", ((3, 9), 9), {**HADAMARD, "draw": 0x70F0F, **last, **on})
    yield Sample("no-rows-below", ((0, 4), 77), {"row_offset": 2**32, **on})
    yield Sample("draw-limit", ((2, 2), 1), {"draw": 2**32, **on}, error=r"'draw' must leave room for 1 below 2\^32")
    yield Sample("row-limit", ((2, 2), 1), {"row_offset": 2**32 - 1, **on}, error="'row_offset' must leave room")
    yield Sample("col-limit", ((2, 2), 1), {"col_offset": 2**34 - 1, **on}, error="'col_offset' must leave room")
    yield Sample("negative", ((2, 2), 1), {"draw": -1, **on}, error="'draw' must be at least 0, got -1")
    yield Sample("negative-size", ((2, -2), 1), on, error="'shape' must have sizes of at least 0")
    yield Sample("dist", ((2, 2), 1), {"dist": "cauchy", **on}, error="'dist' must be one of .*, got 'cauchy'")
    yield Sample("sampler", ((2, 2), 1), {"sampler": "halton", **on}, error="'sampler' must be one of")
    yield Sample("key", ((2, 2), 2**64), on, error="'key' must be an integer in")
    yield Sample("key-float", ((2, 2), 0.5), on, error="'key' must be an integer in")
    yield Sample(
        "sobol-signs", ((2, 2), 1), {"dist": "rademacher", "sampler": "sobol", **on}, error="'sampler' must be 'iid'"
    )
    yield Sample("hadamard-normal", ((2, 2), 1), {"sampler": "hadamard", **on}, error="'dist' must be 'rademacher'")
    part = {**HADAMARD, "positions": 2, "col_offset": 4}
    yield Sample("hadamard-part", ((2, 2), 1), {**part, **on}, error="'width' must count the columns of the whole")
    yield Sample("hadamard-few", ((2, 2), 1), {**part, "width": 5, **on}, error="'width' must be at least 6")
    yield Sample(
        "sobol-wide", ((2, 21202), 1), {"sampler": "sobol", **on}, error="'sampler' must be 'iid' beyond 21201"
    )
    yield Sample("sobol-draw", ((2, 2), 1), {"sampler": "sobol", "draw": 2**30, **on}, error="'draw' must leave room")
