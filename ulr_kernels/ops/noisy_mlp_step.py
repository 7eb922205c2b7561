"""noisy_mlp_step: noised passes of an MLP, their losses, and the gradients of all layers, in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ulr_kernels.baselines import BASELINES, loss_weights
from ulr_kernels.ops import _linear
from ulr_kernels.ops._linear import Sizes, values
from ulr_kernels.ops._losses import ACTIVATIONS, activate_, check_loss, check_target, losses_of
from ulr_kernels.ops._op import COL_BITS, DRAW_BITS, ROW_BITS, Check, Cost, Op, Output, Sample, register, sigma_tensor

INJECTIONS = ("layerwise", "joint")
MOST_LAYERS = 64  # what a kernel is told of a layer travels with its launch
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
    antithetic: bool = True,
    injection: str = "layerwise",
    activation: str = "relu",
    loss: str = "cross_entropy",
    label_smoothing: float = 0.0,
    baseline: str = "mean",
    dist: str = "normal",
    draw: int = 0,
    row_offset: int = 0,
) -> Tensor:
    """Add the ULR gradient (arXiv 2305.08960, Theorem 1) of an MLP's mean noised loss to its buffers: a whole step.

    What `ulr.ULR` does with `nn.Sequential(Linear, activation, ..., Linear)`, in one call, which is one launch on a
    CUDA device: noise, the perturbed products and activations of all copies, losses, baseline, and the accumulation

        grad_weights[l] += sum over c, r of  (L[c, r] - b[c, r]) / (C * R) * score_lcr / sigma_l  (outer)  a_l[c, r]

    with a_l the layer's input. No activation needs a derivative, and none of what follows a layer is differentiated.

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

    Returns:
        The losses, fp32 `[P, C, R]`, of P passes: L where injection is layer-wise, else 1.

    Raises:
        ValueError: a shape, dtype, device, scale, name or index breaks the rules above, or a buffer overlaps another
            argument; nothing has been written.
    """
    scale = sigma_tensor("noisy_mlp_step", sigma, x.device, zero=False)
    if not isinstance(sigma, Tensor):
        scale = scale.expand(len(weights))
    lists = (list(grad_weights), list(grad_biases), x, target, list(weights), list(biases))
    how = (copies, antithetic, injection, activation, loss, label_smoothing, baseline, dist, draw, row_offset)
    return torch.ops.ulr.noisy_mlp_step.default(*lists, scale, keys, *how)


def check(
    grad_weights: list[Tensor],
    grad_biases: list[Tensor],
    x: Tensor,
    target: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    sigma: Tensor,
    keys: Tensor,
    copies: int,
    antithetic: bool,
    injection: str,
    activation: str,
    loss: str,
    label_smoothing: float,
    baseline: str,
    dist: str,
    draw: int,
    row_offset: int,
) -> Output:
    rules = Check("noisy_mlp_step")
    draws = rules.copies(copies, antithetic)
    for argument, value, allowed in (
        ("injection", injection, INJECTIONS),
        ("activation", activation, ACTIVATIONS),
        ("baseline", baseline, BASELINES),
    ):
        if value not in allowed:
            rules.fail(argument, f"be one of {', '.join(allowed)}", repr(value))
    check_loss(rules, loss, label_smoothing)
    rules.dist(dist)
    if not 1 <= len(weights) <= MOST_LAYERS:
        rules.fail("weights", f"hold 1 to {MOST_LAYERS} layers", f"{len(weights)}")
    rules.dtype("x", x, DTYPES)
    if x.dim() != 2 or not x.shape[0]:
        rules.fail("x", "be [R, K] with at least one row", list(x.shape))
    _check_layers(rules, grad_weights, grad_biases, x, weights, biases)
    rules.dtype("sigma", sigma, (torch.float32,))
    rules.dtype("keys", keys, (torch.int64,))
    for argument, tensor in (("sigma", sigma), ("keys", keys)):
        rules.shape(argument, tensor, (len(weights),), "one per layer")
    check_target(rules, loss, target, x.shape[0], weights[-1].shape[0], x.dtype)
    rules.device("x", x.device, target=target, sigma=sigma, keys=keys)
    rules.room("draw", draw, draws, DRAW_BITS)
    rules.room("row_offset", row_offset, x.shape[0], ROW_BITS)
    for weight in weights:
        rules.room("weights", 0, weight.shape[0], COL_BITS)
    passes = len(weights) if injection == "layerwise" else 1
    return Output((passes, copies, x.shape[0]), torch.float32)


def _check_layers(
    rules: Check,
    grad_weights: list[Tensor],
    grad_biases: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
) -> None:
    buffers = _linear.buffer_dtypes(x)
    if len(biases) not in (0, len(weights)):
        rules.fail("biases", f"hold none or {len(weights)}, one per layer", len(biases))
    for argument, given, wanted in (
        ("grad_weights", grad_weights, len(weights)),
        ("grad_biases", grad_biases, len(biases)),
    ):
        if len(given) != wanted:
            rules.fail(argument, f"hold {wanted} buffers, one for each of the layers", len(given))
    inputs = x.shape[1]
    for layer, weight in enumerate(weights):
        name, source = f"weights[{layer}]", "x" if layer == 0 else f"weights[{layer - 1}]"
        if weight.dim() != 2 or weight.shape[1] != inputs or not weight.numel():
            rules.fail(name, f"be [N, {inputs}], what {source} gives, and not empty", list(weight.shape))
        inputs = weight.shape[0]
        rules.dtype(name, weight, (x.dtype,))
        rules.device("x", x.device, **{name: weight})
        rules.dtype(f"grad_weights[{layer}]", grad_weights[layer], buffers)
        rules.shape(f"grad_weights[{layer}]", grad_weights[layer], tuple(weight.shape), f"as {name}")
        rules.device("x", x.device, **{f"grad_weights[{layer}]": grad_weights[layer]})
        if biases:
            for argument, vectors, allowed in (
                ("biases", biases, (x.dtype,)),
                ("grad_biases", grad_biases, buffers),
            ):
                rules.dtype(f"{argument}[{layer}]", vectors[layer], allowed)
                rules.shape(f"{argument}[{layer}]", vectors[layer], (inputs,), f"{name} is {list(weight.shape)}")
                rules.device("x", x.device, **{f"{argument}[{layer}]": vectors[layer]})


def reference(
    losses: Tensor,
    grad_weights: list[Tensor],
    grad_biases: list[Tensor],
    x: Tensor,
    target: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    sigma: Tensor,
    keys: Tensor,
    copies: int,
    antithetic: bool,
    injection: str,
    activation: str,
    loss: str,
    label_smoothing: float,
    baseline: str,
    dist: str,
    draw: int,
    row_offset: int,
) -> None:
    offsets = draw, row_offset, 0
    layers = range(len(weights))

    def forward(noised: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """The logits, and the input of each noised layer."""
        inputs, value = {}, x
        for layer in layers:
            bias = biases[layer] if biases else None
            sizes = Sizes(copies, x.shape[0], value.shape[-1], weights[layer].shape[0], value.dim() == 2)
            if layer in noised:
                inputs[layer] = value
                y = x.new_empty(copies, sizes.rows, sizes.features)
                of_layer = (weights[layer], bias, sigma[layer], sizes, keys[layer], antithetic, dist, "iid", 1)
                _linear.forward_reference(y, value, *of_layer, *offsets)
            else:
                y = value.float() @ weights[layer].float().T + (0.0 if bias is None else bias.float())
            value = y.to(x.dtype)
            if layer < layers[-1]:
                value = activate_(value, activation)
        return value, inputs

    clean = losses_of(forward(())[0], target, loss, label_smoothing) if baseline == "clean" else None
    for number, noised in enumerate([[layer] for layer in layers] if injection == "layerwise" else [layers]):
        logits, inputs = forward(noised)
        losses[number] = losses_of(logits, target, loss, label_smoothing)
        weight = loss_weights(losses[number], clean, baseline, antithetic)
        for layer in noised:
            a = inputs[layer]
            sizes = Sizes(copies, x.shape[0], a.shape[-1], weights[layer].shape[0], a.dim() == 2)
            buffers = grad_weights[layer], grad_biases[layer] if biases else None, None
            _linear.gradient_reference(
                *buffers, a, weight, sigma[layer], sizes, keys[layer], antithetic, dist, "iid", 1, *offsets
            )


def cost(
    grad_weights, grad_biases, x, target, weights, biases, sigma, keys, copies, antithetic, injection, *spec
) -> Cost:
    rows = x.shape[0]
    size = x.element_size()
    moved = size * (x.numel() + sum(w.numel() for w in weights))
    moved += 2 * sum(g.numel() * g.element_size() for g in (*grad_weights, *grad_biases))
    flops = noise = 0
    for layer, weight in enumerate(weights):
        copies_here = 1 if layer == 0 else copies if injection == "joint" else 1 + layer * copies
        gradient = 1 if layer == 0 or injection == "layerwise" else copies
        flops += 2 * (copies_here + gradient) * rows * weight.numel()
        noise += (copies // 2 if antithetic else copies) * rows * weight.shape[0]
    return Cost(moved, flops, noise)


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
    if dtype not in DTYPES:
        return

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


register(
    Op(
        name="noisy_mlp_step",
        schema="(Tensor(a!)[] grad_weights, Tensor(b!)[] grad_biases, Tensor x, Tensor target, Tensor[] weights, "
        "Tensor[] biases, Tensor sigma, Tensor keys, int copies=32, bool antithetic=True, str injection='layerwise', "
        "str activation='relu', str loss='cross_entropy', float label_smoothing=0.0, str baseline='mean', "
        "str dist='normal', int draw=0, int row_offset=0) -> Tensor",
        function=noisy_mlp_step,
        check=check,
        reference=reference,
        samples=samples,
        cost=cost,
        mutates=(0, 1),
        autocast=(2, 4, 5),
    )
)
