"""What both native libraries' launchers of the ops on lists of parameters are handed (csrc/include/ulr/step.h)."""

from __future__ import annotations

import itertools

from torch import Tensor

from ulr_kernels.backends import _native
from ulr_kernels.backends._native import Arguments
from ulr_kernels.ops._parameters import by_row

SUM, MOMENTUM, ADAM = range(3)


def _spec(keys: Tensor, dist: str, draw: int) -> tuple:
    return _native.noise_spec(keys, dist, "iid", 1, draw, 0, 0, width=0)


def _places(tensors: list[Tensor], rank: int | None, row_offset: list[int], col_offset: list[int]) -> tuple[int, ...]:
    """Row offset, column offset and rank (0: full) of each tensor."""
    nothing = (0,) * len(tensors)
    ranks = (0 if rank is None or t.dim() < 2 else rank for t in tensors)
    return tuple(itertools.chain(*zip(row_offset or nothing, col_offset or nothing, ranks, strict=True)))


def perturb_(
    tensors: list[Tensor],
    keys: Tensor,
    scale: Tensor,
    dist: str,
    rank: int | None,
    stochastic: bool,
    draw: int,
    row_offset: list[int],
    col_offset: list[int],
) -> Arguments:
    keys = keys.contiguous()
    numbers = (int(stochastic), SUM, 0, 0, 0, 0, 0, rank or 0, *_places(tensors, rank, row_offset, col_offset))
    return Arguments(_spec(keys, dist, draw), (keys, scale, *(by_row(t)[0] for t in tensors)), numbers)


def combine_(
    tensors: list[Tensor],
    keys: Tensor,
    coefficients: Tensor,
    momentum_buffers: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    lr: Tensor | None,
    step: Tensor | None,
    weight_decay: float,
    momentum: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    dist: str,
    rank: int | None,
    stochastic: bool,
    draw: int,
    row_offset: list[int],
    col_offset: list[int],
) -> Arguments:
    keys = keys.contiguous()
    rule = ADAM if exp_avgs else MOMENTUM if momentum_buffers else SUM
    factors = map(_native.float_bits, (weight_decay, momentum, beta1, beta2, epsilon))
    numbers = (int(stochastic), rule, *factors, rank or 0)
    numbers += _places(tensors, rank, row_offset, col_offset)
    states = [s for s in (momentum_buffers, exp_avgs, exp_avg_sqs) if s]
    absent = (None,) * (2 - len(states))
    listed: list[Tensor | None] = []
    for parts in zip(tensors, *states, strict=True):
        listed += [*by_row(*parts), *absent]
    return Arguments(_spec(keys, dist, draw), (keys, coefficients, lr, step, *listed), numbers)
