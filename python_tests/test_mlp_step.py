"""noisy_mlp_step against its definition in fp64, and against the estimator on the same model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import truth
from samples import Sample
from samples.noisy_mlp_step import example
from small_models import unfilled
from test_ops import clone, pick, poison, samples  # noqa: F401 -- poison is a fixture
from torch import Tensor, nn

import ulr_kernels as ulr
from ulr_kernels import noise_contract
from ulr_kernels.backends import cpp
from ulr_kernels.ops import noisy_mlp_step
from ulr_kernels.ops._losses import losses_of

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float32, torch.bfloat16)
ACTIVATIONS = {
    "relu": lambda y: y.clamp(min=0),
    "tanh": torch.tanh,
    "sigmoid": lambda y: 1 / (1 + torch.exp(-y)),
    "step": lambda y: (y > 0).double(),
}


def true_loss(logits: Tensor, target: Tensor, loss: str, smoothing: float) -> Tensor:
    """fp64 `[C, R]` of logits `[C, R, N]`."""
    if loss == "squared":
        return (logits - target.double()).pow(2).sum(-1) / logits.shape[-1]
    ignored, target = target == -100, target.clamp(min=0)
    here = logits[:, torch.arange(len(target)), target]
    if loss == "zero_one":
        ahead = logits == logits.max(-1, keepdim=True).values
        return (ahead.int().cumsum(-1).eq(1) & ahead)[:, torch.arange(len(target)), target].logical_not().double()
    expected = (1 - smoothing) * here + smoothing * logits.mean(-1)
    return (logits.exp().sum(-1).log() - expected).masked_fill(ignored, 0)


def true_weights(losses: Tensor, clean: Tensor, baseline: str, antithetic: bool) -> Tensor:
    """(L - b) / (C R), the baseline of each copy written out."""
    copies, rows = losses.shape
    pair = (lambda c: {c, (c + copies // 2) % copies}) if antithetic else (lambda c: {c})
    result = losses.clone()
    for copy in range(copies):
        others = [c for c in range(copies) if c not in pair(copy)]
        if baseline == "clean":
            result[copy] -= clean
        elif baseline == "mean" and others:
            result[copy] -= losses[others].mean(0)
    return result / (copies * rows)


def compare(sample: Sample) -> list[Tensor]:
    """Run a sample on the back end in use: losses and buffers must be within rounding of the definition."""
    grads, grad_biases, x, target, weights, biases, sigma, keys = sample.args
    how = {"copies": 32, "antithetic": False, "injection": "layerwise", "activation": "relu", "loss": "cross_entropy"}
    how |= {"label_smoothing": 0.0, "baseline": "mean", "dist": "normal", "sampler": "iid", "draw": 0, "row_offset": 0}
    how |= sample.kwargs
    results, bias_results = [clone(g) for g in grads], [clone(g) for g in grad_biases]
    losses = noisy_mlp_step(results, bias_results, *sample.args[2:], **sample.kwargs)

    copies, count, dtype = how["copies"], len(weights), x.dtype
    half = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    sigma = torch.as_tensor(sigma).cpu().double().expand(count)
    noise = [
        truth.signed_noise(
            *(copies, x.shape[0], w.shape[0], keys[i], how["antithetic"], how["draw"]),
            dist=how["dist"],
            sampler=how["sampler"],
            row_offset=how["row_offset"],
        )
        for i, w in enumerate(weights)
    ]

    def forward(noised: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        """The inputs of all layers, then the logits, rounded where a layer's output is; and their terms' magnitude."""
        values = [x.cpu().double().expand(copies, *x.shape)]
        magnitudes = [values[0].abs()]
        for i, weight in enumerate(weights):
            w, shift = weight.cpu().double(), (biases[i].cpu().double() if biases else torch.zeros(1).double())
            shift = shift + sigma[i] * noise[i] * (i in noised)
            y = (values[-1] @ w.T + shift).to(dtype).double()
            magnitudes.append(values[-1].abs() @ w.T.abs() + shift.abs())
            values.append(ACTIVATIONS[how["activation"]](y).to(dtype).double() if i < count - 1 else y)
        return values, magnitudes

    expected = [(g.cpu().double(), g.cpu().double().abs()) for g in (*grads, *grad_biases)]
    clean = true_loss(forward([])[0][-1], target.cpu(), how["loss"], how["label_smoothing"])[0]
    for number, noised in enumerate([[i] for i in range(count)] if how["injection"] == "layerwise" else [range(count)]):
        (*inputs, logits), magnitudes = forward(noised)
        loss, got = true_loss(logits, target.cpu(), how["loss"], how["label_smoothing"]), losses[number].cpu().double()
        worst = (got - loss).abs().max()
        assert worst <= (1e-5 if dtype == torch.float32 else 0.05) * (1 + loss.abs().max()), f"losses: {worst:.2g} off"
        weight = true_weights(got, clean, how["baseline"], how["antithetic"])
        for i in noised:
            eps = noise[i]
            score = eps if how["dist"] != "laplace" else torch.copysign(torch.tensor(2.0).double().sqrt(), eps)
            s = weight[:, :, None] * score / sigma[i]
            # A baseline that is not exact scales each term as the loss does.
            m = s.abs() + (half + 1e-6) * (got.abs().max() / (copies * x.shape[0]) * score.abs() / sigma[i])
            value, magnitude = (torch.einsum("crn,crk->nk", a, b) for a, b in ((s, inputs[i]), (m, magnitudes[i])))
            expected[i] = expected[i][0] + value, expected[i][1] + magnitude
            if biases:
                before = expected[count + i]
                expected[count + i] = before[0] + s.sum((0, 1)), before[1] + m.sum((0, 1))
    for result, (value, magnitude) in zip((*results, *bias_results), expected, strict=True):
        allowed = truth.tolerance(value, magnitude, result.dtype, dtype, copies * x.shape[0] * 8)
        error = (result.cpu().double() - value).abs()
        assert not (error.isnan() | (error > allowed)).any(), f"worst {(error / allowed).max():.3g} of the tolerance"
    return [losses, *results, *bias_results]


def large(dtype: torch.dtype) -> Iterator[Sample]:
    """Calls of several tiles along every axis, which the op's own samples are too small for."""
    joint = {"injection": "joint"}
    yield Sample("panels", example(40, (530, 70, 10), "cpu", dtype), {"copies": 4})
    yield Sample("panels-joint", example(40, (530, 70, 10), "cpu", dtype), {"copies": 4, **joint})
    yield Sample("deep", example(37, (9, 30, 40, 33, 20, 7), "cpu", dtype, dtype), {"copies": 2, "dist": "rademacher"})
    yield Sample("deep-joint", example(37, (9, 30, 40, 33, 20, 7), "cpu", dtype, dtype), {"copies": 6, **joint})


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("sample_id", samples("noisy_mlp_step", good=True))
def test_step(sample_id, dtype, device) -> None:
    compare(pick("noisy_mlp_step", sample_id, device, dtype))


@pytest.mark.pair("cpp/cpu")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_every_instruction_set_and_thread_count_on_the_cpu(dtype) -> None:
    """Losses are bitwise those of one thread; sums of the gradients are oneDNN's, which splits them by threads."""
    try:
        for isa in cpp.available_isas():
            cpp.set_isa(isa)
            for sample in large(dtype):
                torch.set_num_threads(1)
                with ulr.use_backend("cpp"):
                    losses = compare(sample)[0]
                    torch.set_num_threads(3)
                    assert torch.equal(compare(sample)[0], losses), (isa, sample.id)
    finally:
        cpp.set_isa(None)


@pytest.mark.pair("cpp/cpu")
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_activations_on_the_cpu_are_torchs(activation: str) -> None:
    """By a squared loss of one output whose weight is 1; small values keep their relative accuracy."""
    x = torch.cat([torch.logspace(-6, 2, 400), -torch.logspace(-6, 2, 400), torch.tensor([0.0, torch.inf, -torch.inf])])
    one = torch.ones(1, 1)
    with ulr.use_backend("cpp"):
        losses = noisy_mlp_step(
            [one.clone(), one.clone()], [], x[:, None], torch.zeros(len(x), 1), [one, one], [], torch.full((2,), 1e-30),
            torch.tensor([1, 2]), copies=1, antithetic=False, activation=activation, loss="squared",
        )  # fmt: skip
    expected = getattr(torch, activation)(x).double().square()
    torch.testing.assert_close(losses[1, 0].double(), expected, rtol=2e-6, atol=1e-37)


@pytest.mark.parametrize("injection", ["layerwise", "joint"])
@pytest.mark.parametrize("baseline", ["mean", "clean"])
def test_it_is_the_estimator_of_the_same_model(injection, baseline, device) -> None:
    first, second, third = (unfilled(nn.Linear, k, n, device=device) for k, n in ((20, 13), (13, 9), (9, 5)))
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
    x, y = (t.to(device) for t in (truth.noise((8, 20), 1), torch.arange(8) % 5))
    with torch.no_grad():
        for key, parameter in enumerate(model.parameters()):
            parameter.copy_(ulr.noise_like(parameter, key) / parameter.shape[-1] ** 0.5)
    settings = {"copies": 8, "injection": injection, "baseline": baseline, "dist": "laplace"}
    estimator = ulr.ULR(model, sigma=0.3, seed=5, **settings)
    by_row = nn.CrossEntropyLoss(reduction="none")
    loss = estimator.backward(
        x, y, lambda outputs, targets: by_row(outputs, targets)
    )  # by layers: what a function computes is not known
    layers = [first, second, third]
    keys = torch.tensor(
        [
            noise_contract.fold_in(noise_contract.fold_in(5, 0), noise_contract.site_id(name))
            for name in ("0", "2", "4")
        ],
        device=device,
    )
    weights, biases = [layer.weight.detach() for layer in layers], [layer.bias.detach() for layer in layers]
    grads, grad_biases = [torch.zeros_like(w) for w in weights], [torch.zeros_like(b) for b in biases]
    losses = noisy_mlp_step(grads, grad_biases, x, y, weights, biases, 0.3, keys, **settings)
    torch.testing.assert_close(losses.mean(), loss, rtol=1e-5, atol=0)
    for layer, by_weight, by_bias in zip(layers, grads, grad_biases, strict=True):
        scale = layer.weight.grad.abs().max().item()
        torch.testing.assert_close(by_weight, layer.weight.grad, rtol=1e-4, atol=1e-5 * scale)
        torch.testing.assert_close(by_bias, layer.bias.grad, rtol=1e-4, atol=1e-5 * scale)


def test_a_class_that_does_not_exist_gives_nan() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    for loss in ("cross_entropy", "zero_one"):
        assert losses_of(logits, torch.tensor([2, -1]), loss, 0.0).isnan().all()
        assert losses_of(logits, torch.tensor([1, 1]), loss, 0.0).isfinite().all()
