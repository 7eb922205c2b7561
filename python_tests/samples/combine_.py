"""Samples of combine_."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from samples import HADAMARD, Sample, values
from samples.parameters import bad_samples, parameters, site_keys
from ulr_kernels import noise_contract


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    tensors = parameters(device, dtype)
    keys = site_keys(len(tensors))
    few = tensors[:3]

    def states(seed: int, like: list[Tensor]) -> list[Tensor]:
        return [values(seed + i, *t.shape, device=device, dtype=torch.float32) for i, t in enumerate(like)]

    def squares(seed: int, like: list[Tensor]) -> list[Tensor]:
        return [s.square_() for s in states(seed, like)]

    def adam(like: list[Tensor], **more) -> dict:
        return {"lr": 0.01, "exp_avgs": states(20, like), "exp_avg_sqs": squares(40, like), "step": 1, **more}

    many = [0.3, -0.2, 0.05, 1.0, -0.7]
    for dist in noise_contract.DISTRIBUTIONS:
        yield Sample(dist, (tensors, keys, many), {"dist": dist, "draw": 5})
    narrow = [values(9, 700, 4, device=device, dtype=dtype)]  # an adapter's: many rows, none of them a whole vector
    yield Sample("narrow", (narrow, keys[:1], many))
    yield Sample("narrow-rank", (narrow, keys[:1], many), {"rank": 1})
    yield Sample("one", (few, keys[:3], [0.25]))
    yield Sample("none", (few, keys[:3], []), {"lr": 0.1, "weight_decay": 0.5})
    yield Sample("decay", (tensors, keys, many), {"lr": 0.01, "weight_decay": 0.1})
    at = {"row_offset": [2**32 - 9, 3, 0], "col_offset": [2**34 - 37, 129, 7]}
    yield Sample("offsets", (few, keys[:3], many), {"draw": 2**32 - 5, **at})
    yield Sample("offset-signs", (few, keys[:3], many), {"dist": "rademacher", **at})
    yield Sample("hadamard", (tensors, keys, many), {**HADAMARD, "draw": 8, "lr": 0.01, "weight_decay": 0.1})
    crossing = {**HADAMARD, **at, "width": [2**34, 0, 50], "draw": 2**16 - 2}
    yield Sample("offset-hadamard", (few, keys[:3], many), crossing)
    yield Sample("none-hadamard", (few, keys[:3], []), {**HADAMARD, "lr": 0.1, "weight_decay": 0.5})
    yield Sample("rank-2", (tensors, keys, many[:2]), {"rank": 2, "lr": 0.1, "weight_decay": 0.1})
    yield Sample("rank-signs", (few, keys[:3], many), {"rank": 1, "dist": "rademacher", **at})
    velocity = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    yield Sample("momentum", (tensors, keys, many), {**velocity, "momentum_buffers": states(20, tensors)})
    strided = [s.mT.contiguous().mT if s.dim() > 1 else s for s in states(20, tensors)]
    yield Sample("momentum-strides", (tensors, keys, many[:1]), {**velocity, "momentum_buffers": strided})
    yield Sample("adam", (tensors, keys, many), adam(tensors, weight_decay=0.01, betas=(0.8, 0.95), epsilon=1e-6))
    late = {"step": torch.tensor(12345, device=device), "lr": torch.tensor(1e-3, device=device)}
    yield Sample("adam-late", (few, keys[:3], many), adam(few, rank=2, **late, **at))
    yield Sample("adam-hadamard", (few, keys[:3], many[:3]), adam(few, **crossing))
    if dtype != torch.float16:
        yield Sample("stochastic", (tensors, keys, [1e-3, -2e-3]), {"stochastic": True, "draw": 2})
        yield Sample("adam-stochastic", (few, keys[:3], many), adam(few, stochastic=True, dist="laplace", **at))
        yield Sample("mixed", ([few[0], few[1].float(), few[2].half()], keys[:3], many), velocity | {"momentum": 0.0})
    no_keys = torch.empty(0, dtype=torch.int64, device=device)
    yield Sample("empty", ([], no_keys, torch.tensor(many, device=device)))
    yield from bad_samples(device, dtype, many)

    call = (few, keys[:3], many)
    buffers = states(20, few)
    yield Sample("infinite", (few, keys[:3], [1.0, math.nan]), error="'coefficients' must be finite")
    yield Sample("no-numbers", (few, keys[:3], [1.0, None]), error="'coefficients' must hold finite numbers")
    yield Sample("matrix", (few, keys[:3], torch.ones(2, 2, device=device)), error=r"'coefficients' must be \[P\]")
    yield Sample("no-lr", call, {"weight_decay": 0.1}, error="'lr' must be given where there is decay")
    yield Sample("lr", call, {"lr": math.inf}, error="'lr' must be finite in fp32, got inf")
    yield Sample("negative", call, {"lr": 0.1, "weight_decay": -1.0}, error=r"'weight_decay' must be in \[0, inf\)")
    yield Sample("beta", call, {"betas": (0.9, 1.0)}, error=r"'betas' must be in \[0, 1\) .*, got 1.0")
    yield Sample("one-beta", call, {"betas": (0.9,)}, error=r"'betas' must hold two numbers, got \(0.9,\)")
    yield Sample(
        "wide", call, {"epsilon": 1e39}, error=r"'epsilon' must be in \[0, inf\) as an fp32 number, got 1e\+39"
    )
    yield Sample("no-buffers", call, {"lr": 0.1, "momentum": 0.9}, error="'momentum' must be 0 where momentum_buffers")
    yield Sample(
        "few-buffers",
        call,
        {"lr": 0.1, "momentum_buffers": buffers[:2]},
        error="'momentum_buffers' must have one tensor",
    )
    half = {"lr": 0.1, "momentum_buffers": [b.half() for b in buffers]}
    yield Sample("half-buffers", call, half, error=r"'momentum_buffers\[0\]' must be float32")
    turned = {"lr": 0.1, "momentum_buffers": [buffers[0].mT, *buffers[1:]]}
    yield Sample("turned-buffers", call, turned, error=r"'momentum_buffers\[0\]' must be \[9, 37\]")
    shared = {"lr": 0.1, "exp_avgs": buffers, "exp_avg_sqs": buffers, "step": 1}
    yield Sample("one-state-twice", call, shared, error="must not overlap 'exp_avg_sqs")
    yield Sample(
        "one-average", call, {"lr": 0.1, "exp_avgs": buffers}, error="'exp_avg_sqs' must be given with exp_avgs"
    )
    yield Sample("two-kinds", call, adam(few, momentum_buffers=buffers), error="'momentum_buffers' must be empty where")
    yield Sample("no-step", call, adam(few) | {"step": None}, error="'step' must be given with exp_avgs")
    yield Sample("step-0", call, adam(few) | {"step": 0}, error=r"'step' must be in \[1, 2\^31\), got 0")
