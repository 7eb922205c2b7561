"""noisy_linear_cross_entropy_: a classifier's head, from noise to gradient buffers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ulr_kernels.ops._op import Check, Cost, Op, Output, Sample, key_tensor, register, sigma_tensor
from ulr_kernels.ops.noisy_mlp_step import DTYPES, example
from ulr_kernels.ops.noisy_mlp_step import check_step as check_mlp
from ulr_kernels.ops.noisy_mlp_step import cost as mlp_cost
from ulr_kernels.ops.noisy_mlp_step import reference as mlp_reference


def noisy_linear_cross_entropy_(
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: float | Tensor,
    key: int | Tensor,
    *,
    copies: int = 32,
    antithetic: bool = True,
    label_smoothing: float = 0.0,
    baseline: str = "mean",
    dist: str = "normal",
    draw: int = 0,
    row_offset: int = 0,
) -> Tensor:
    """Add the ULR gradient (arXiv 2305.08960, Theorem 1) of a linear layer below a cross-entropy to its buffers.

    One call, one launch on a CUDA device, for noise, logits of all copies, each sample's losses, their baseline and

        grad_weight += sum over c, r of  (L[c, r] - b[c, r]) / (C * R) * score_cr / sigma  (outer)  x[r]

    which is the gradient of the mean noised loss. Logits exist for a few samples at a time, so that a large vocabulary
    takes no more memory than a small one.

    Args:
        grad_weight: `[N, K]`, fp32 or x's dtype, any strides.
        grad_bias: `[N]`, likewise; None where there is no bias.
        x: `[R, K]`, fp32 or bf16, any strides; shared by the copies.
        target: int64 `[R]`, the classes; one that does not exist gives NaN, but -100 a loss of 0.
        weight, bias: `[N, K]` and `[N]` or None, of x's dtype.
        sigma: noise scale in units of the logits, > 0: a float or fp32 `[]`.
        key: of the noise site: an integer in [-2^63, 2^64) or an int64 scalar tensor.
        copies, antithetic, dist, draw, row_offset: as in `noisy_linear`.
        label_smoothing: in [0, 1]: how much of a target is spread over all classes alike.
        baseline: "mean": of the sample's other copies or pairs; "clean": its loss without noise; "none".

    Returns:
        The losses, fp32 `[C, R]`.

    Raises:
        ValueError: a shape, dtype, device, scale, name or index breaks the rules above, or a buffer overlaps another
            argument; nothing has been written.
    """
    key = key_tensor("noisy_linear_cross_entropy_", key, x.device)
    scale = sigma_tensor("noisy_linear_cross_entropy_", sigma, x.device, zero=False)
    how = (copies, antithetic, label_smoothing, baseline, dist, draw, row_offset)
    return torch.ops.ulr.noisy_linear_cross_entropy_.default(
        grad_weight, grad_bias, x, target, weight, bias, scale, key, *how
    )


def as_mlp(
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sigma: Tensor,
    key: Tensor,
    copies: int,
    antithetic: bool,
    label_smoothing: float,
    *which,
) -> tuple:
    """The arguments of noisy_mlp_step: a head is an MLP of one layer."""
    biases, grad_biases = ([] if t is None else [t] for t in (bias, grad_bias))
    layer = ([grad_weight], grad_biases, x, target, [weight], biases, sigma.reshape(1), key.reshape(1))
    return *layer, copies, antithetic, "joint", "relu", "cross_entropy", label_smoothing, *which


def check(grad_weight, grad_bias, x, target, weight, bias, sigma, key, *how) -> Output:
    rules = Check("noisy_linear_cross_entropy_")
    if (grad_bias is None) != (bias is None):
        rules.fail("grad_bias", "be given where there is a bias, and only there", "None" if bias is not None else "one")
    for argument, scalar, dtype in (("sigma", sigma, torch.float32), ("key", key, torch.int64)):
        if scalar.dtype != dtype or scalar.numel() != 1:
            rules.fail(
                argument, f"be a {str(dtype).removeprefix('torch.')} scalar", f"{scalar.dtype} {[*scalar.shape]}"
            )
    losses = check_mlp(rules, *as_mlp(grad_weight, grad_bias, x, target, weight, bias, sigma, key, *how))
    return Output(losses.shape[1:], losses.dtype)


def reference(losses, *args) -> None:
    mlp_reference(losses[None], *as_mlp(*args))


def cost(*args) -> Cost:
    return mlp_cost(*as_mlp(*args))


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    if dtype not in DTYPES:
        return

    def call(rows: int, inputs: int, features: int) -> tuple:
        (grad,), (grad_bias,), x, target, (weight,), (bias,), sigma, keys = example(
            rows, (inputs, features), device, dtype
        )
        return grad, grad_bias, x, target, weight, bias, sigma, keys[0]

    small = call(7, 20, 13)
    grad, grad_bias, x, target, weight, bias, sigma, key = small
    yield Sample("one", small, {"copies": 4})
    yield Sample("unpaired", small, {"copies": 3, "antithetic": False, "baseline": "none", "draw": 5, "row_offset": 9})
    ignored = (*small[:3], target.where(target != 1, -100), *small[4:7], -7)
    yield Sample("clean", ignored, {"copies": 4, "baseline": "clean", "dist": "laplace"})
    yield Sample("signs", call(9, 40, 150), {"copies": 4, "dist": "rademacher", "label_smoothing": 0.1})
    yield Sample("no-bias", (grad, None, x, target, weight, None, sigma, key), {"copies": 2})
    transposed = (grad.T.contiguous().T, grad_bias, x, target, weight.T.contiguous().T, bias, sigma, key)
    yield Sample("strided", transposed, {"copies": 2})
    missing = (grad, None, *small[2:])
    yield Sample("no-buffer", missing, error="'grad_bias' must be given where there is a bias")
    yield Sample("shape", (grad, grad_bias, x[:, :5], *small[3:]), error=r"must be \[N, 5\], what x gives")
    yield Sample("sigma", (*small[:6], sigma * torch.ones(13), key), error="'sigma' must be a float32 scalar")
    yield Sample("sigma-zero", (*small[:6], 0.0, key), error="'sigma' must be finite and positive, got 0.0")
    yield Sample("odd", small, {"copies": 3}, error="'copies' must be even where antithetic is set, got 3")
    yield Sample("classes", (grad, grad_bias, x, target.float(), *small[4:]), error="'target' must be int64")
    yield Sample("overlap", (grad, grad[:, 0], *small[2:]), error="'grad_weight' must not overlap 'grad_bias'")


register(
    Op(
        name="noisy_linear_cross_entropy_",
        schema="(Tensor(a!) grad_weight, Tensor(b!)? grad_bias, Tensor x, Tensor target, Tensor weight, Tensor? bias, "
        "Tensor sigma, Tensor key, int copies=32, bool antithetic=True, float label_smoothing=0.0, "
        "str baseline='mean', str dist='normal', int draw=0, int row_offset=0) -> Tensor",
        function=noisy_linear_cross_entropy_,
        check=check,
        reference=reference,
        samples=samples,
        cost=cost,
        mutates=(0, 1),
        autocast=(2, 4, 5),
    )
)
