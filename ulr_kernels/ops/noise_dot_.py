"""noise_dot_: the likelihood-ratio gradient of a weight and a bias that act feature by feature."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ulr_kernels import contract
from ulr_kernels.ops import _linear
from ulr_kernels.ops._grid import Grid, grid, matrix, one_copy
from ulr_kernels.ops._linear import Sizes, values
from ulr_kernels.ops._op import FLOATS, NOISE_SCHEMA, Check, Cost, Op, Sample, key_tensor, register, sigma_tensor
from ulr_kernels.ops.noise_add import check_copies


def noise_dot_(
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    x: Tensor,
    loss_weight: Tensor,
    sigma: float | Tensor,
    key: int | Tensor,
    *,
    feature_dim: int = -1,
    shared: bool = True,
    antithetic: bool = False,
    dist: str = "normal",
    sampler: str = "iid",
    positions: int = 1,
    draw: int = 0,
    row_offset: int = 0,
    col_offset: int = 0,
    grad_log_sigma: Tensor | None = None,
) -> None:
    """Add the gradients of ULR (arXiv 2305.08960, Theorem 1) for y = weight * x + bias, feature by feature.

    Raw sums over copies c and rows r (and over features, into a buffer that is one number):

        grad_weight    += sum of  loss_weight[c, r // positions] * score_cr / sigma * x[c, r]
        grad_bias      += sum of  loss_weight[c, r // positions] * score_cr / sigma
        grad_log_sigma += sum of  loss_weight[c, r // positions] * (eps_cr * score_cr - 1)

    For a normalisation layer x is the normalised input; for a gate, what it multiplies. The noise is that of
    `noise_add` with the same key, draw and offsets; it is made again, never stored. Where the copies share x, the sum
    over copies comes first. Sums are fp32, in an order that depends on the sizes alone.

    Args:
        grad_weight: `[N]`, N the size of the feature axis, or `[]`; fp32 or x's dtype; any strides; or None.
        grad_bias: likewise. One of the three buffers must be given.
        x: as in `noise_add`: shared by the copies or with a copy axis; only its shape counts where there is no
            grad_weight.
        loss_weight: `[C, R // positions]`, fp32, R the rows of one copy: what each copy of each sample counts,
            (L - baseline) / (C * samples) for a mean.
        sigma: noise scale, > 0: a float, or fp32 `[]` or `[N]`.
        key: of the noise site: an integer in [-2^63, 2^64) or an int64 scalar tensor.
        feature_dim, shared: as in `noise_add`.
        antithetic, dist, sampler, draw, row_offset, col_offset: as in `noise_add`.
        positions: rows per sample; must divide R.
        grad_log_sigma: `[]` or `[N]`, fp32 or x's dtype, or None; an error for Rademacher noise, which has no density.

    Raises:
        ValueError: a shape, dtype, device, scale or index breaks the rules above, or a buffer overlaps another
            argument; nothing has been written.
    """
    key = key_tensor("noise_dot_", key, x.device)
    sigma = sigma_tensor("noise_dot_", sigma, x.device, zero=False)
    which = (feature_dim, shared, antithetic, dist, sampler, positions, draw, row_offset, col_offset)
    torch.ops.ulr.noise_dot_.default(grad_weight, grad_bias, grad_log_sigma, x, loss_weight, sigma, key, *which)


def check(
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_log_sigma: Tensor | None,
    x: Tensor,
    loss_weight: Tensor,
    sigma: Tensor,
    key: Tensor,
    feature_dim: int,
    shared: bool,
    antithetic: bool,
    dist: str,
    sampler: str,
    positions: int,
    draw: int,
    row_offset: int,
    col_offset: int,
) -> None:
    rules = Check("noise_dot_")
    rules.dtype("x", x, FLOATS)
    if loss_weight.dim() == 2:
        check_copies(rules, x, loss_weight.shape[0], shared)
    rows, cols, _ = grid(rules, "x", one_copy(x, shared), feature_dim)
    _linear.check_loss_weight(rules, loss_weight, rows, positions)
    draws = rules.copies(loss_weight.shape[0], antithetic)
    buffers = {"grad_weight": grad_weight, "grad_bias": grad_bias, "grad_log_sigma": grad_log_sigma}
    if all(buffer is None for buffer in buffers.values()):
        rules.fail("grad_weight", "be given where grad_bias and grad_log_sigma are None", None)
    _linear.check_density(rules, grad_log_sigma, dist)
    for name, buffer in buffers.items():
        if buffer is not None:
            _linear.check_sigma(rules, name, buffer, cols, _linear.buffer_dtypes(x))
    _linear.check_sigma(rules, "sigma", sigma, cols, (torch.float32,))
    rules.device("x", x.device, **buffers, loss_weight=loss_weight, sigma=sigma, key=key)
    rules.noise(key, rows, cols, draws, dist, sampler, positions, draw, row_offset, col_offset)


def grid_of(x: Tensor, feature_dim: int, shared: bool) -> Grid:
    return grid(Check("noise_dot_"), "x", one_copy(x, shared), feature_dim)


def reference(
    grad_weight,
    grad_bias,
    grad_log_sigma,
    x,
    loss_weight,
    sigma,
    key,
    feature_dim,
    shared,
    antithetic,
    dist,
    sampler,
    positions,
    *at,
) -> None:
    rows, cols, axis = grid_of(x, feature_dim, shared)
    sizes = Sizes(loss_weight.shape[0], rows, 0, cols, shared)
    weights = loss_weight.repeat_interleave(positions, dim=1)
    by_weight, by_bias, by_log_sigma = (loss_weight.new_zeros(cols) for _ in range(3))
    reduced = loss_weight.new_zeros(rows, cols)
    for copy, eps in _linear.copies_of_noise(key, sizes, antithetic, dist, sampler, positions, *at):
        score = contract.score(eps, dist)
        weighted = weights[copy, :, None] * score
        reduced += weighted
        if not shared:
            by_weight += (weighted * matrix(x[copy], axis).float()).sum(0)
        by_log_sigma += (weights[copy, :, None] * (eps * score - 1)).sum(0)
    if shared:
        by_weight += (reduced * matrix(x, axis).float()).sum(0)
    by_bias += reduced.sum(0)
    sums = (by_weight / sigma, by_bias / sigma, by_log_sigma)
    for buffer, value in zip((grad_weight, grad_bias, grad_log_sigma), sums, strict=True):
        if buffer is not None:
            buffer.copy_(buffer.float() + (value if buffer.dim() else value.sum()))


def cost(grad_weight, grad_bias, grad_log_sigma, x, loss_weight, sigma, key, feature_dim, shared, antithetic, *spec):
    copies = loss_weight.shape[0]
    size = x.numel() if shared else x.numel() // copies
    buffers = [b for b in (grad_weight, grad_bias, grad_log_sigma) if b is not None]
    read = x.element_size() * x.numel() if grad_weight is not None else 0
    written = 2 * sum(b.numel() * b.element_size() for b in buffers)
    return Cost(read + written + 4 * loss_weight.numel(), 2 * x.numel(), (copies // 2 if antithetic else copies) * size)


def samples(device: str, dtype: torch.dtype) -> Iterator[Sample]:
    def v(seed: int, *shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return values(seed, *shape, device=device, dtype=dtype)

    def f(seed: int, *shape: int) -> Tensor:
        return v(seed, *shape, dtype=torch.float32)

    x, image, scale = v(1, 6, 13), v(2, 3, 13, 5, 4), f(4, 13).abs() + 0.1
    w, b = f(2, 13), f(3, 13)
    channels = {"feature_dim": 1, "positions": 20}
    pairs = {"antithetic": True}
    yield Sample("one", (w, b, x, f(5, 1, 6), 0.3, 11))
    yield Sample("shared", (w, b, x, f(5, 5, 6), scale, -11), {"draw": 5})
    yield Sample("pairs", (w, b, x, f(5, 4, 6), scale, 11), pairs)
    yield Sample("separate", (w, b, v(6, 4, 6, 13), f(5, 4, 6), scale, 11), {"shared": False, **pairs})
    yield Sample("separate-odd", (w, b, v(6, 3, 6, 13), f(5, 3, 6), 0.3, 11), {"shared": False, "dist": "laplace"})
    yield Sample("tokens", (w, b, v(6, 2, 5, 13), f(5, 4, 2), scale, 11), {"positions": 5, **pairs})
    yield Sample("image", (w, b, image, f(5, 4, 3), scale, 11), {**channels, **pairs, "grad_log_sigma": f(7, 13)})
    yield Sample(
        "image-separate", (w, b, v(6, 4, 3, 13, 5, 4), f(5, 4, 3), 0.3, 11), {**channels, **pairs, "shared": False}
    )
    yield Sample(
        "channels-last", (w, b, image.contiguous(memory_format=torch.channels_last), f(5, 3, 3), scale, 11), channels
    )
    yield Sample("laplace", (w, b, x, f(5, 4, 6), 0.3, 11), {"dist": "laplace", "grad_log_sigma": f(7, 13)})
    yield Sample("log-sigma", (w, b, x, f(5, 4, 6), scale, 11), {**pairs, "grad_log_sigma": f(7)})
    yield Sample("log-sigma-alone", (None, None, x, f(5, 4, 6), scale, 11), {"grad_log_sigma": f(7)})
    yield Sample("gate", (f(7), f(8), image, f(5, 4, 3), 0.3, 11), channels)
    yield Sample("signs", (f(2, 150), f(3, 150), v(8, 34, 150), f(9, 2, 34), 0.5, 2**63), {"dist": "rademacher"})
    yield Sample(
        "image-signs",
        (f(2, 131), f(3, 131), v(8, 2, 131, 3, 11), f(9, 2, 2), 0.5, 2**63),
        {"dist": "rademacher", "feature_dim": 1, "positions": 33},
    )
    yield Sample("wide", (f(2, 1100), f(3, 1100), v(8, 5, 1100), f(9, 3, 5), 0.5, 12))
    yield Sample("tall", (f(2, 3), f(3, 3), v(8, 1300, 3), f(9, 3, 1300), 0.5, 12), {"grad_log_sigma": f(7)})
    yield Sample("image-tall", (w, b, v(8, 2, 13, 17, 31), f(9, 3, 2), 0.5, 12), {"feature_dim": 1, "positions": 527})
    yield Sample("sobol", (w, b, image, f(5, 4, 3), scale, 11), {"sampler": "sobol", **channels})
    yield Sample("offsets", (w, b, x, f(5, 2, 6), 0.3, 11), {"draw": 9, "row_offset": 1000, "col_offset": 129})
    yield Sample("same-dtype", (v(2, 13), v(3, 13), x, f(5, 4, 6), 0.3, 11))
    yield Sample("weight-only", (w, None, x, f(5, 4, 6), 0.3, 11))
    yield Sample("bias-only", (None, b, x, f(5, 4, 6), 0.3, 11))
    yield Sample(
        "strided",
        (f(2, 26)[::2], f(3, 39)[::3], v(13, 12, 26)[::2, ::2], f(5, 6, 8).T[::2], scale.repeat_interleave(2)[::2], 11),
    )
    yield Sample("cropped", (w, b, v(14, 3, 13, 7, 6)[:, :, 1:-1, 1:-1], f(5, 2, 3), scale, 11), channels)
    yield Sample("expanded", (w, b, v(11, 1, 13).expand(6, 13), f(5, 1, 1).expand(4, 6), 0.3, 11))
    yield Sample("no-rows", (w, b, x[:0], f(5, 4, 6)[:, :0], 0.3, 11))
    yield Sample("no-features", (w[:0], b[:0], x[:, :0], f(5, 4, 6), 0.3, 11))

    loss = f(5, 4, 6)
    yield Sample("sigma-zero", (w, b, x, loss, 0.0, 1), error="'sigma' must be finite and positive, got 0.0")
    yield Sample("loss-shape", (w, b, x, loss[:, :5], 0.3, 1), error=r"'loss_weight' must be \[copies, 6\]")
    yield Sample(
        "positions-rule", (w, b, x, loss, 0.3, 1), {"positions": 4}, error="'positions' must divide the 6 rows"
    )
    yield Sample("no-copies", (w, b, x, loss[:0], 0.3, 1), error="'copies' must be at least 1, got 0")
    yield Sample("odd", (w, b, x, loss[:3], 0.3, 1), pairs, error="'copies' must be even")
    yield Sample("x-copies", (w, b, v(6, 3, 6, 13), loss, 0.3, 1), {"shared": False}, error="'x' must have 4 copies")
    yield Sample("x-dtype", (w, b, x.double(), loss, 0.3, 1), error="'x' must be float32")
    yield Sample("axis", (w, b, x, loss, 0.3, 1), {"feature_dim": 2}, error="'feature_dim' must be an axis")
    yield Sample("weight-shape", (w[:5], b, x, loss, 0.3, 1), error=r"'grad_weight' must be a scalar or \[13\]")
    yield Sample("bias-shape", (w, b[:5], x, loss, 0.3, 1), error=r"'grad_bias' must be a scalar or \[13\]")
    yield Sample("no-buffer", (None, None, x, loss, 0.3, 1), error="'grad_weight' must be given")
    yield Sample("buffer-dtype", (w.double(), b, x, loss, 0.3, 1), error="'grad_weight' must be float32")
    yield Sample(
        "density",
        (w, b, x, loss, 0.3, 1),
        {"dist": "rademacher", "grad_log_sigma": f(7)},
        error="'grad_log_sigma' must be None where dist is 'rademacher'",
    )
    yield Sample("self-overlap", (w[:1].expand(13), b, x, loss, 0.3, 1), error="'grad_weight' must not overlap itself")
    yield Sample("overlap", (w, w, x, loss, 0.3, 1), error="'grad_weight' must not overlap 'grad_bias'")


register(
    Op(
        name="noise_dot_",
        schema="(Tensor(a!)? grad_weight, Tensor(b!)? grad_bias, Tensor(c!)? grad_log_sigma, Tensor x, "
        f"Tensor loss_weight, Tensor sigma, Tensor key, int feature_dim=-1, bool shared=True, bool antithetic=False, "
        f"{NOISE_SCHEMA}) -> ()",
        function=noise_dot_,
        check=check,
        reference=reference,
        samples=samples,
        cost=cost,
        mutates=(0, 1, 2),
    )
)
