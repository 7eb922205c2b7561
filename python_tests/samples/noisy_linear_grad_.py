"""Samples of noisy_linear_grad_."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from samples import HADAMARD, Sample, values


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    def v(seed: int, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return values(seed, *shape, device=device, dtype=dtype)

    def f(seed: int, *shape: int) -> Tensor:
        return v(seed, *shape, dtype=torch.float32)

    x, scale = v(1, 6, 20), f(4, 13).abs() + 0.1

    def buffers(n: int = 13, k: int = 20, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        return v(2, n, k, dtype=dtype), v(3, n, dtype=dtype)

    yield Sample("one", (*buffers(), x, f(5, 1, 6), 0.3, 11))
    yield Sample("shared", (*buffers(), x, f(5, 5, 6), scale, -11), {"draw": 5})
    yield Sample("antithetic", (*buffers(), x, f(5, 4, 6), scale, 11), {"antithetic": True})
    yield Sample("separate", (*buffers(), v(6, 4, 6, 20), f(5, 4, 6), 0.3, 11), {"antithetic": True})
    yield Sample("laplace", (*buffers(), x, f(5, 4, 6), 0.3, 11), {"dist": "laplace", "grad_log_sigma": f(7, 13)})
    yield Sample("log-sigma", (*buffers(), x, f(5, 4, 6), scale, 11), {"antithetic": True, "grad_log_sigma": f(7)})
    yield Sample("signs", (*buffers(150, 70), v(8, 34, 70), f(9, 2, 34), 0.5, 2**63), {"dist": "rademacher"})
    yield Sample("wide", (*buffers(131, 129), v(8, 65, 129), f(9, 3, 65), 0.5, 12))
    yield Sample("positions", (*buffers(), x, f(5, 4, 2), 0.3, 11), {"positions": 3, "row_offset": 9})
    yield Sample("sobol", (*buffers(), x, f(5, 4, 2), 0.3, 11), {"positions": 3, "sampler": "sobol"})
    crossing = {**HADAMARD, "draw": 2**16 - 2, "row_offset": 3, "col_offset": 37, "positions": 2, "width": 200}
    pairs = {"antithetic": True, **crossing}
    yield Sample("hadamard", (*buffers(150), v(8, 12, 20), f(9, 6, 6), 0.5, 11), pairs)
    yield Sample("hadamard-separate", (*buffers(150), v(8, 4, 12, 20), f(9, 4, 6), 0.5, 11), pairs)
    yield Sample("hadamard-draws", (*buffers(), x, f(5, 5, 6), scale, 11), {**HADAMARD, "draw": 8})
    yield Sample("offsets", (*buffers(), x, f(5, 2, 6), 0.3, 11), {"draw": 9, "row_offset": 1000, "col_offset": 129})
    yield Sample("same-dtype", (*buffers(dtype=dtype), x, f(5, 4, 6), 0.3, 11))
    yield Sample("weight-only", (buffers()[0], None, x, f(5, 4, 6), 0.3, 11))
    yield Sample("bias-only", (None, buffers()[1], x, f(5, 4, 6), 0.3, 11))
    yield Sample(
        "strided",
        (
            f(2, 40, 26)[::2, ::2].T,
            f(3, 26)[::2],
            v(13, 12, 40)[::2, ::2],
            f(5, 6, 8).T[::2],
            scale.repeat_interleave(2)[::2],
            11,
        ),
    )
    yield Sample("transposed", (f(2, 20, 13).T, f(3, 13), v(11, 20, 6).T, f(5, 4, 6), 0.3, 11))
    yield Sample("expanded", (*buffers(), v(11, 1, 20).expand(6, 20), f(5, 1, 1).expand(4, 6), 0.3, 11))
    both = f(2, 13, 21)  # weight and bias as columns of one buffer
    yield Sample("interleaved", (both[:, :20], both[:, 20], x, f(5, 4, 6), 0.3, 11))
    yield Sample("no-rows", (*buffers(), x[:0], f(5, 4, 6)[:, :0], 0.3, 11))
    yield Sample("no-features", (*buffers(0), x, f(5, 4, 6), 0.3, 11))
    yield Sample("no-inputs", (*buffers(k=0), x[:, :0], f(5, 4, 6), 0.3, 11))

    w, b = buffers()
    loss = f(5, 4, 6)
    yield Sample("sigma-zero", (w, b, x, loss, 0.0, 1), error="'sigma' must be finite and positive, got 0.0")
    yield Sample("sigma-tiny", (w, b, x, loss, 1e-46, 1), error="'sigma' must be a normal fp32 number, got 1e-46")
    yield Sample("sigma-inf", (w, b, x, loss, float("inf"), 1), error="'sigma' must be finite and positive")
    yield Sample("loss-shape", (w, b, x, loss[:, :5], 0.3, 1), error=r"'loss_weight' must be \[copies, 6\]")
    yield Sample("loss-dtype", (w, b, x, loss.double(), 0.3, 1), error="'loss_weight' must be float32")
    yield Sample(
        "positions-rule", (w, b, x, loss, 0.3, 1), {"positions": 4}, error="'positions' must divide the 6 rows"
    )
    yield Sample("no-copies", (w, b, x, loss[:0], 0.3, 1), error="'copies' must be at least 1, got 0")
    yield Sample("odd", (w, b, x, loss[:3], 0.3, 1), {"antithetic": True}, error="'copies' must be even")
    yield Sample("weight-shape", (w[:, :5], b, x, loss, 0.3, 1), error=r"'grad_weight' must be \[N, 20\]")
    yield Sample("bias-buffer", (w, b[:5], x, loss, 0.3, 1), error="'grad_bias' must be")
    yield Sample("no-buffer", (None, None, x, loss, 0.3, 1), error="'grad_weight' must be given")
    yield Sample("buffer-dtype", (w.double(), b, x, loss, 0.3, 1), error="'grad_weight' must be float32")
    yield Sample(
        "density",
        (w, b, x, loss, 0.3, 1),
        {"dist": "rademacher", "grad_log_sigma": f(7)},
        error="'grad_log_sigma' must be None where dist is 'rademacher'",
    )
    yield Sample(
        "self-overlap", (w[:1].expand(13, 20), b, x, loss, 0.3, 1), error="'grad_weight' must not overlap itself"
    )
    yield Sample(
        "self-overlap-slide",
        (v(1, 40, dtype=torch.float32).as_strided((13, 20), (1, 1)), b, x, loss, 0.3, 1),
        error="'grad_weight' must not overlap itself",
    )
    yield Sample("overlap", (w, w[:, 0], x, loss, 0.3, 1), error="'grad_weight' must not overlap 'grad_bias'")
    flat = v(1, 13 * 20 + 40, dtype=torch.float32)
    if dtype == torch.float32:
        yield Sample(
            "overlap-x",
            (flat[: 13 * 20].view(13, 20), b, flat[13 * 20 - 80 :].view(6, 20), loss, 0.3, 1),
            error="'grad_weight' must not overlap 'x'",
        )
