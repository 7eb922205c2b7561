"""Arguments of the launchers of the ops with weight noise (csrc/cuda/perturbed_*.cu)."""

from __future__ import annotations

from torch import Tensor

from ulr_kernels.backends import _native
from ulr_kernels.backends._native import Arguments
from ulr_kernels.backends.cuda import conv
from ulr_kernels.ops.perturbed_conv2d import PerturbedConv
from ulr_kernels.ops.perturbed_embedding import PerturbedEmbedding
from ulr_kernels.ops.perturbed_linear import PerturbedLinear


def _bias_rows(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None or bias.dim() == 1 else bias[:, None]


def perturbed_linear(y: Tensor, a: PerturbedLinear) -> Arguments:
    tensors = (y, a.x, a.weight, _bias_rows(a.bias), a.sigma, a.how.mask)
    return Arguments(_native.noise_view(a.how.placed(a.weight).noise), tensors, (a.how.rank or 0,))


def perturbed_conv2d(y: Tensor, a: PerturbedConv) -> Arguments:
    images = a.x if a.x.dim() == 5 else a.x[None]
    tensors = (y, images, a.weight, _bias_rows(a.bias), a.sigma, a.how.mask)
    numbers = (*conv.window_numbers(a.window, a.weight.shape[2:], a.weight.shape[1]), a.how.rank or 0)
    return Arguments(_native.noise_view(a.how.placed(a.weight).noise), tensors, numbers)


def perturbed_embedding(y: Tensor, a: PerturbedEmbedding) -> Arguments:
    tensors = (y, a.indices, a.weight, a.sigma, a.how.mask)
    return Arguments(_native.noise_view(a.how.placed(a.weight).noise), tensors, (a.how.rank or 0,))
