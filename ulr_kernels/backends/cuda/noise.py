"""Arguments of the launchers of noise and of the primitives below it."""

from __future__ import annotations

from torch import Tensor

from ulr_kernels.backends import _native
from ulr_kernels.backends._native import Arguments
from ulr_kernels.ops.noise import FoldIn, Noise, Philox


def philox4x32(out: Tensor, a: Philox) -> Arguments:
    return Arguments(None, (out.view(-1, 4), a.counter.reshape(-1, 4), a.key))


def fold_in(out: Tensor, a: FoldIn) -> Arguments:
    shape = out.shape if out.dim() <= 3 else (out.numel(),)
    return Arguments(None, tuple(t.expand(out.shape).reshape(shape) for t in (out, a.key, a.data)))


def noise(out: Tensor, a: Noise) -> Arguments:
    cols = a.shape[-1] if a.shape else 1
    return Arguments(_native.noise_view(a.noise, cols), (out.view(-1, cols) if out.numel() else out.view(0, 0),))
