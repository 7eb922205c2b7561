"""The rules of the noisy linear ops, and their reference in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ulr_kernels import noise_contract
from ulr_kernels.ops._op import FLOATS, Check, Cost, NoiseSpec


class Sizes(NamedTuple):
    """Copies C, rows R, inputs K, features N; shared: x has no copy axis."""

    copies: int
    rows: int
    inputs: int
    features: int
    shared: bool


class Linear(NamedTuple):
    """Arguments of noisy_linear."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    sigma: Tensor
    copies: int
    noise: NoiseSpec

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.copies, self.x.shape[-2], self.x.shape[-1], self.weight.shape[0], self.x.dim() == 2)


class Gradient(Protocol):
    """The arguments that gradients of linear layers and convolutions share."""

    @property
    def grad_weight(self) -> Tensor | None: ...
    @property
    def grad_bias(self) -> Tensor | None: ...
    @property
    def grad_log_sigma(self) -> Tensor | None: ...
    @property
    def x(self) -> Tensor: ...
    @property
    def loss_weight(self) -> Tensor: ...
    @property
    def sigma(self) -> Tensor: ...
    @property
    def noise(self) -> NoiseSpec: ...
    @property
    def weight(self) -> Tensor | None: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def buffers(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...
    @property
    def sizes(self) -> Sizes: ...


class LinearGradient(NamedTuple):
    """Arguments of noisy_linear_grad_; with a weight, those of noisy_linear_recompute_."""

    grad_weight: Tensor | None
    grad_bias: Tensor | None
    grad_log_sigma: Tensor | None
    x: Tensor
    loss_weight: Tensor
    sigma: Tensor
    noise: NoiseSpec
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def buffers(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.grad_weight, self.grad_bias, self.grad_log_sigma

    @property
    def sizes(self) -> Sizes:
        first = next(t for t in (self.weight, self.grad_weight, self.grad_bias) if t is not None)
        x = self.x
        return Sizes(self.loss_weight.shape[0], x.shape[-2], x.shape[-1], first.shape[0], x.dim() == 2)


# --- checks ----------------------------------------------------------------------------------------------------------


def check_x(check: Check, x: Tensor, copies: int, weight: Tensor | None) -> None:
    check.dtype("x", x, FLOATS)
    if x.dim() not in (2, 3):
        check.fail("x", "be [R, K] or [C, R, K]", list(x.shape))
    if weight is not None and x.shape[-1] != weight.shape[1]:
        check.fail("x", f"have {weight.shape[1]} features (weight is {list(weight.shape)})", list(x.shape))
    if x.dim() == 3 and x.shape[0] != copies:
        check.fail("x", f"have {copies} copies on its first axis, or no copy axis", list(x.shape))


def check_weight(check: Check, x: Tensor, weight: Tensor, bias: Tensor | None, features: int) -> None:
    check.dtype("weight", weight, (x.dtype,))
    if bias is not None:
        check.dtype("bias", bias, (x.dtype,))
        check.shape("bias", bias, (features,), f"weight is {list(weight.shape)}")


def check_sigma(check: Check, argument: str, sigma: Tensor, features: int, allowed: tuple[torch.dtype, ...]) -> None:
    check.dtype(argument, sigma, allowed)
    if sigma.dim() and sigma.shape != (features,):
        check.fail(argument, f"be a scalar or [{features}], one per feature", list(sigma.shape))


def check_loss_weight(check: Check, loss_weight: Tensor, rows: int, positions: int) -> None:
    check.dtype("loss_weight", loss_weight, (torch.float32,))
    samples = rows // max(positions, 1)
    if rows % max(positions, 1):
        check.fail("positions", f"divide the {rows} rows", positions)
    if loss_weight.dim() != 2 or loss_weight.shape[1] not in (samples, rows):
        others = f", or [copies, {rows}], one per row" if rows != samples else ""
        check.fail("loss_weight", f"be [copies, {samples}], one per sample of x{others}", list(loss_weight.shape))
    if loss_weight.shape[1] != samples and loss_weight.device.type != "cpu":  # kernels of GPUs read one per sample
        rule = f"be [copies, {samples}], one per sample of x, on a GPU (one per row where positions is 1)"
        check.fail("loss_weight", rule, list(loss_weight.shape))


def check_gradient(check: Check, a: LinearGradient) -> None:
    """All rules of a gradient."""
    if a.x.dim() not in (2, 3):
        check.fail("x", "be [R, K] or [C, R, K]", list(a.x.shape))
    if a.weight is not None and a.weight.dim() != 2:
        check.fail("weight", "be [N, K]", list(a.weight.shape))
    rows, inputs = a.x.shape[-2:]
    check_loss_weight(check, a.loss_weight, rows, a.noise.positions)
    copies = a.loss_weight.shape[0]
    draws = check.copies(copies, a.noise.antithetic)
    check_x(check, a.x, copies, a.weight)
    if a.weight is not None:
        check_weight(check, a.x, a.weight, a.bias, a.weight.shape[0])
    features = None
    if a.grad_weight is not None:
        check.dtype("grad_weight", a.grad_weight, buffer_dtypes(a.x))
        if a.grad_weight.dim() != 2 or a.grad_weight.shape[1] != inputs:
            check.fail("grad_weight", f"be [N, {inputs}] (x is {list(a.x.shape)})", list(a.grad_weight.shape))
        features = a.grad_weight.shape[0]
    features = check_feature_gradients(check, features, a)
    if a.weight is not None and features != a.weight.shape[0]:
        check.fail("grad_weight", f"have {a.weight.shape[0]} features (weight is {list(a.weight.shape)})", features)
    check_sigma(check, "sigma", a.sigma, features, (torch.float32,))
    check_gradient_devices(check, a)
    check.noise(a.noise, rows, features, draws)


def check_gradient_devices(check: Check, a: Gradient) -> None:
    names = ("grad_weight", "grad_bias", "grad_log_sigma", "weight", "bias", "loss_weight", "sigma")
    check.device("x", a.x.device, **{name: getattr(a, name) for name in names}, key=a.noise.key)


def buffer_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    return (torch.float32,) if x.dtype == torch.float32 else (torch.float32, x.dtype)


def check_feature_gradients(check: Check, features: int | None, a: Gradient) -> int:
    """Check grad_bias and grad_log_sigma; return the number of features, by default grad_bias's."""
    if a.grad_bias is not None:
        check.dtype("grad_bias", a.grad_bias, buffer_dtypes(a.x))
        if a.grad_bias.dim() != 1 or features not in (None, a.grad_bias.shape[0]):
            check.fail("grad_bias", "be [N], one per feature of grad_weight", list(a.grad_bias.shape))
        features = a.grad_bias.shape[0]
    if features is None:
        check.fail("grad_weight", "be given where grad_bias is None", None)
    check_density(check, a.grad_log_sigma, a.noise.dist)
    if a.grad_log_sigma is not None:
        check_sigma(check, "grad_log_sigma", a.grad_log_sigma, features, buffer_dtypes(a.x))
    return features


def check_density(check: Check, grad_log_sigma: Tensor | None, dist: str) -> None:
    if grad_log_sigma is not None and dist == "rademacher":
        check.fail("grad_log_sigma", "be None where dist is 'rademacher', which has no density", "a tensor")


# --- reference -------------------------------------------------------------------------------------------------------


def copies_of_noise(noise: NoiseSpec, sizes: Sizes) -> Iterator[tuple[int, Tensor]]:
    """Copy by copy: its number and its signed noise, fp32 `[R, N]`."""
    draws, signs = noise_contract.copy_draws(sizes.copies, noise.antithetic, noise.draw, noise.key.device)
    for copy in range(sizes.copies):
        eps = noise_contract.noise_grid(
            sizes.rows,
            sizes.features,
            draws[copy : copy + 1],
            noise.key,
            dist=noise.dist,
            sampler=noise.sampler,
            positions=noise.positions,
            row_offset=noise.row_offset,
            col_offset=noise.col_offset,
            width=noise.width,
        )[0]
        yield copy, eps * signs[copy]


def forward_reference(y: Tensor, a: Linear | LinearGradient) -> None:
    """y[c] = x[c] W^T + b + sigma * eps_c, with fp32 sums."""
    x, weight, sizes = a.x, a.weight, a.sizes
    assert weight is not None
    shift = 0.0 if a.bias is None else a.bias.float()
    shared = x.float() @ weight.float().T + shift if sizes.shared else None
    for copy, eps in copies_of_noise(a.noise, sizes):
        clean = shared if shared is not None else x[copy].float() @ weight.float().T + shift
        y[copy].copy_(clean + a.sigma * eps)


def weights_of_rows(loss_weight: Tensor, rows: int) -> Tensor:
    """`[copies, rows]`: the weight of each row's sample, or its own."""
    return loss_weight.repeat_interleave(rows // max(1, loss_weight.shape[1]), dim=1)


def _outer(scores: Tensor, x: Tensor) -> Tensor:
    return scores.T @ x.float()


def gradient_reference(a: Gradient, product: Callable[[Tensor, Tensor], Tensor] = _outer) -> None:
    """dE[L]/dW = E[L score x^T] / sigma and its companions, as raw sums over copies and rows.

    `product`: the layer's own parameter Jacobian, applied to weighted scores `[R, N]` and one copy's input.
    """
    sizes, loss_weight = a.sizes, a.loss_weight
    by_weight = None if a.grad_weight is None else loss_weight.new_zeros(a.grad_weight.shape)
    by_bias = loss_weight.new_zeros(sizes.features)
    by_log_sigma = loss_weight.new_zeros(sizes.features)
    weights = weights_of_rows(loss_weight, sizes.rows)
    reduced = loss_weight.new_zeros(sizes.rows, sizes.features)
    for copy, eps in copies_of_noise(a.noise, sizes):
        score = noise_contract.score(eps, a.noise.dist)
        weighted = weights[copy, :, None] * score / a.sigma
        if sizes.shared:
            reduced += weighted
        elif by_weight is not None:
            by_weight += product(weighted, a.x[copy])
        by_bias += weighted.sum(0)
        by_log_sigma += (weights[copy, :, None] * (eps * score - 1)).sum(0)
    if sizes.shared and by_weight is not None:
        by_weight += product(reduced, a.x)
    for buffer, value in ((a.grad_weight, by_weight), (a.grad_bias, by_bias)):
        if buffer is not None and value is not None:
            buffer.copy_(buffer.float() + value)
    if a.grad_log_sigma is not None:
        total = by_log_sigma if a.grad_log_sigma.dim() else by_log_sigma.sum()
        a.grad_log_sigma.copy_(a.grad_log_sigma.float() + total)


class Pathwise(torch.autograd.Function):
    """The ordinary gradient through y at fixed noise: half-order estimators cut backpropagation above or below it.

    Its arguments: the op's name; a function from the output's gradient, x, the weight and which of them need one, to
    the gradients of x and of the weight; the op's own arguments; its arguments from `copies` on; its tensors.
    """

    @staticmethod
    def forward(ctx, op, layer_backward, own, which, x, weight, bias, sigma, key):
        ctx.save_for_backward(x, weight, bias, sigma, key)
        ctx.layer_backward, ctx.which = layer_backward, which
        return getattr(torch.ops.ulr, op).default(x, weight, bias, sigma, key, *own, *which)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, sigma, key = ctx.saved_tensors
        _, _, _, _, *first_two, bias_wants, sigma_wants, _ = ctx.needs_input_grad
        grad = grad.to(weight.dtype)  # autocast may have computed y in a narrower type
        shared = x.dim() == grad.dim() - 1
        by_output = grad.sum(0) if shared else grad.flatten(0, 1)  # copies that share x add up
        inputs = (x if shared else x.flatten(0, 1)).to(grad.dtype)
        grad_x, grad_weight = ctx.layer_backward(by_output, inputs, weight, first_two)
        grad_x = grad_x if grad_x is None else grad_x.reshape(x.shape)
        grad_bias = by_output.sum((0, 2, 3)[: by_output.dim() - 1]) if bias is not None and bias_wants else None
        by_row = grad.movedim(2, -1).flatten(1, -2) if grad.dim() == 5 else grad
        grad_sigma = sigma_gradient(by_row, sigma, key, ctx.which) if sigma_wants else None
        return None, None, None, None, grad_x, grad_weight, grad_bias, grad_sigma, None


def sigma_gradient(grad: Tensor, sigma: Tensor, key: Tensor, which: tuple) -> Tensor:
    """The pathwise gradient of sigma from that of the output, `[C, R, N]`, with the noise made again.

    `which`: the arguments of `noisy_linear` from `copies` on. For an x without inputs its output is sigma * eps.
    """
    nothing = grad.new_zeros(grad.shape[1], 0, dtype=torch.float32)
    weight, unit = nothing.new_zeros(grad.shape[2], 0), torch.ones_like(sigma)
    eps = torch.ops.ulr.noisy_linear.default(nothing, weight, None, unit, key, *which)
    total = (grad.float() * eps).sum((0, 1))
    return total if sigma.dim() else total.sum()


# --- costs -----------------------------------------------------------------------------------------------------------


def gradient_cost(a: Gradient, sizes: Sizes, products: int) -> Cost:
    """The cost of a gradient, or, with a weight, of output and gradient; `products`: multiply-adds of either."""
    moved = a.x.element_size() * a.x.numel() + 2 * sum(b.numel() * b.element_size() for b in a.buffers if b is not None)
    out = sizes.rows * sizes.features
    noise = a.noise.draws(sizes.copies) * out
    if a.weight is None:
        return Cost(moved, 2 * products, noise)
    return Cost(moved + a.x.element_size() * (a.weight.numel() + sizes.copies * out), 4 * products, noise)
