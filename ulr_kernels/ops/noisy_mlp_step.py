"""noisy_mlp_step: noised passes of an MLP, their losses, and the gradients of all layers, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ulr_kernels import noise_contract
from ulr_kernels.baselines import BASELINES, loss_weights
from ulr_kernels.ops import _linear
from ulr_kernels.ops._linear import Linear, LinearGradient, Sizes
from ulr_kernels.ops._losses import ACTIVATIONS, activate_, check_loss, check_target, losses_of
from ulr_kernels.ops._op import (
    COL_BITS,
    DRAW_BITS,
    ROW_BITS,
    Check,
    Cost,
    NoiseSpec,
    Op,
    Output,
    register,
    sigma_tensor,
)

INJECTIONS = ("layerwise", "joint")
MOST_LAYERS = 64  # a layer's description is part of the kernel's arguments
DTYPES = (torch.float32, torch.bfloat16)


def noisy_mlp_step(
    grad_weights: Sequence[Tensor],
    grad_biases: Sequence[Tensor],
    x: Tensor,
    target: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    sigma: float | Tensor,
    keys: Tensor,
    *,
    copies: int = 32,
    antithetic: bool = False,
    injection: str = "layerwise",
    activation: str = "relu",
    loss: str = "cross_entropy",
    label_smoothing: float = 0.0,
    baseline: str = "mean",
    dist: str = "normal",
    draw: int = 0,
    row_offset: int = 0,
    sampler: str = "iid",
    guides: Tensor | None = None,
    coefficients: Tensor | None = None,
    deltas: Tensor | None = None,
    dots: Tensor | None = None,
    support: Tensor | None = None,
) -> Tensor:
    """Add the ULR gradient (arXiv 2305.08960, Theorem 1) of an MLP's mean noised loss to its buffers: a whole step.

    The step of `ulr.ULR` for `nn.Sequential(Linear, activation, ..., Linear)` in one call, which is one launch on a
    CUDA device: noise, the perturbed products and activations of all copies, losses, baseline, and the accumulation

        grad_weights[l] += sum over c, r of  (L[c, r] - b[c, r]) / (C * R) * score_lcr / sigma_l  (outer)  a_l[c, r]

    with a_l the layer's input. No activation needs a derivative, and nothing after a layer is differentiated.

    Args:
        grad_weights: L buffers `[N_l, K_l]`, fp32 or x's dtype, any strides.
        grad_biases: L buffers `[N_l]`, likewise; empty where there are no biases.
        x: `[R, K_0]`, fp32 or bf16, any strides.
        target: int64 `[R]`, classes, or for `loss="squared"` `[R, N]`, fp32 or x's dtype.
        weights: L matrices `[N_l, K_l]` of x's dtype, K_(l + 1) = N_l; 1 to 64 of them.
        biases: L vectors `[N_l]` of x's dtype, or none.
        sigma: noise scale in units of a layer's output, > 0: a float for all layers or fp32 `[L]`.
        keys: int64 `[L]`, one for each layer's noise, on x's device.
        copies: C, noised copies of each sample in a pass.
        antithetic: the second half of the copies uses the first half's noise, negated; C must be even.
        injection: "layerwise": one pass per layer, in which only that layer is noised; "joint": one pass for all.
        activation: after each layer but the last: "relu", "tanh", "sigmoid" or "step" (1 above 0, else 0).
        loss: of a row: "cross_entropy"; "squared", the mean over outputs of the squared difference; "zero_one", whether
            another class has the largest output (of equal ones the first). A class that does not exist gives NaN, but
            a cross-entropy of 0 if it is -100, as in `F.cross_entropy`.
        label_smoothing: of the cross-entropy, in [0, 1]: how much of a target is spread over all classes alike.
        baseline: "mean": of the sample's other copies or pairs; "clean": its loss without noise; "none".
        dist, draw, row_offset: which noise, as in `noisy_linear`; rows are samples.
        sampler: "iid", or "hadamard" with dist="rademacher".
        guides: None, or guesses g_l of each sample's gradient in each layer's output, fp32 `[R, N_1 + ... + N_L]`, for
            layer-wise noise on the CPU. Then sigma_l <eps_lc, k_l g_l> + b_l is subtracted from the losses of a pass,
            and k_l g_l / R added to the output's gradient: that changes the estimate's error and not its mean (a
            control variate, arXiv 1511.05176).
        coefficients: with guides, fp32 `[L, 2]`: k and b.
        deltas: with guides, a buffer like them, which gets the estimates of the gradients that they guess.
        dots: with guides, a buffer, fp32 `[L, C, R]`, which gets sigma_l <eps_lc, g_l>.
        support: with guides, None, or bool `[R, N_1 + ... + N_L]`: where not, the gradient of an output is taken for 0.

    Returns:
        The losses, fp32 `[P, C, R]`. P counts the passes, L where injection is layer-wise, else 1.

    Raises:
        ValueError: a shape, dtype, device, scale, name or index breaks the rules above, or a buffer overlaps another
            argument; nothing has been written.
    """
    scale = sigma_tensor("noisy_mlp_step", sigma, x.device, zero=False)
    if not isinstance(sigma, Tensor):
        scale = scale.expand(len(weights))
    lists = (list(grad_weights), list(grad_biases), x, target, list(weights), list(biases))
    how = (copies, antithetic, injection, activation, loss, label_smoothing, baseline, dist, draw, row_offset, sampler)
    guided = (guides, coefficients, deltas, dots, support)
    return torch.ops.ulr.noisy_mlp_step.default(*lists, scale, keys, *how, *guided)


class MlpStep(NamedTuple):
    """Arguments of noisy_mlp_step."""

    grad_weights: list[Tensor]
    grad_biases: list[Tensor]
    x: Tensor
    target: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    sigma: Tensor
    keys: Tensor
    copies: int
    antithetic: bool
    injection: str
    activation: str
    loss: str
    label_smoothing: float
    baseline: str
    dist: str
    draw: int
    row_offset: int
    sampler: str
    guides: Tensor | None
    coefficients: Tensor | None
    deltas: Tensor | None
    dots: Tensor | None
    support: Tensor | None

    @property
    def joint(self) -> bool:
        return self.injection == "joint"

    def noise(self, key: Tensor, row: int = 0) -> NoiseSpec:
        """The noise of a layer, or of all layers by their keys, for the samples from `row` on."""
        return NoiseSpec(key, self.antithetic, self.dist, self.sampler, 1, self.draw, self.row_offset + row)

    def guide(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """A layer's parts of guides, coefficients, deltas, dots and support."""
        assert self.guides is not None and self.deltas is not None
        assert self.coefficients is not None and self.dots is not None
        features = [weight.shape[0] for weight in self.weights]
        guides, deltas = (t.split(features, 1)[layer] for t in (self.guides, self.deltas))
        support = None if self.support is None else self.support.split(features, 1)[layer]
        return guides, self.coefficients[layer], deltas, self.dots[layer], support

    def gradient(self, layer: int, a: Tensor, loss_weight: Tensor, row: int = 0) -> LinearGradient:
        """A layer's gradient for the samples from `row` on; `a` is the layer's input."""
        buffers = self.grad_weights[layer], self.grad_biases[layer] if self.biases else None, None
        return LinearGradient(*buffers, a, loss_weight, self.sigma[layer], self.noise(self.keys[layer], row))


def check(a: MlpStep) -> Output:
    rules, x, weights = Check("noisy_mlp_step"), a.x, a.weights
    draws = rules.copies(a.copies, a.antithetic)
    for argument, value, allowed in (
        ("injection", a.injection, INJECTIONS),
        ("activation", a.activation, ACTIVATIONS),
        ("baseline", a.baseline, BASELINES),
    ):
        if value not in allowed:
            rules.fail(argument, f"be one of {', '.join(allowed)}", repr(value))
    check_loss(rules, a.loss, a.label_smoothing)
    rules.dist(a.dist)
    if a.sampler == "sobol":
        rules.fail("sampler", "be 'iid' or 'hadamard'", "'sobol'")
    rules.sampler(a.sampler, a.dist)
    if not 1 <= len(weights) <= MOST_LAYERS:
        rules.fail("weights", f"hold 1 to {MOST_LAYERS} layers", f"{len(weights)}")
    rules.dtype("x", x, DTYPES)
    if x.dim() != 2 or not x.shape[0]:
        rules.fail("x", "be [R, K] with at least one row", list(x.shape))
    _check_layers(rules, a)
    rules.dtype("sigma", a.sigma, (torch.float32,))
    rules.dtype("keys", a.keys, (torch.int64,))
    for argument, tensor in (("sigma", a.sigma), ("keys", a.keys)):
        rules.shape(argument, tensor, (len(weights),), "one per layer")
    check_target(rules, a.loss, a.target, x.shape[0], weights[-1].shape[0], x.dtype)
    _check_guides(rules, a)
    rules.device("x", x.device, target=a.target, sigma=a.sigma, keys=a.keys)
    rules.room("draw", a.draw, draws, DRAW_BITS)
    rules.room("row_offset", a.row_offset, x.shape[0], ROW_BITS)
    for weight in weights:
        rules.room("weights", 0, weight.shape[0], COL_BITS)
    return Output((1 if a.joint else len(weights), a.copies, x.shape[0]), torch.float32)


def _check_guides(rules: Check, a: MlpStep) -> None:
    given = (a.guides, a.coefficients, a.deltas, a.dots)
    if all(each is None for each in given):
        if a.support is not None:
            rules.fail("support", "be None where there are no guides", list(a.support.shape))
        return
    rows, layers, features = a.x.shape[0], len(a.weights), sum(weight.shape[0] for weight in a.weights)
    shapes = ((rows, features), (layers, 2), (rows, features), (layers, a.copies, rows))
    for argument, each, shape in zip(("guides", "coefficients", "deltas", "dots"), given, shapes, strict=True):
        if each is None:
            rules.fail(argument, "be given where guides, coefficients, deltas or dots are", None)
        rules.dtype(argument, each, (torch.float32,))
        rules.shape(argument, each, shape, "of layers, copies, samples and features")
    if a.support is not None:
        rules.dtype("support", a.support, (torch.bool,))
        rules.shape("support", a.support, (rows, features), "of samples and features")
    if a.joint or a.x.device.type != "cpu":
        got = f"one with injection {a.injection!r} on {a.x.device}"
        rules.fail("guides", "be None where injection is 'joint' or x on a GPU", got)


def _check_layers(rules: Check, a: MlpStep) -> None:
    x, weights, biases, buffers = a.x, a.weights, a.biases, _linear.buffer_dtypes(a.x)
    if len(biases) not in (0, len(weights)):
        rules.fail("biases", f"hold none or {len(weights)}, one per layer", len(biases))
    for argument, wanted in (("grad_weights", len(weights)), ("grad_biases", len(biases))):
        if len(getattr(a, argument)) != wanted:
            rules.fail(argument, f"hold {wanted} buffers, one for each of the layers", len(getattr(a, argument)))
    inputs = x.shape[1]
    for layer, weight in enumerate(weights):
        name, source = f"weights[{layer}]", "x" if layer == 0 else f"weights[{layer - 1}]"
        if weight.dim() != 2 or weight.shape[1] != inputs or not weight.numel():
            rules.fail(name, f"be [N, {inputs}], what {source} gives, and not empty", list(weight.shape))
        inputs = weight.shape[0]
        parts = [("weights", (x.dtype,), weight.shape), ("grad_weights", buffers, weight.shape)]
        if biases:
            parts += [("biases", (x.dtype,), weight.shape[:1]), ("grad_biases", buffers, weight.shape[:1])]
        for argument, allowed, shape in parts:
            part, tensor = f"{argument}[{layer}]", getattr(a, argument)[layer]
            rules.dtype(part, tensor, allowed)
            rules.shape(part, tensor, tuple(shape), f"{name} is {list(weight.shape)}")
            rules.device("x", x.device, **{part: tensor})


def reference(losses: Tensor, a: MlpStep) -> None:
    x, layers = a.x, range(len(a.weights))

    def forward(noised: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """The logits, and the input of each noised layer."""
        inputs, value = {}, x
        for layer in layers:
            weight, bias = a.weights[layer], a.biases[layer] if a.biases else None
            if layer in noised:
                inputs[layer] = value
                y = x.new_empty(a.copies, x.shape[0], weight.shape[0])
                noise = a.noise(a.keys[layer])
                _linear.forward_reference(y, Linear(value, weight, bias, a.sigma[layer], a.copies, noise))
            else:
                y = value.float() @ weight.float().T + (0.0 if bias is None else bias.float())
            value = y.to(x.dtype)
            if layer < layers[-1]:
                value = activate_(value, a.activation)
        return value, inputs

    clean = losses_of(forward(())[0], a.target, a.loss, a.label_smoothing) if a.baseline == "clean" else None
    for number, noised in enumerate([layers] if a.joint else [[layer] for layer in layers]):
        logits, inputs = forward(noised)
        losses[number] = losses_of(logits, a.target, a.loss, a.label_smoothing)
        if a.guides is not None:
            _guided_gradient(a, number, inputs[number], losses[number], clean)
            continue
        weight = loss_weights(losses[number], clean, a.baseline, a.antithetic)
        for layer in noised:
            _linear.gradient_reference(a.gradient(layer, inputs[layer], weight))


def _guided_gradient(a: MlpStep, layer: int, x: Tensor, losses: Tensor, clean: Tensor | None) -> None:
    """Add a layer's gradients with its guide; `x` is the layer's input."""
    guide, (coefficient, shift), deltas, dots, support = a.guide(layer)
    sizes = Sizes(a.copies, len(x), 0, guide.shape[1], True)
    copies = [eps for _, eps in _linear.copies_of_noise(a.noise(a.keys[layer]), sizes)]
    for copy, eps in enumerate(copies):
        dots[copy] = a.sigma[layer] * (eps * guide).sum(1)
    weight = loss_weights(losses - shift - coefficient * dots, clean, a.baseline, a.antithetic)
    delta = coefficient * guide / len(x)
    for of_copy, eps in zip(weight, copies, strict=True):
        delta += of_copy[:, None] * noise_contract.score(eps, a.dist) / a.sigma[layer]
    deltas.copy_(delta * len(x))
    if support is not None:
        delta = delta * support
    a.grad_weights[layer].add_(delta.T @ x.float())
    if a.biases:
        a.grad_biases[layer].add_(delta.sum(0))


def cost(a: MlpStep) -> Cost:
    rows, size = a.x.shape[0], a.x.element_size()
    moved = size * (a.x.numel() + sum(w.numel() for w in a.weights))
    moved += 2 * sum(g.numel() * g.element_size() for g in (*a.grad_weights, *a.grad_biases))
    flops = noise = 0
    for layer, weight in enumerate(a.weights):
        copies_here = 1 if layer == 0 else a.copies if a.joint else 1 + layer * a.copies
        gradient = a.copies if layer and a.joint else 1
        flops += 2 * (copies_here + gradient) * rows * weight.numel()
        noise += (a.copies // 2 if a.antithetic else a.copies) * rows * weight.shape[0]
    return Cost(moved, flops, noise)


SCHEMA = (
    "(Tensor(a!)[] grad_weights, Tensor(b!)[] grad_biases, Tensor x, Tensor target, Tensor[] weights, "
    "Tensor[] biases, Tensor sigma, Tensor keys, int copies=32, bool antithetic=False, str injection='layerwise', "
    "str activation='relu', str loss='cross_entropy', float label_smoothing=0.0, str baseline='mean', "
    "str dist='normal', int draw=0, int row_offset=0, str sampler='iid', Tensor? guides=None, "
    "Tensor? coefficients=None, Tensor(c!)? deltas=None, Tensor(d!)? dots=None, Tensor? support=None) -> Tensor"
)
register(Op(noisy_mlp_step, SCHEMA, MlpStep, check, reference, cost, autocast=(2, 4, 5)))
