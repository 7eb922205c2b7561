"""noise_add, noise_dot, noise_score, scale_shift_grad_ of the cpp back end: a pass over the noise, for any rank."""

from __future__ import annotations

import torch
from torch import Tensor

from ulr_kernels.backends import _native
from ulr_kernels.ops._axes import images
from ulr_kernels.ops.noise_add import NoiseAdd
from ulr_kernels.ops.noise_dot import NoiseDot
from ulr_kernels.ops.noise_score import NoiseScore
from ulr_kernels.ops.scale_shift_grad_ import ScaleShiftGradient


def noise_add(y: Tensor, a: NoiseAdd) -> None:
    if not y.numel():
        return
    axis = a.feature_dim % (y.dim() - 1)
    features = y.shape[axis + 1]
    tensors = (*images(axis, y, a.x[None] if a.shared else a.x), a.sigma.expand(features))
    _native.launch_cpu("noise_add", _native.noise_view(a.noise, features), tensors)


def noise_dot(out: Tensor, a: NoiseDot) -> None:
    if not a.x.numel():
        out.zero_()
        return
    axis = a.feature_dim % a.x.dim()
    features = a.x.shape[axis]
    tensors = (out, *images(axis, a.x[None]), a.sigma.expand(features))
    _native.launch_cpu("noise_dot", _native.noise_view(a.noise, features), tensors)


def noise_score(out: Tensor, a: NoiseScore) -> None:
    if out.numel():
        axis = a.feature_dim % out.dim()
        features = out.shape[axis]
        tensors = (*images(axis, out[None]), None, a.loss_weight, a.sigma.expand(features), None, None, None)
        _native.launch_cpu("noise_score", _native.noise_view(a.noise, features), tensors)


def scale_shift_grad_(a: ScaleShiftGradient) -> None:
    x = a.x[None] if a.shared else a.x
    if not x.numel():
        return
    axis = a.feature_dim % (x.dim() - 1)
    features, buffers = x.shape[axis + 1], a.buffers.values()
    # fp32, so that a bf16 buffer is rounded once.
    sums = tuple(None if b is None else x.new_zeros(features, dtype=torch.float32) for b in buffers)
    tensors = (None, *images(axis, x), a.loss_weight, a.sigma.expand(features), *sums)
    _native.launch_cpu("noise_score", _native.noise_view(a.noise, features), tensors)
    for buffer, total in zip(buffers, sums, strict=True):
        if buffer is not None and total is not None:
            buffer.add_(total if buffer.dim() else total.sum())
