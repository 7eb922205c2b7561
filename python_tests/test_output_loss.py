"""ulr.output_loss: the gradient of any loss in a network's outputs, which backpropagation goes on from."""

import functools
import itertools
import math

import pytest
import small_models
import torch
from scipy import stats
from small_models import cross_entropy, filled, v
from torch import nn
from z_test import assert_unbiased

import ulr_kernels as ulr
from ulr_kernels.baselines import loss_weights
from ulr_kernels.estimators.output_noise import OutputNoise
from ulr_kernels.noise_contract import score

modules_may_draw = small_models.modules_may_draw  # used by every test of this file
pytestmark = pytest.mark.usefixtures("one_thread")


def is_wrong(outputs, targets):
    return outputs.argmax(1) != targets


def gradient(outputs, targets, loss_fn, *args, **settings):
    """The value and the gradient in the outputs."""
    outputs = outputs.detach().requires_grad_()
    value = ulr.output_loss(outputs, targets, loss_fn, *args, **settings)
    return value.detach(), torch.autograd.grad(value, outputs)[0]


def estimates(outputs, target, loss_fn, sigma, copies, steps=12, noised_rows=2**16, **settings):
    """Values and mean gradients of many rows of one sample, `[steps]` and `[steps, columns]`."""
    rows = noised_rows // copies
    results = []
    for step in range(steps):
        key = ulr.fold_in(5, step)
        sample = outputs.expand(rows, *outputs.shape)
        value, grad = gradient(sample, target.expand(rows), loss_fn, sigma, copies, key=key, **settings)
        results.append((value, grad.sum(0)))
    values, gradients = zip(*results, strict=True)
    return torch.stack(values), torch.stack(gradients)


# --- unbiased --------------------------------------------------------------------------------------------------------

STUDENT = math.sqrt(3 / 5)
LAWS = {
    "normal": stats.norm(),
    "laplace": stats.laplace(scale=1 / math.sqrt(2)),
    "logistic": stats.logistic(scale=math.sqrt(3) / math.pi),
    "student_t": stats.t(5, scale=STUDENT),
}


@functools.cache
def exact_zero_one(dist):
    """The probability that noise makes class 1 lose, and its gradient, by quadrature over the noise of class 1.

    P(1 wins) = E[F((o_1 - o_0) / sigma + eps) F((o_1 - o_2) / sigma + eps)], F the distribution function.
    """
    law, sigma, outputs = LAWS[dist], 0.8, v(3, 3)
    quantiles = law.ppf((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    first, second = (float(outputs[1] - outputs[j]) / sigma + quantiles for j in (0, 2))
    by_first = (law.pdf(first) * law.cdf(second)).mean() / sigma
    by_second = (law.cdf(first) * law.pdf(second)).mean() / sigma
    value = 1 - (law.cdf(first) * law.cdf(second)).mean()
    return outputs, sigma, value, torch.tensor([by_first, -by_first - by_second, by_second])


@pytest.mark.parametrize(
    "dist, settings",
    [
        *((dist, {}) for dist in LAWS),
        *((dist, {"antithetic": True}) for dist in LAWS),
        ("normal", {"baseline": "clean"}),
        ("normal", {"baseline": "none"}),
        ("student_t", {"baseline": "clean"}),
        ("normal", {"sampler": "sobol", "baseline": "clean"}),
        ("normal", {"sampler": "sobol", "antithetic": True}),
        ("logistic", {"sampler": "sobol", "baseline": "clean"}),
    ],
)
def test_zero_one_loss(dist, settings):
    """Three classes; a factor of 0.95 or 1.05 on the estimates would be seen."""
    outputs, sigma, value, exact = exact_zero_one(dist)
    values, gradients = estimates(outputs, torch.tensor(1), is_wrong, sigma, 8, dist=dist, **settings)
    assert abs(values.mean() - value) < 5 * max(values.std(), 1e-4) / len(values) ** 0.5
    assert_unbiased(gradients, exact)


@pytest.mark.parametrize("df", [2.5, 3, 8.5, 200.0])
def test_degrees_of_freedom(df):
    """A step: its expectation is the distribution function, its gradient the density."""
    law = stats.t(df, scale=math.sqrt((df - 2) / df))
    settings = {"dist": "student_t", "df": df, "baseline": "clean"}
    outputs = torch.tensor([0.3])
    _, gradients = estimates(outputs, torch.tensor(0), lambda o, _: o[:, 0] > 0, 0.7, 4, **settings)
    assert_unbiased(gradients, torch.tensor([law.pdf(0.3 / 0.7) / 0.7]))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"antithetic": True},
        {"sampler": "hadamard", "antithetic": True},
        {"sampler": "hadamard", "baseline": "clean"},
    ],
)
def test_rademacher(settings):
    """No density: the expectation is that of SPSA, a sum over all signs."""
    outputs, sigma, label = v(3, 3), 0.8, torch.tensor(1)
    patterns = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)))
    losses = cross_entropy(outputs + sigma * patterns, label.expand(8))
    exact = (losses[:, None] * patterns).mean(0) / sigma
    _, gradients = estimates(outputs, label, cross_entropy, sigma, 8, dist="rademacher", **settings)
    assert_unbiased(gradients, exact)


def test_orthogonal_signs_are_exact():
    """16 directions for 10 outputs: the gradient of a linear loss."""
    outputs, slope = v(1, 5, 10), v(2, 10)
    settings = {"dist": "rademacher", "sampler": "hadamard", "antithetic": True}
    _, grad = gradient(outputs, None, lambda o, _: o @ slope, 0.5, 32, key=3, **settings)
    torch.testing.assert_close(grad, slope.expand(5, 10) / 5, rtol=1e-4, atol=1e-5)


def test_a_mean_over_copies_that_depend_on_one_another_is_biased():
    """Why orthogonal signs need pairs or a clean baseline: the mean of the others scales the estimate."""
    eps = torch.stack([ulr.noise((9, 2), 7, draw=c, dist="rademacher", sampler="hadamard") for c in range(8)])
    eps = eps[..., 1]  # of slot 1, whose signs sum to 0 over the copies
    for antithetic, scale in ((False, 8 / 7), (True, 1.0)):
        signs = torch.cat([eps, -eps]) if antithetic else eps
        estimate = (loss_weights(signs, None, "mean", antithetic) * signs).sum()
        assert float(estimate) == pytest.approx(scale, rel=1e-5)


# --- the noise -------------------------------------------------------------------------------------------------------


def eps_of(dist, df=5.0, copies=64, rows=1024, columns=4, key=11):
    return OutputNoise((rows, 1, columns), dist, df, False, "iid", 0).eps(copies, torch.tensor(key))


@pytest.mark.parametrize("dist, df", [("logistic", 5.0), ("student_t", 5.0), ("student_t", 3.0), ("student_t", 30.0)])
def test_distribution(dist, df):
    eps = eps_of(dist, df).flatten()
    law = LAWS["logistic"] if dist == "logistic" else stats.t(df, scale=math.sqrt((df - 2) / df))
    assert stats.kstest(eps.numpy(), law.cdf).pvalue > 1e-3
    assert stats.kstest((1.03 * eps).numpy(), law.cdf).pvalue < 1e-3  # a planted error
    assert eps.var().item() == pytest.approx(1, rel=0.02 if df > 4 else 0.5)
    tail = float((eps.abs() > 4).float().mean())
    assert tail == pytest.approx(2 * law.sf(4), rel=0.2)


@pytest.mark.parametrize("dist", ["logistic", "student_t"])
def test_noise_of_other_coordinates_is_independent(dist):
    eps = eps_of(dist, 8.0)
    n = eps.numel()
    others = (eps.roll(1, 0), eps.roll(1, 1), eps.roll(1, 2), eps_of(dist, 8.0, key=12))
    for other in others:
        assert abs((eps * other).mean()) < 5 / n**0.5
        assert abs(((eps.abs() - eps.abs().mean()) * (other.abs() - other.abs().mean())).mean()) < 5 / n**0.5


def test_noise_stays():
    """The first numbers of both, which later versions keep."""
    assert eps_of("logistic", copies=1, rows=1)[0, 0].tolist() == pytest.approx(LOGISTIC, rel=1e-5)
    assert eps_of("student_t", copies=1, rows=1)[0, 0].tolist() == pytest.approx(STUDENT_T, rel=1e-5)


LOGISTIC = [-0.23264055, -0.09109378, 0.33231944, 0.37863731]
STUDENT_T = [-0.46706954, -0.16143775, 0.36968341, 0.61996865]


@pytest.mark.parametrize("dist", ["normal", "laplace", "rademacher", "logistic", "student_t"])
@pytest.mark.parametrize("antithetic", [False, True])
def test_scores_are_those_of_the_noise_that_was_added(dist, antithetic):
    """The formula, from the noise that loss_fn has seen."""
    outputs, sigma, seen = v(1, 6, 2, 3), 0.4, []

    def loss_fn(noised, targets):
        assert noised.shape == (48, 2, 3) and not torch.is_grad_enabled()
        seen.append(noised)
        return noised.flatten(1).sin().sum(1)

    value, grad = gradient(outputs, None, loss_fn, sigma, 8, key=3, dist=dist, antithetic=antithetic)
    noised = seen.pop().view(8, 6, 2, 3)
    assert not seen
    eps = (noised - outputs) / sigma
    losses = noised.flatten(2).sin().sum(2)
    if dist == "logistic":
        scores = torch.tanh(eps * math.pi / math.sqrt(12)) * math.pi / math.sqrt(3)
    elif dist == "student_t":
        scores = 6 * eps / (3 + eps.square())
    else:
        scores = score(eps, dist)
    weights = loss_weights(losses, None, "mean", antithetic)
    torch.testing.assert_close(grad, (weights[..., None, None] * scores).sum(0) / sigma, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(value, losses.mean())
    if antithetic:
        torch.testing.assert_close(eps[4:], -eps[:4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dist": "laplace"},
        {"dist": "logistic"},
        {"dist": "student_t"},
        {"dist": "logistic", "sampler": "sobol", "antithetic": True},
        {"dist": "rademacher", "sampler": "hadamard", "antithetic": True},
    ],
)
@pytest.mark.parametrize("shape", [(3,), (2, 3), ()])
def test_micro_batches_have_their_part_of_the_noise(shape, settings):
    outputs, seen = v(1, 12, *shape), []

    def loss_fn(noised, targets):
        seen.append(noised.view(4, -1, *noised.shape[1:]))
        return noised.view(len(noised), -1).cos().sum(1)

    whole = gradient(outputs, None, loss_fn, 0.3, 4, key=9, **settings)[1]
    rows = shape[0] if len(shape) == 2 else 1
    parts = []
    for start, stop in ((0, 5), (5, 12)):
        part = gradient(outputs[start:stop], None, loss_fn, 0.3, 4, key=9, row_offset=start * rows, **settings)[1]
        parts.append(part * (stop - start) / 12)
    assert torch.equal(seen[0], torch.cat(seen[1:], 1))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)


def test_a_scale_for_each_column():
    outputs, sigma = v(1, 4, 3), torch.tensor([0.1, 1.0, 2.0])
    for dist in ("normal", "logistic"):
        ones, scaled = (
            gradient(outputs * s, None, lambda o, _, s=s: (o / s).sin().sum(1), s, 6, key=2, dist=dist)[1]
            for s in (torch.ones(3), sigma)
        )
        torch.testing.assert_close(scaled * sigma, ones, rtol=1e-3, atol=1e-4)


# --- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dist", ["normal", "logistic"])
def test_narrow_outputs(dtype, dist):
    """The noise is added in fp32; the gradient is rounded once."""
    outputs = v(1, 6, 4).to(dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value, grad = gradient(outputs, torch.arange(6) % 4, cross_entropy, 0.2, 8, key=1, dist=dist)
            wide = gradient(outputs.float(), torch.arange(6) % 4, cross_entropy, 0.2, 8, key=1, dist=dist)
        assert grad.dtype == dtype and value.dtype == torch.float32
        assert torch.equal(value, wide[0]) and torch.equal(grad, wide[1].to(dtype))


@pytest.mark.parametrize("dist", ["normal", "student_t"])
def test_compiled(dist):
    """One graph, also for other keys."""
    model, x, y = filled(nn.Linear(4, 3)), v(1, 6, 4), torch.arange(6) % 3

    def step(x, y, key):
        return ulr.output_loss(model(x), y, is_wrong, 0.5, 8, key=key, dist=dist)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for key in (torch.tensor(1), torch.tensor(2)):
        results = []
        for function in (step, compiled):
            value = function(x, y, key)
            results.append((value.detach(), *torch.autograd.grad(value, model.parameters())))
        torch.testing.assert_close(results[0], results[1])


def test_the_loss_of_an_evaluation():
    """Without a gradient there is a value, of the same noise."""
    outputs, y = v(1, 6, 3), torch.arange(6) % 3
    value, _ = gradient(outputs, y, is_wrong, 0.5, 8, key=1)
    plain = ulr.output_loss(outputs, y, is_wrong, 0.5, 8, key=torch.tensor(1))
    assert torch.equal(plain, value) and not plain.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(ulr.output_loss(outputs.clone(), y, is_wrong, 0.5, 8, key=1), value)


def test_it_scales_and_adds_like_any_loss():
    outputs, y = v(1, 6, 3).requires_grad_(), torch.arange(6) % 3
    smooth = cross_entropy(outputs, y).mean()
    loss = ulr.output_loss(outputs, y, is_wrong, 0.5, 8, key=1)
    first, second = (torch.autograd.grad(each, outputs, retain_graph=True)[0] for each in (smooth, loss))
    both = torch.autograd.grad(smooth + 3 * loss, outputs)[0]
    torch.testing.assert_close(both, first + 3 * second)


def test_outputs_of_any_strides():
    outputs = v(1, 6, 4, 3)
    for dist in ("normal", "logistic"):
        whole = gradient(outputs, None, lambda o, _: o.flatten(1).cos().sum(1), 0.5, 8, key=1, dist=dist)
        strided = outputs.movedim(0, 2).contiguous().movedim(2, 0)
        assert not strided.is_contiguous()
        torch.testing.assert_close(
            gradient(strided, None, lambda o, _: o.flatten(1).cos().sum(1), 0.5, 8, key=1, dist=dist), whole
        )


def test_functional_gradients():
    weight, x, y = v(1, 4, 3), v(2, 6, 4), torch.arange(6) % 3

    def loss(weight):
        return ulr.output_loss(x @ weight, y, is_wrong, 0.5, 8, key=1)

    leaf = weight.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(weight), torch.autograd.grad(loss(leaf), leaf)[0])


def test_second_derivative():
    outputs = v(1, 6, 3).requires_grad_()
    loss = ulr.output_loss(outputs, None, lambda o, _: o.sum(1), 0.5, 8, key=1)
    grad = torch.autograd.grad(loss, outputs, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="ulr::output_loss: its gradient is an estimate that has no derivative"):
        grad.square().sum().backward()


def test_targets_and_losses_of_other_kinds():
    """Texts as targets, a loss from a list of Python numbers; a mapping; none."""
    outputs, words = v(1, 3, 4), ["a", "b", "c"]

    def of_words(noised, targets):
        assert targets == words * 5
        return torch.tensor([float(row[0]) for row in noised.tolist()], dtype=torch.float64)

    def of_mapping(noised, targets):
        assert targets["y"].shape == (15,)
        return noised[:, 0]

    first = gradient(outputs, words, of_words, 0.5, 5, key=1)
    second = gradient(outputs, {"y": torch.arange(3)}, of_mapping, 0.5, 5, key=1)
    torch.testing.assert_close(first, second)


def test_losses_that_are_not_finite():
    """As in torch: the value and the gradient are not finite, so a gradient scaler skips the step."""
    outputs = v(1, 3, 4)
    for bad in (math.nan, math.inf):
        value, grad = gradient(outputs, None, lambda o, _, bad=bad: torch.full((15,), bad), 0.5, 5, key=1)
        assert not value.isfinite() and not grad.isfinite().any()


def test_the_clean_baseline_runs_the_loss_once_more():
    rows = []

    def loss_fn(noised, targets):
        rows.append(len(noised))
        return noised.sum(1)

    gradient(v(1, 3, 4), None, loss_fn, 0.5, 5, key=1, baseline="clean")
    assert rows == [15, 3]


def test_trains_on_accuracy():
    """Two classes that no line parts: an MLP, by the 0-1 loss alone."""
    x = v(1, 256, 2)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = filled(nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2)), 0.2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    before = is_wrong(model(x), y).float().mean()
    for step in range(120):
        optimizer.zero_grad()
        ulr.output_loss(model(x), y, is_wrong, 1.0, 16, key=ulr.fold_in(0, step)).backward()
        optimizer.step()
    assert before > 0.3
    assert is_wrong(model(x), y).float().mean() < 0.06


# --- errors ----------------------------------------------------------------------------------------------------------

ERRORS = [
    ({"outputs": [v(1, 3, 4)]}, "'outputs' must be a tensor .*got list"),
    ({"outputs": v(1, 3, 4).double()}, "'outputs' must be float32 or bfloat16 or float16, got torch.float64"),
    ({"outputs": torch.tensor(1.0)}, "'outputs' must hold tensors with samples on the first axis, got a scalar"),
    ({"outputs": v(1, 0, 4)}, r"'outputs' must have at least one sample, got \[0, 4\]"),
    ({"targets": torch.arange(4)}, r"'targets' must have 3 samples on the first axis, got \[4\]"),
    ({"loss_fn": lambda o, _: o.sum()}, r"'loss_fn' must return one loss per row, \[24\] here .*got \[\]"),
    ({"loss_fn": lambda o, _: 1.0}, "'loss_fn' must return one loss per row, .*got float"),
    ({"sigma": 0.0}, "'sigma' must be finite and positive, got 0.0"),
    ({"sigma": math.nan}, "'sigma' must be finite and positive, got nan"),
    ({"sigma": "a"}, "'sigma' must be a finite number or a tensor, got 'a'"),
    ({"sigma": torch.ones(3)}, r"'sigma' must be a scalar or \[4\], one for each column of outputs, got \[3\]"),
    ({"sigma": torch.ones((), requires_grad=True)}, "'sigma' must need no gradient"),
    ({"copies": 0}, "'copies' must be at least 1, got 0"),
    ({"copies": 2.0}, "'copies' must be an integer, got 2.0"),
    ({"copies": 3, "antithetic": True}, "'copies' must be even where antithetic is set, got 3"),
    ({"key": 1.5}, "'key' must be an integer in .* got 1.5"),
    ({"key": torch.tensor([1])}, "'key' must be an int64 scalar tensor"),
    ({"antithetic": 1}, "'antithetic' must be True or False, got 1"),
    ({"dist": "cauchy"}, "'dist' must be one of normal, laplace, .*student_t, got 'cauchy'"),
    ({"dist": "student_t", "df": 2}, "'df' must be a finite number above 2 .*got 2"),
    ({"sampler": "halton"}, "'sampler' must be one of .* got 'halton'"),
    (
        {"sampler": "sobol", "dist": "student_t", "antithetic": True},
        "'sampler' must be 'iid' where dist is 'student_t'",
    ),
    (
        {"sampler": "sobol", "dist": "rademacher", "antithetic": True},
        "'sampler' must be 'iid' or 'hadamard' where dist",
    ),
    ({"sampler": "hadamard", "dist": "logistic", "antithetic": True}, "'dist' must be 'rademacher' where sampler is"),
    ({"sampler": "sobol"}, "'baseline' must be 'clean' .*a mean is biased, got 'mean'"),
    ({"sampler": "hadamard", "dist": "rademacher"}, "'baseline' must be 'clean' .*a mean is biased, got 'mean'"),
    ({"baseline": "best"}, "'baseline' must be 'mean' or 'clean' or 'none', got 'best'"),
    ({"row_offset": -1}, "'row_offset' must be at least 0, got -1"),
    ({"row_offset": 2**32}, "'row_offset' must leave room for 3 below"),
]


@pytest.mark.parametrize("arguments, text", ERRORS)
def test_errors(arguments, text):
    given = {"outputs": v(1, 3, 4), "targets": torch.arange(3), "loss_fn": cross_entropy, "sigma": 0.5, "copies": 8}
    with pytest.raises(ValueError, match=f"^ulr::output_loss: {text}"):
        ulr.output_loss(**{**given, "key": 1, **arguments})


def test_without_a_key_the_noise_depends_on_the_outputs_alone():
    outputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    other = outputs.detach().clone()
    other[5, 2] += 1e-6
    found = []
    for given in (outputs, outputs.detach().clone().requires_grad_(), other.requires_grad_()):
        ulr.output_loss(given, None, lambda o, t: o.square().sum(-1), 0.5, 8).backward()
        found.append(given.grad)
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-3)
