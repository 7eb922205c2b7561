"""noisy_linear_grad_: the likelihood-ratio gradient of a linear layer, from noise that is made again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ulr_kernels.ops import _linear
from ulr_kernels.ops._linear import Sizes, values
from ulr_kernels.ops._op import NOISE_SCHEMA, Check, Cost, Op, Sample, key_tensor, register, sigma_tensor


def noisy_linear_grad_(
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    x: Tensor,
    loss_weight: Tensor,
    sigma: float | Tensor,
    key: int | Tensor,
    *,
    antithetic: bool = False,
    dist: str = "normal",
    sampler: str = "iid",
    positions: int = 1,
    draw: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
    grad_log_sigma: Tensor | None = None,
) -> None:
    """Add the gradients of ULR (arXiv 2305.08960, Theorem 1, for a linear layer) to their buffers, as raw sums.

        grad_weight    += sum over c, r of  loss_weight[c, r // positions] * score_cr / sigma  (outer)  x[c, r]
        grad_bias      += sum over c, r of  loss_weight[c, r // positions] * score_cr / sigma
        grad_log_sigma += sum over c, r of  loss_weight[c, r // positions] * (eps_cr * score_cr - 1)

    The noise is that of `noisy_linear` with the same key, draw and offsets; it is made again, never stored. Where the
    copies share x, the sum over copies comes first and one product with x follows.

    Args:
        grad_weight: `[N, K]`, fp32 or x's dtype, any strides; or None.
        grad_bias: `[N]`, likewise; or None. One of the two must be given.
        x: `[R, K]`, shared by the copies, or `[C, R, K]`; fp32, bf16 or fp16; any strides.
        loss_weight: `[C, R // positions]`, fp32: what each copy of each sample counts, (L - baseline) / (C * samples)
            for a mean.
        sigma: noise scale, > 0: a float, or fp32 `[]` or `[N]`.
        key: of the noise site: an integer in [-2^63, 2^64) or an int64 scalar tensor.
        antithetic, dist, sampler, draw, row_offset, col_offset: as in `noisy_linear`.
        positions: rows per sample; must divide R.
        grad_log_sigma: `[]` or `[N]`, fp32 or x's dtype, or None; an error for Rademacher noise, which has no density.

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above, or a buffer overlaps another
            argument; nothing has been written.
    """
    key = key_tensor("noisy_linear_grad_", key, x.device)
    sigma = sigma_tensor("noisy_linear_grad_", sigma, x.device, zero=False)
    torch.ops.ulr.noisy_linear_grad_.default(
        grad_weight,
        grad_bias,
        grad_log_sigma,
        x,
        loss_weight,
        sigma,
        key,
        antithetic,
        dist,
        sampler,
        positions,
        draw,
        row_offset,
        col_offset,
    )


def check(*args) -> None:
    check_gradient(Check("noisy_linear_grad_"), *args)


def check_gradient(
    rules: Check,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_log_sigma: Tensor | None,
    x: Tensor,
    loss_weight: Tensor,
    sigma: Tensor,
    key: Tensor,
    antithetic: bool,
    dist: str,
    sampler: str,
    positions: int,
    draw: int,
    row_offset: int,
    col_offset: int,
) -> None:
    if x.dim() not in (2, 3):
        rules.fail("x", "be [R, K] or [C, R, K]", list(x.shape))
    _linear.check_loss_weight(rules, loss_weight, x.shape[-2], positions)
    copies = loss_weight.shape[0]
    draws = rules.copies(copies, antithetic)
    _linear.check_x(rules, x, copies, None)
    features = _linear.check_gradients(rules, grad_weight, grad_bias, grad_log_sigma, x, dist)
    _linear.check_sigma(rules, "sigma", sigma, features, (torch.float32,))
    rules.device(
        "x",
        x.device,
        grad_weight=grad_weight,
        grad_bias=grad_bias,
        grad_log_sigma=grad_log_sigma,
        loss_weight=loss_weight,
        sigma=sigma,
        key=key,
    )
    rules.noise(key, x.shape[-2], features, draws, dist, sampler, positions, draw, row_offset, col_offset)


def sizes_of(grad_weight: Tensor | None, grad_bias: Tensor | None, x: Tensor, loss_weight: Tensor) -> Sizes:
    buffer = grad_weight if grad_weight is not None else grad_bias
    assert buffer is not None  # the check has seen to it
    return Sizes(loss_weight.shape[0], x.shape[-2], x.shape[-1], buffer.shape[0], x.dim() == 2)


def reference(grad_weight, grad_bias, grad_log_sigma, x, loss_weight, sigma, key, *spec) -> None:
    sizes = sizes_of(grad_weight, grad_bias, x, loss_weight)
    _linear.gradient_reference(grad_weight, grad_bias, grad_log_sigma, x, loss_weight, sigma, sizes, key, *spec)


def cost(grad_weight, grad_bias, grad_log_sigma, x, loss_weight, sigma, key, antithetic, *spec) -> Cost:
    sizes = sizes_of(grad_weight, grad_bias, x, loss_weight)
    buffers = [b for b in (grad_weight, grad_bias, grad_log_sigma) if b is not None]
    products = (1 if sizes.shared else sizes.copies) * sizes.rows * sizes.features * sizes.inputs
    draws = sizes.copies // 2 if antithetic else sizes.copies
    return Cost(
        x.element_size() * x.numel() + 2 * sum(b.numel() * b.element_size() for b in buffers),
        2 * products,
        draws * sizes.rows * sizes.features,
    )


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


register(
    Op(
        name="noisy_linear_grad_",
        schema="(Tensor(a!)? grad_weight, Tensor(b!)? grad_bias, Tensor(c!)? grad_log_sigma, Tensor x, "
        f"Tensor loss_weight, Tensor sigma, Tensor key, bool antithetic=False, {NOISE_SCHEMA}) -> ()",
        function=noisy_linear_grad_,
        check=check,
        reference=reference,
        samples=samples,
        cost=cost,
        mutates=(0, 1, 2),
        autocast=(3,),
    )
)
