"""noise_add, noise_score and noise_dot_ of the cpp back end: one pass over the noise each, on tensors of any rank."""

from __future__ import annotations

import torch
from torch import Tensor

from ulr_kernels.backends import _native
from ulr_kernels.ops._grid import images


def _launch(name: str, spec: tuple, tensors: tuple[Tensor | None, ...]) -> None:
    views = tuple(None if t is None else _native.view(t) for t in tensors)
    _native.launcher("cpp", name)(spec, views, threads=torch.get_num_threads())


def noise_add(
    y: Tensor,
    x: Tensor,
    sigma: Tensor,
    key: Tensor,
    feature_dim: int,
    copies: int,
    shared: bool,
    antithetic: bool,
    dist: str,
    sampler: str,
    positions: int,
    *at: int,
) -> None:
    if not y.numel():
        return
    axis = feature_dim % (y.dim() - 1)
    features = y.shape[axis + 1]
    spec = _native.noise_spec(key, dist, sampler, positions, *at, width=at[-1] + features, antithetic=antithetic)
    _launch("noise_add", spec, (*images(axis, y, x[None] if shared else x), sigma.expand(features)))


def noise_score(
    out: Tensor,
    loss_weight: Tensor,
    sigma: Tensor,
    key: Tensor,
    shape: list[int],
    feature_dim: int,
    antithetic: bool,
    *which,
) -> None:
    _scores(out[None], None, feature_dim % out.dim(), loss_weight, (None, None, None), sigma, key, antithetic, *which)


def noise_dot_(
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_log_sigma: Tensor | None,
    x: Tensor,
    loss_weight: Tensor,
    sigma: Tensor,
    key: Tensor,
    feature_dim: int,
    shared: bool,
    antithetic: bool,
    *which,
) -> None:
    x = x[None] if shared else x
    axis = feature_dim % (x.dim() - 1)
    buffers = (grad_weight, grad_bias, grad_log_sigma)
    # fp32, so that a bf16 buffer is rounded once.
    sums = tuple(None if b is None else x.new_zeros(x.shape[axis + 1], dtype=torch.float32) for b in buffers)
    _scores(None, x, axis, loss_weight, sums, sigma, key, antithetic, *which)
    for buffer, total in zip(buffers, sums, strict=True):
        if buffer is not None and total is not None:
            buffer.add_(total if buffer.dim() else total.sum())


def _scores(
    out: Tensor | None,
    x: Tensor | None,
    axis: int,
    loss_weight: Tensor,
    sums: tuple[Tensor | None, ...],
    sigma: Tensor,
    key: Tensor,
    antithetic: bool,
    dist: str,
    sampler: str,
    positions: int,
    *at: int,
) -> None:
    like = out if out is not None else x
    assert like is not None
    if not like.numel():
        return
    features = like.shape[axis + 1]
    spec = _native.noise_spec(key, dist, sampler, positions, *at, width=at[-1] + features, antithetic=antithetic)
    grids = tuple(None if t is None else images(axis, t)[0] for t in (out, x))
    _launch("noise_score", spec, (*grids, loss_weight, sigma.expand(features), *sums))
