"""Workspaces for sums over orthogonal draws (csrc/cuda/walsh_sums.cuh), and the op on lists that needs one."""

from __future__ import annotations

import torch
from torch import Tensor

from ulr_kernels.backends import _arguments
from ulr_kernels.backends._native import Arguments
from ulr_kernels.noise_contract import hadamard_blocks
from ulr_kernels.ops._op import NoiseSpec
from ulr_kernels.ops.combine_ import Combine


def _workspace(draw: int, draws: int, samples: int, device: torch.device) -> Tensor:
    """fp32 `[blocks, samples, M]`, to be filled by the launcher."""
    blocks = list(hadamard_blocks(draw, draws))
    size = blocks[0][1] if blocks else 1
    return torch.empty(len(blocks), samples, size, dtype=torch.float32, device=device)


def walsh_sums(noise: NoiseSpec, loss_weight: Tensor, shared: bool) -> Tensor | None:
    """The workspace for the transforms of loss weights `[C, samples]`; None where draws are not summed by transforms.

    shared: the copies share x, or there is none.
    """
    if noise.sampler != "hadamard" or not shared:
        return None
    copies, samples = loss_weight.shape
    return _workspace(noise.draw, noise.draws(copies), samples, loss_weight.device)


def combine_(a: Combine) -> Arguments:
    call = _arguments.combine_(a)
    sums = None
    if a.noise.sampler == "hadamard":
        sums = _workspace(a.noise.draw, a.coefficients.numel(), 1, a.coefficients.device)
    first = 4  # the keys, the coefficients, the rate and the step; the list comes after them
    return call._replace(tensors=(*call.tensors[:first], sums, *call.tensors[first:]))
