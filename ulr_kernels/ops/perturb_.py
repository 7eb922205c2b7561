"""perturb_: noise added in place to a list of parameters, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ulr_kernels import noise_contract
from ulr_kernels.ops import _parameters
from ulr_kernels.ops._op import Check, Cost, Op, fp32_tensor, register
from ulr_kernels.ops._parameters import ListNoise


def perturb_(
    tensors: Sequence[Tensor],
    keys: Tensor | Sequence[int],
    scale: float | Tensor,
    *,
    draw: int = 0,
    dist: str = "normal",
    rank: int | None = None,
    stochastic: bool = False,
    row_offset: Sequence[int] = (),
    col_offset: Sequence[int] = (),
    sampler: str = "iid",
    width: Sequence[int] = (),
) -> None:
    """Add noise to parameters: `t <- round(fma(scale, eps, t))` for each tensor t of the list, in one launch.

    The perturbation of zeroth-order methods (SPSA: Spall, 1992; MeZO: arXiv 2305.17333, algorithm 1) and of evolution
    strategies. eps is the parameter's noise (docs/noise.md): rows `shape[0]`, columns the flattened rest, a vector one
    row, whatever the strides. Autograd does not record it.

    Args:
        tensors: parameters of any shapes and strides, in fp32, bf16 or fp16, which may be mixed; written in place.
        keys: one for each tensor: int64 `[len(tensors)]` on their device, or integers in [-2^63, 2^64), which are
            copied there.
        scale: any finite number (a minus probe's is negative), or fp32 `[]`.
        draw: number of the probe or member of a population.
        dist: "normal", "laplace" or "rademacher".
        rank: None for a noise value an element; r for `E = A B^T / sqrt(r)`, whose factors have noise of `dist`
            (EGGROLL: arXiv 2511.16652, eq. 3). Tensors of fewer than two axes have full noise in both cases.
        stochastic: round to bf16 up or down at random, without bias, by the parameter's rounding stream; fp32 tensors
            are not affected, fp16 ones refused.
        row_offset, col_offset: where each tensor starts in the whole parameter, if it is a shard; none: all 0.
        sampler: "iid", or "hadamard" with dist="rademacher" and full rank: orthogonal over draws (docs/noise.md).
        width: columns of each whole parameter, which "hadamard" needs where col_offset is given.

    Raises:
        ValueError: lengths, dtypes or devices do not match, an index is out of range, or tensors share memory; nothing
            has been written.
    """
    tensors = list(tensors)
    device = tensors[0].device if tensors else torch.device("cpu")
    with torch.no_grad():
        keys, scale = _parameters.keys_tensor("perturb_", keys, device), fp32_tensor("perturb_", "scale", scale, device)
        which = (dist, rank, stochastic, draw, list(row_offset), list(col_offset), sampler, list(width))
        torch.ops.ulr.perturb_.default(tensors, keys, scale, *which)


class Perturb(NamedTuple):
    """Arguments of perturb_."""

    tensors: list[Tensor]
    scale: Tensor
    noise: ListNoise


def check(a: Perturb) -> None:
    rules = Check("perturb_")
    _parameters.check_list(rules, a.tensors, a.noise, 1)
    rules.dtype("scale", a.scale, (torch.float32,))
    rules.shape("scale", a.scale, (), "one for all tensors")
    rules.device("keys", a.noise.keys.device, scale=a.scale)


def reference(a: Perturb) -> None:
    for i, tensor in enumerate(a.tensors):
        flat = _parameters.flat_view(tensor)
        for block in _parameters.blocks(tensor, i, a.noise):
            eps = block.noise(a.noise, a.noise.draw)
            block.store(flat, noise_contract.fma(a.scale, eps, block.values(flat).float()), a.noise)
        _parameters.write_back(tensor, flat)


def cost(a: Perturb) -> Cost:
    return Cost(
        bytes=2 * sum(t.numel() * t.element_size() for t in a.tensors),
        flops=2 * sum(t.numel() for t in a.tensors),
        noise=_parameters.noise_values(a.tensors, a.noise.rank),
    )


SCHEMA = f"(Tensor(a!)[] tensors, Tensor keys, Tensor scale, {_parameters.LIST_SCHEMA}) -> ()"
register(Op(perturb_, SCHEMA, Perturb, check, reference, cost))
