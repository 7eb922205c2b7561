"""Samples of noisy_mlp_step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from samples import HADAMARD, Sample, values
from ulr_kernels.ops.noisy_mlp_step import DTYPES


def example(
    rows: int,
    widths: Sequence[int],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    buffers: torch.dtype = torch.float32,
) -> tuple:
    """Arguments of a call: an MLP of these widths, x's first, that keeps activations of the order of 1."""

    def v(seed: int, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return values(seed, *shape, device=device, dtype=dtype)

    shapes = list(enumerate(zip(widths[1:], widths[:-1], strict=True)))
    weights, biases = [v(10 + i, n, k) / k**0.5 for i, (n, k) in shapes], [v(50 + i, n) for i, (n, _) in shapes]
    grad_weights = [v(30 + i, n, k, dtype=buffers) * 0.01 for i, (n, k) in shapes]
    grad_biases = [v(70 + i, n, dtype=buffers) * 0.01 for i, (n, _) in shapes]
    keys = torch.arange(1, len(widths), device=device) * 1000003
    target = torch.arange(rows, device=device) * 7 % widths[-1]
    return grad_weights, grad_biases, v(1, rows, widths[0]), target, weights, biases, 0.5, keys


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    """In pairs, but for those that say otherwise."""
    if dtype in DTYPES:
        for sample in _samples(device, dtype):
            yield dataclasses.replace(sample, kwargs={"antithetic": True, **sample.kwargs})


def _samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:

    def v(seed: int, *shape: int) -> Tensor:
        return values(seed, *shape, device=device, dtype=dtype)

    def call(rows: int, widths: Sequence[int], buffers: torch.dtype = torch.float32) -> tuple:
        return example(rows, widths, device, dtype, buffers)

    def replaced(args: tuple, **changes) -> tuple:
        names = ("grad_weights", "grad_biases", "x", "target", "weights", "biases", "sigma", "keys")
        return tuple(changes.get(name, arg) for name, arg in zip(names, args, strict=True))

    small = call(6, (20, 13, 9, 5))
    each = torch.tensor([0.5, 0.3, 0.7], device=device)
    joint = {"injection": "joint"}
    yield Sample("layerwise", replaced(small, sigma=each), {"copies": 4})
    yield Sample("joint", replaced(small, sigma=each), {"copies": 4, **joint})
    yield Sample("unpaired", small, {"copies": 3, "antithetic": False, "draw": 5, "row_offset": 1000})
    yield Sample("unpaired-joint", small, {"copies": 3, "antithetic": False, "draw": 5, "row_offset": 7, **joint})
    yield Sample("one-copy", small, {"copies": 1, "antithetic": False})
    yield Sample("one-layer", call(7, (20, 10)), {"copies": 4, "activation": "tanh"})
    yield Sample("clean", small, {"copies": 4, "baseline": "clean", "activation": "tanh"})
    yield Sample("clean-joint", small, {"copies": 4, "baseline": "clean", "activation": "sigmoid", **joint})
    yield Sample("no-baseline", small, {"copies": 4, "baseline": "none"})
    yield Sample("zero-one", small, {"copies": 6, "loss": "zero_one", "activation": "step"})
    target = small[3]
    squared = replaced(small, target=v(2, 6, 5))
    ignored = replaced(small, target=target.where(target != 1, -100))
    yield Sample("smoothed", ignored, {"copies": 4, "label_smoothing": 0.2, "baseline": "clean"})
    yield Sample("squared", squared, {"copies": 4, "loss": "squared", **joint})
    yield Sample("laplace", small, {"copies": 4, "dist": "laplace"})
    yield Sample("signs", call(9, (40, 70, 33)), {"copies": 4, "dist": "rademacher"})
    yield Sample("signs-joint", call(9, (40, 70, 33)), {"copies": 2, "dist": "rademacher", **joint})
    crossing = {"copies": 6, **HADAMARD, "draw": 2**16 - 2, "row_offset": 7}
    yield Sample("hadamard", call(9, (40, 70, 33)), crossing)
    yield Sample("hadamard-joint", call(9, (40, 70, 33)), {**crossing, **joint})
    yield Sample("no-biases", replaced(small, grad_biases=[], biases=[]), {"copies": 4})
    yield Sample("same-dtype", call(6, (20, 13, 9, 5), buffers=dtype), {"copies": 4})
    strided = replaced(
        small,
        x=v(1, 12, 40)[::2, ::2],
        weights=[w.T.contiguous().T for w in small[4]],
        grad_weights=[g.T.contiguous().T for g in small[0]],
        biases=[b.repeat_interleave(2)[::2] for b in small[5]],
        keys=small[7].repeat_interleave(2)[::2],
    )
    yield Sample("strided", strided, {"copies": 4, **joint})
    yield Sample("wide", call(70, (140, 130, 70, 10)), {"copies": 4})
    yield Sample("wide-joint", call(70, (140, 130, 70, 10)), {"copies": 4, **joint})

    grads, grad_biases, x, _, weights, biases, _, keys = small
    yield Sample("odd", small, {"copies": 3}, error="'copies' must be even where antithetic is set, got 3")
    yield Sample("injection", small, {"injection": "both"}, error="'injection' must be one of layerwise, joint")
    yield Sample("activation", small, {"activation": "gelu"}, error="'activation' must be one of relu")
    yield Sample("loss", small, {"loss": "hinge"}, error="'loss' must be one of cross_entropy")
    much, other = {"label_smoothing": 1.5}, {"label_smoothing": 0.1, "loss": "zero_one"}
    yield Sample("smoothing", small, much, error="'label_smoothing' must be between 0 and 1, got 1.5")
    yield Sample("smoothed-other", small, other, error="'label_smoothing' must be 0 for the loss 'zero_one', got 0.1")
    yield Sample("baseline", small, {"baseline": "best"}, error="'baseline' must be one of mean")
    yield Sample("dist", small, {"dist": "cauchy"}, error="'dist' must be one of")
    yield Sample("sobol", small, {"sampler": "sobol"}, error="'sampler' must be 'iid' or 'hadamard', got 'sobol'")
    yield Sample("draws", small, {"draw": 2**32 - 1}, error="'draw' must leave room for 16")
    yield Sample("x-dtype", replaced(small, x=x.double()), error="'x' must be float32 or bfloat16")
    yield Sample("x-rank", replaced(small, x=x[0]), error=r"'x' must be \[R, K\] with at least one row")
    yield Sample("no-rows", replaced(small, x=x[:0]), error=r"'x' must be \[R, K\] with at least one row")
    yield Sample("no-layers", replaced(small, weights=[]), error="'weights' must hold 1 to 64 layers, got 0")
    chain = [weights[0], weights[0], weights[2]]
    yield Sample("chain", replaced(small, weights=chain), error=r"'weights\[1\]' must be \[N, 13\], what weights\[0\]")
    yield Sample("weights-dtype", replaced(small, weights=[w.double() for w in weights]), error=r"'weights\[0\]' must")
    yield Sample("few-grads", replaced(small, grad_weights=grads[:2]), error="'grad_weights' must hold 3 buffers")
    yield Sample("few-biases", replaced(small, biases=biases[:2]), error="'biases' must hold none or 3")
    swapped = [grads[1], grads[0], grads[2]]
    yield Sample("grad-shape", replaced(small, grad_weights=swapped), error=r"'grad_weights\[0\]' must be \[13, 20\]")
    yield Sample("bias-shape", replaced(small, biases=biases[::-1]), error=r"'biases\[0\]' must be \[13\]")
    yield Sample("sigma-shape", replaced(small, sigma=each[:2]), error=r"'sigma' must be \[3\] \(one per layer\)")
    yield Sample("sigma-zero", replaced(small, sigma=0.0), error="'sigma' must be finite and positive, got 0.0")
    yield Sample("keys", replaced(small, keys=keys[:2]), error=r"'keys' must be \[3\] \(one per layer\)")
    yield Sample("classes", replaced(small, target=target.float()), error="'target' must be int64")
    yield Sample("targets", squared, {"copies": 4}, error="'target' must be int64")
    overlapping = [grads[0], grads[1], grads[1][:5, :9]]
    yield Sample("overlap", replaced(small, grad_weights=overlapping), error=r"'grad_weights\[1\]' must not overlap")
