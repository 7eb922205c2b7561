"""Matrix products of the CPU: x W^T + b by torch's copy of oneDNN, sums of gradients by the faster of two libraries.

In fp32 oneDNN uses AVX-512 where torch's own product, through MKL, does not (AMD: 0.43-0.5x of the time). Without
AVX-512 torch's own is faster by a sixth to a half for the sums (docs/measured.md). A forward stays with oneDNN there,
because its results do not depend on the number of threads. `torch.ops.mkldnn._linear_pointwise` takes ordinary CPU
tensors. It needs a dense weight, row-major or column-major: any other stride selects a reference implementation that is
thousands of times slower. It copies an x that is not contiguous, and ignores the strides of a bias.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional
from torch import Tensor
from torch.autograd import forward_ad


def _call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


@functools.cache
def supports(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype here; tried once, on a product whose result is known."""
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=dtype, device="cpu")
    try:
        return torch.equal(_call(x, x, x[0]), x.new_tensor([[6.0, 13.0], [12.0, 27.0]]))
    except (AttributeError, RuntimeError):
        return False


@functools.cache
def _adds_by_onednn() -> bool:
    """Whether oneDNN adds up gradients in fp32 faster here than torch's own BLAS."""
    return supports(torch.float32) and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def dense(weight: Tensor) -> bool:
    """Whether the fast paths take this matrix."""
    return weight.is_contiguous() or weight.T.is_contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[R, N]` from `x [R, K]` and a dense `weight [N, K]` (see `dense`), all of one dtype.

    torch.compile traces torch's own linear instead, which it can lower; forward-mode derivatives and transforms of
    torch.func, which oneDNN's would drop, have it too.
    """
    followed = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    if not (followed or torch.compiler.is_compiling()) and x.numel() and weight.numel() and supports(x.dtype):
        return _call(x, weight, bias if bias is None else bias.contiguous())
    return torch.nn.functional.linear(x, weight, bias)


def add_outer_(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """`sums [N, K] += a^T b`, for fp32 `a [R, N]` and a contiguous fp32 `b [R, K]`."""
    if sums.dtype != torch.float32:
        sums.add_(a.T @ b)
    elif sums.device.type == "cpu" and _adds_by_onednn():
        sums.add_(linear(a.T, b.T))
    else:
        sums.addmm_(a.T, b)
