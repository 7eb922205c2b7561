"""combine_: an optimiser's step along many probes' noise, in one pass over a list of parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ulr_kernels import noise_contract
from ulr_kernels.ops import _parameters
from ulr_kernels.ops._op import FP32, Check, Cost, Op, fp32_tensor, register
from ulr_kernels.ops._parameters import ListNoise


def combine_(
    tensors: Sequence[Tensor],
    keys: Tensor | Sequence[int],
    coefficients: Tensor | Sequence[float],
    *,
    lr: float | Tensor | None = None,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    momentum_buffers: Sequence[Tensor] = (),
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    exp_avgs: Sequence[Tensor] = (),
    exp_avg_sqs: Sequence[Tensor] = (),
    step: int | Tensor | None = None,
    draw: int = 0,
    dist: str = "normal",
    rank: int | None = None,
    stochastic: bool = False,
    row_offset: Sequence[int] = (),
    col_offset: Sequence[int] = (),
    sampler: str = "iid",
    width: Sequence[int] = (),
) -> None:
    """Step along a sum of probes' noise, g = sum_p coefficients[p] * eps(draw + p), in one pass over each tensor.

        sum        t <- t - lr weight_decay t + g                                 (lr may be None: no decay)
        momentum   b <- momentum b + g;  t <- t - lr weight_decay t - lr b        with momentum_buffers
        Adam       m, v as in AdamW of g;  t <- t - lr weight_decay t - lr m^ / (sqrt(v^) + epsilon)
                   with exp_avgs and exp_avg_sqs

    In the first form g is the change itself, so its coefficients hold -lr; in the others g is a gradient estimate, for
    SPSA (Spall, 1992; MeZO: arXiv 2305.17333) (L+ - L-) / (2 eps probes). Decay is decoupled (Loshchilov and Hutter,
    arXiv 1711.05101). The order of all roundings is in docs/noise.md: the result is bitwise the same on every back end,
    thread count and shard. Autograd does not record it.

    Args:
        tensors, keys: as in `perturb_`.
        coefficients: one for each probe: fp32 `[P]` on the tensors' device, or numbers, which are copied there.
        lr: learning rate: a number, or fp32 `[]`; needed for decay, momentum and Adam.
        weight_decay: at least 0.
        momentum: in [0, 1).
        momentum_buffers: one for each tensor, fp32 of its shape, any strides; zeros before the first step.
        betas: of Adam (Kingma and Ba, arXiv 1412.6980), in [0, 1).
        epsilon: of Adam, at least 0.
        exp_avgs, exp_avg_sqs: likewise, for Adam.
        step: Adam's, counted from 1: an integer, or int64 `[]` on the tensors' device, which a graph can advance.
        draw: of the first probe; probe p has `draw + p`.
        dist, rank, stochastic, row_offset, col_offset, sampler, width: as in `perturb_`.

    Raises:
        ValueError: lengths, shapes, dtypes or devices do not match, a number or index is out of range, states of two
            kinds are given, or tensors share memory; nothing has been written.
    """
    if len(betas) != 2:
        Check("combine_").fail("betas", "hold two numbers", betas)
    tensors = list(tensors)
    device = tensors[0].device if tensors else torch.device("cpu")
    with torch.no_grad():
        keys = _parameters.keys_tensor("combine_", keys, device)
        coefficients = fp32_tensor("combine_", "coefficients", coefficients, device)
        states = (list(momentum_buffers), list(exp_avgs), list(exp_avg_sqs))
        rate = None if lr is None else fp32_tensor("combine_", "lr", lr, device)
        rule = (rate, _step_tensor(step, device), weight_decay, momentum, *betas, epsilon)
        which = (dist, rank, stochastic, draw, list(row_offset), list(col_offset), sampler, list(width))
        torch.ops.ulr.combine_.default(tensors, keys, coefficients, *states, *rule, *which)


def _step_tensor(step: int | Tensor | None, device: torch.device) -> Tensor | None:
    if step is None or isinstance(step, Tensor):
        return step
    if not 1 <= step < 2**31:
        Check("combine_").fail("step", "be in [1, 2^31)", step)
    return torch.full((), step, dtype=torch.int64, device=device)


class Combine(NamedTuple):
    """Arguments of combine_."""

    tensors: list[Tensor]
    coefficients: Tensor
    momentum_buffers: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    lr: Tensor | None
    step: Tensor | None
    weight_decay: float
    momentum: float
    beta1: float
    beta2: float
    epsilon: float
    noise: ListNoise

    @property
    def states(self) -> list[list[Tensor]]:
        """The lists of an optimiser's states that are given, in the schema's order."""
        return [s for s in (self.momentum_buffers, self.exp_avgs, self.exp_avg_sqs) if s]


def check(a: Combine) -> None:
    rules = Check("combine_")
    rules.dtype("coefficients", a.coefficients, (torch.float32,))
    if a.coefficients.dim() != 1:
        rules.fail("coefficients", "be [P], one for each probe", list(a.coefficients.shape))
    _parameters.check_list(rules, a.tensors, a.noise, a.coefficients.shape[0])
    rules.device("keys", a.noise.keys.device, coefficients=a.coefficients, lr=a.lr, step=a.step)
    for argument, value, most in (
        ("weight_decay", a.weight_decay, math.inf),
        ("epsilon", a.epsilon, math.inf),
        ("momentum", a.momentum, 1.0),
        ("betas", a.beta1, 1.0),
        ("betas", a.beta2, 1.0),
    ):
        if not (0 <= value < most and value <= FP32.max):
            rules.fail(argument, f"be in [0, {most:g}) as an fp32 number", value)
    for argument in ("momentum_buffers", "exp_avgs", "exp_avg_sqs"):
        _check_states(rules, argument, getattr(a, argument), a.tensors)
    for i, parts in enumerate(zip(a.tensors, *a.states, strict=False)):
        _parameters.check_strides(rules, f"tensors[{i}]", *parts)
    if len(a.exp_avgs) != len(a.exp_avg_sqs):
        rules.fail("exp_avg_sqs", "be given with exp_avgs", f"{len(a.exp_avg_sqs)} and {len(a.exp_avgs)} tensors")
    if a.momentum_buffers and a.exp_avgs:
        rules.fail("momentum_buffers", "be empty where exp_avgs are given", f"{len(a.momentum_buffers)} tensors")
    if a.momentum and a.tensors and not a.momentum_buffers:
        rules.fail("momentum", "be 0 where momentum_buffers are not given", a.momentum)
    if a.lr is None:
        if a.weight_decay or a.momentum_buffers or a.exp_avgs:
            rules.fail("lr", "be given where there is decay, momentum or Adam", None)
    else:
        rules.dtype("lr", a.lr, (torch.float32,))
        rules.shape("lr", a.lr, (), "one for all tensors")
    if a.exp_avgs and a.step is None:
        rules.fail("step", "be given with exp_avgs", None)
    if a.step is not None:
        rules.dtype("step", a.step, (torch.int64,))
        rules.shape("step", a.step, (), "one for all tensors")


def _check_states(rules: Check, argument: str, states: list[Tensor], tensors: list[Tensor]) -> None:
    if len(states) not in (0, len(tensors)):
        rules.fail(argument, f"have one tensor for each of {len(tensors)}, or none", f"{len(states)}")
    for i, (state, tensor) in enumerate(zip(states, tensors, strict=False)):
        if state.dtype != torch.float32:
            rules.dtype(f"{argument}[{i}]", state, (torch.float32,))
        if state.shape != tensor.shape:
            rules.shape(f"{argument}[{i}]", state, tuple(tensor.shape), f"like 'tensors[{i}]'")
        if state.device != tensor.device:
            rules.fail(f"{argument}[{i}]", f"be on {tensor.device} like 'tensors[{i}]'", state.device)


# --- reference -------------------------------------------------------------------------------------------------------


def power(base: Tensor, exponent: Tensor) -> Tensor:
    """base^exponent (below 2^31), fp32, by squaring from the lowest bit of the exponent up: the order counts."""
    result = torch.ones_like(base)
    for bit in range(31):
        result = torch.where((exponent >> bit) & 1 == 1, result * base, result)
        base = base * base
    return result


def reference(a: Combine) -> None:
    def fp32(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=a.noise.keys.device)

    rate = fp32(0.0) if a.lr is None else a.lr
    decay = rate * fp32(a.weight_decay)
    momentum, beta1, beta2, epsilon = (fp32(value) for value in (a.momentum, a.beta1, a.beta2, a.epsilon))
    if a.exp_avgs:
        assert a.step is not None
        adam_rate = rate / (1 - power(beta1, a.step))
        root = noise_contract.square_root(1 - power(beta2, a.step))
    for i, tensor in enumerate(a.tensors):
        states = [_parameters.flat_view(s[i]) for s in a.states]
        flat = _parameters.flat_view(tensor)
        for block in _parameters.blocks(tensor, i, a.noise):
            old = block.values(flat).float()
            g = block.noise_sum(a.noise, a.coefficients)
            kept = noise_contract.fma(-decay, old, old)
            here = [block.values(state) for state in states]
            if a.momentum_buffers:
                b = noise_contract.fma(momentum, here[0], g)
                here[0].copy_(b)
                new = noise_contract.fma(-rate, b, kept)
            elif a.exp_avgs:
                m = noise_contract.fma(beta1, here[0], (1 - beta1) * g)
                v = noise_contract.fma(beta2, here[1], ((1 - beta2) * g) * g)
                here[0].copy_(m)
                here[1].copy_(v)
                new = noise_contract.fma(-adam_rate, m / (noise_contract.square_root(v) / root + epsilon), kept)
            else:
                new = kept + g
            block.store(flat, new, a.noise)
        for state, written in zip((s[i] for s in a.states), states, strict=True):
            _parameters.write_back(state, written)
        _parameters.write_back(tensor, flat)


def cost(a: Combine) -> Cost:
    written = [*a.tensors, *a.momentum_buffers, *a.exp_avgs, *a.exp_avg_sqs]
    probes, elements = a.coefficients.numel(), sum(t.numel() for t in a.tensors)
    return Cost(
        bytes=2 * sum(t.numel() * t.element_size() for t in written),
        flops=2 * probes * elements,
        noise=probes * _parameters.noise_values(a.tensors, a.noise.rank),
    )


SCHEMA = (
    "(Tensor(a!)[] tensors, Tensor keys, Tensor coefficients, Tensor(b!)[] momentum_buffers, "
    "Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor? lr=None, Tensor? step=None, float weight_decay=0.0, "
    f"float momentum=0.0, float beta1=0.9, float beta2=0.999, float epsilon=1e-8, {_parameters.LIST_SCHEMA}) -> ()"
)
register(Op(combine_, SCHEMA, Combine, check, reference, cost))
