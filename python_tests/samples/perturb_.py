"""Samples of perturb_."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from samples import HADAMARD, Sample
from samples.parameters import bad_samples, parameters, site_keys
from ulr_kernels import noise_contract


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    tensors = parameters(device, dtype)
    keys = site_keys(len(tensors))
    few = tensors[:3]
    for dist in noise_contract.DISTRIBUTIONS:
        yield Sample(dist, (tensors, keys, 0.3), {"dist": dist, "draw": 5})
    yield Sample("minus", (tensors, torch.tensor(keys, device=device), torch.tensor(-1e-3, device=device)))
    at = {"row_offset": [2**32 - 9, 3, 0], "col_offset": [2**34 - 37, 129, 7]}
    yield Sample("offsets", (few, keys[:3], 0.3), {"draw": 2**32 - 1, **at})
    yield Sample("offset-signs", (few, keys[:3], 0.3), {"dist": "rademacher", **at})
    yield Sample("hadamard", (tensors, keys, 0.3), {**HADAMARD, "draw": 0x1ABCD})
    yield Sample("offset-hadamard", (few, keys[:3], 0.3), {**HADAMARD, "draw": 0x35, **at, "width": [2**34, 0, 50]})
    yield Sample("rank-1", (tensors, keys, 0.3), {"rank": 1, "draw": 3})
    yield Sample("rank-3", (few, keys[:3], -0.3), {"rank": 3, "dist": "laplace", **at})
    yield Sample("rank-signs", (tensors, keys, 0.3), {"rank": 4, "dist": "rademacher"})
    if dtype != torch.float16:
        yield Sample("stochastic", (tensors, keys, 1e-3), {"stochastic": True, "draw": 2})
        yield Sample("stochastic-rank", (few, keys[:3], 1e-3), {"stochastic": True, "rank": 2, **at})
        yield Sample("mixed", ([few[0], few[1].float(), few[2].half()], keys[:3], 0.3))
    yield Sample("overflow", ([few[0] * 1e4], keys[:1], 3e38))
    no_keys = torch.empty(0, dtype=torch.int64, device=device)
    yield Sample("empty", ([], no_keys, torch.full((), 0.3, device=device)))
    yield from bad_samples(device, dtype, 0.3)
    yield Sample("scale", (few, keys[:3], float("inf")), error="'scale' must be finite in fp32, got inf")
    yield Sample("scale-overflow", (few, keys[:3], -1e39), error=r"'scale' must be finite in fp32, got -1e\+39")
    yield Sample("scale-none", (few, keys[:3], None), error="'scale' must be a finite number or a tensor, got None")
    yield Sample("scale-shape", (few, keys[:3], torch.ones(3, device=device)), error=r"'scale' must be \[\]")
