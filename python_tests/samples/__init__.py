"""Calls of every op, good and bad, for tests and benchmarks: one module an op, named as the op."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ulr_kernels import noise_contract

HADAMARD = {"dist": "rademacher", "sampler": "hadamard"}


@dataclasses.dataclass(frozen=True)
class Sample:
    """Arguments of one call of `ulr.ops.<op>`. `error` is a pattern of the message if the call must fail."""

    id: str
    args: tuple
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    error: str | None = None


def samples_of(op: str, device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """The samples of an op, with tensors of a device and, where the op takes several, a dtype."""
    return importlib.import_module(f"{__name__}.{op}").samples(device, dtype)


def values(seed: int, *shape: int, device: str, dtype: torch.dtype) -> Tensor:
    """Reproducible inputs that do not touch torch's generators: noise of the library's own."""
    return _noise(seed, math.prod(shape)).view(shape).to(device=device, dtype=dtype, copy=True)


@functools.lru_cache(4096)  # each look for a sample makes all samples of its op
def _noise(seed: int, size: int) -> Tensor:
    key = torch.tensor(noise_contract.fold_in(0x5A4D, seed))
    return noise_contract.noise_grid(1, size, torch.tensor([0]), key)[0, 0]
