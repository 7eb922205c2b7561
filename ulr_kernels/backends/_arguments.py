"""Arguments of the launchers that both native libraries have alike: noise, and lists of parameters (ulr/step.h)."""

from __future__ import annotations

from torch import Tensor

from ulr_kernels.backends import _native
from ulr_kernels.backends._native import Arguments
from ulr_kernels.noise_contract import ALL_ROWS
from ulr_kernels.ops._op import NoiseSpec
from ulr_kernels.ops._parameters import ListNoise, by_row, rows_cols
from ulr_kernels.ops.combine_ import Combine
from ulr_kernels.ops.noise import FoldIn, Noise, Philox
from ulr_kernels.ops.perturb_ import Perturb

SUM, MOMENTUM, ADAM = range(3)


def philox4x32(out: Tensor, a: Philox) -> Arguments:
    return Arguments(None, (out.view(-1, 4), a.counter.reshape(-1, 4), a.key))


def fold_in(out: Tensor, a: FoldIn) -> Arguments:
    shape = out.shape if out.dim() <= 3 else (out.numel(),)
    return Arguments(None, tuple(t.expand(out.shape).reshape(shape) for t in (out, a.key, a.data)))


def noise(out: Tensor, a: Noise) -> Arguments:
    cols = a.shape[-1] if a.shape else 1
    return Arguments(_native.noise_view(a.noise, cols), (out.view(-1, cols) if out.numel() else out.view(0, 0),))


def _view(noise: ListNoise, keys: Tensor) -> tuple:
    return _native.noise_view(
        NoiseSpec(keys, dist=noise.dist, sampler=noise.sampler, positions=ALL_ROWS, draw=noise.draw)
    )


def _places(tensors: list[Tensor], noise: ListNoise) -> tuple[int, ...]:
    """Row offset, column offset, rank (0: full) and whole width of each tensor."""
    numbers: list[int] = []
    for i, tensor in enumerate(tensors):
        rank = 0 if noise.rank is None or tensor.dim() < 2 else noise.rank
        numbers += (*noise.offsets(i), rank, noise.width_of(i, rows_cols(tensor)[1]))
    return tuple(numbers)


def perturb_(a: Perturb) -> Arguments:
    keys = a.noise.keys.contiguous()
    numbers = (int(a.noise.stochastic), SUM, 0, 0, 0, 0, 0, a.noise.rank or 0, *_places(a.tensors, a.noise))
    return Arguments(_view(a.noise, keys), (keys, a.scale, *(by_row(t)[0] for t in a.tensors)), numbers)


def combine_(a: Combine) -> Arguments:
    keys = a.noise.keys.contiguous()
    rule = ADAM if a.exp_avgs else MOMENTUM if a.momentum_buffers else SUM
    factors = map(_native.float_bits, (a.weight_decay, a.momentum, a.beta1, a.beta2, a.epsilon))
    numbers = (int(a.noise.stochastic), rule, *factors, a.noise.rank or 0, *_places(a.tensors, a.noise))
    states = a.states
    absent = (None,) * (2 - len(states))
    parts: list[Tensor | None] = []
    for tensor_and_states in zip(a.tensors, *states, strict=True):
        parts += [*by_row(*tensor_and_states), *absent]
    return Arguments(_view(a.noise, keys), (keys, a.coefficients, a.lr, a.step, *parts), numbers)
