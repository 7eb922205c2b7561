"""Parameters as models have them, and the bad calls that all ops on lists refuse."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from samples import HADAMARD, Sample, values
from ulr_kernels import noise_contract


def parameters(device: str, dtype: torch.dtype) -> list[Tensor]:
    """The shapes that models have: matrices, convolutions in two memory formats, vectors, a scalar, nothing."""

    def v(seed: int, *shape: int) -> Tensor:
        return values(seed, *shape, device=device, dtype=dtype)

    return [
        v(1, 9, 37),
        v(2, 150),
        v(3, 5, 3, 2, 3),
        v(4, 6, 5, 2, 2).to(memory_format=torch.channels_last),
        v(5),
        v(6, 0, 4),
        v(7, 3, 260),
        v(8, 2, 3, 4).permute(2, 0, 1),
        v(9, 40, 30)[1:33:2, 2:25:3],
        v(10, 33)[::2],
        v(11, 1, 8),
    ]


def site_keys(count: int) -> list[int]:
    return [noise_contract.fold_in(0x70, i) for i in range(count)]


def bad_samples(device: str, dtype: torch.dtype, amount: float | list[float]) -> Iterator[Sample]:
    """Calls (tensors, keys, amount) that break a rule of all ops on lists."""
    tensors = parameters(device, dtype)[:3]
    keys = site_keys(3)
    whole = tensors[0]
    at = {"row_offset": [0, 0, 0]}
    yield Sample("keys-few", (tensors, keys[:2], amount), error=r"'keys' must be \[3\] \(3 tensors\), got \[2\]")
    yield Sample("keys-range", (tensors, [0, 0, 2**64], amount), error="'key' must be an integer in")
    yield Sample("keys-dtype", (tensors, torch.zeros(3, device=device), amount), error="'keys' must be int64")
    yield Sample("key-scalar", (tensors[:1], torch.tensor(1, device=device), amount), error=r"'keys' must be \[1\]")
    yield Sample(
        "dtype", ([whole.double()], [1], amount), error=r"'tensors\[0\]' must be float32 or bfloat16 or float16"
    )
    yield Sample(
        "twice", ([whole, tensors[1], whole], keys, amount), error=r"'tensors\[0\]' must not overlap 'tensors\[2\]'"
    )
    yield Sample("part", ([tensors[1], whole, whole[:, 30:]], keys, amount), error=r"'tensors\[1\]' must not overlap")
    yield Sample("expanded", ([whole[:1].expand(4, 37)], [1], amount), error=r"'tensors\[0\]' must not overlap itself")
    yield Sample("dist", (tensors, keys, amount), {"dist": "cauchy"}, error="'dist' must be one of .*, got 'cauchy'")
    yield Sample("rank", (tensors, keys, amount), {"rank": 0}, error="'rank' must be at least 1, or None, got 0")
    yield Sample("draw", (tensors, keys, amount), {"draw": -1}, error="'draw' must be at least 0, got -1")
    yield Sample("draw-limit", (tensors, keys, amount), {"draw": 2**32}, error="'draw' must leave room for")
    yield Sample(
        "offsets-few", (tensors, keys, amount), {"row_offset": [1, 2]}, error="'row_offset' must have one number"
    )
    yield Sample(
        "row-limit", (tensors, keys, amount), at | {"row_offset": [0, 0, 2**32 - 4]}, error=r"'row_offset\[2\]' must"
    )
    yield Sample(
        "col-limit", (tensors, keys, amount), {"col_offset": [2**34 - 36, 0, 0]}, error=r"'col_offset\[0\]' must"
    )
    part = {**HADAMARD, "col_offset": [0, 0, 7]}
    yield Sample("sobol", (tensors, keys, amount), {"sampler": "sobol"}, error="'sampler' must be 'iid' or 'hadamard'")
    yield Sample(
        "hadamard-normal", (tensors, keys, amount), {"sampler": "hadamard"}, error="'dist' must be 'rademacher'"
    )
    yield Sample("hadamard-rank", (tensors, keys, amount), {**HADAMARD, "rank": 1}, error="'rank' must be None where")
    yield Sample("hadamard-part", (tensors, keys, amount), part, error=r"'width\[2\]' must count the columns")
    wild = values(1, *(2,) * 6, device=device, dtype=dtype).permute(5, 3, 1, 4, 2, 0)
    yield Sample("strides", ([wild], [1], amount), error="must have at most 4 axes after the first")
    half = whole.to(torch.float16)
    yield Sample(
        "fp16", ([half], [1], amount), {"stochastic": True}, error="must be float32 or bfloat16 where stochastic"
    )
