"""What the launchers of noise and of the primitives below it are handed."""

from __future__ import annotations

from torch import Tensor

from ulr_kernels.backends import _native
from ulr_kernels.backends._native import Arguments


def philox4x32(out: Tensor, counter: Tensor, key: Tensor) -> Arguments:
    return Arguments(None, (out.view(-1, 4), counter.reshape(-1, 4), key))


def fold_in(out: Tensor, key: Tensor, data: Tensor) -> Arguments:
    shape = out.shape if out.dim() <= 3 else (out.numel(),)
    return Arguments(None, tuple(t.expand(out.shape).reshape(shape) for t in (out, key, data)))


def noise(out: Tensor, key: Tensor, shape: list[int], dist: str, sampler: str, positions: int, *at: int) -> Arguments:
    cols = shape[-1] if shape else 1
    spec = _native.noise_spec(key, dist, sampler, positions, *at, width=at[-1] + cols)
    return Arguments(spec, (out.view(-1, cols) if out.numel() else out.view(0, 0),))
