"""The estimator is unbiased for the loss of the noised model: z-tests that would fail if it were off by 5 per cent.

One sample is repeated many times in a batch: its rows have independent noise, so a step averages over all of them, and
the scatter between steps gives the standard error.
"""

import itertools
import math

import pytest
import small_models
import torch
from small_models import (
    Junction,
    Pooled,
    Residual,
    Step,
    Tied,
    Twice,
    cross_entropy,
    filled,
    half_squares,
    v,
)
from torch import nn
from z_test import NOISED_ROWS, assert_unbiased, estimates, flat, z_test

import ulr_kernels as ulr
from ulr_kernels.baselines import loss_weights
from ulr_kernels.noise_contract import score

modules_may_draw = small_models.modules_may_draw  # used by every test of this file

# --- linear model, quadratic loss: closed form -----------------------------------------------------------------------

SIGMA = {"0": 0.5, "1": 0.4}
KINDS = [
    # dist, antithetic, copies, baseline, sampler
    ("normal", True, 2, "mean", "iid"),
    ("normal", True, 4, "mean", "iid"),
    ("normal", True, 2, "clean", "iid"),
    ("normal", True, 2, "none", "iid"),
    ("normal", False, 3, "mean", "iid"),
    ("normal", False, 1, "clean", "iid"),
    ("normal", False, 3, "none", "iid"),
    ("laplace", True, 2, "mean", "iid"),
    ("laplace", False, 3, "mean", "iid"),
    ("laplace", False, 2, "clean", "iid"),
    ("normal", False, 5, "clean", "sobol"),
    ("laplace", True, 4, "clean", "sobol"),
]


def quadratic():
    """Two linear layers without anything between, a sample, and its loss's exact gradient as a function of the noise.

    E[L] = |W2 (W1 x + b1) + b2 - t|^2 / 2 + sum_j s1_j^2 |W2 e_j|^2 / 2 + sum_i s2_i^2 / 2
    """
    model = filled(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), 0.7)
    x, target = v(1, 2), v(2, 2)

    def expected(injection, learn_sigma):
        clean = half_squares(model(x[None]), target[None]).sum()
        w2 = model[1].weight
        by_noise = SIGMA["0"] ** 2 * w2.square().sum() / 2
        gradient = flat(torch.autograd.grad(clean + (by_noise if injection == "joint" else 0), model.parameters()))
        if not learn_sigma:
            return gradient
        return torch.cat([gradient, SIGMA["0"] ** 2 * w2.square().sum(0), torch.full((2,), SIGMA["1"] ** 2)])

    return model, x, target, expected


@pytest.mark.parametrize("injection", ["layerwise", "joint"])
@pytest.mark.parametrize("dist, antithetic, copies, baseline, sampler", KINDS)
def test_linear_quadratic(dist, antithetic, copies, baseline, sampler, injection):
    model, x, target, expected = quadratic()
    settings = {"dist": dist, "antithetic": antithetic, "copies": copies, "baseline": baseline, "sampler": sampler}
    samples = estimates(model, x, target, half_squares, sigma=SIGMA, injection=injection, **settings)
    assert_unbiased(samples, expected(injection, False))


def test_sobol_pairs_with_a_mean():
    """Layer-wise, the baseline cancels within a pair: the one combination of Sobol with a mean that is allowed."""
    model, x, target, expected = quadratic()
    samples = estimates(model, x, target, half_squares, sigma=SIGMA, copies=6, antithetic=True, sampler="sobol")
    assert_unbiased(samples, expected("layerwise", False))


@pytest.mark.parametrize(
    "dist, antithetic, copies, baseline, sampler, injection",
    [
        ("normal", True, 4, "mean", "iid", "layerwise"),
        ("normal", False, 3, "mean", "iid", "joint"),
        ("laplace", False, 2, "clean", "iid", "layerwise"),
        ("normal", False, 3, "clean", "sobol", "joint"),
    ],
)
def test_learnt_sigma(dist, antithetic, copies, baseline, sampler, injection):
    model, x, target, expected = quadratic()
    settings = {"dist": dist, "antithetic": antithetic, "copies": copies, "baseline": baseline, "sampler": sampler}
    samples = estimates(
        model,
        x,
        target,
        half_squares,
        sigma=SIGMA,
        injection=injection,
        learn_sigma=True,
        noised_rows=4 * NOISED_ROWS,
        **settings,
    )
    exact = expected(injection, True)
    assert_unbiased(samples[:, -5:], exact[-5:])
    assert_unbiased(samples[:, :-5], exact[:-5])


# --- a smooth model: autograd through many samples -------------------------------------------------------------------


def noise_of(dist, generator, *shape):
    if dist == "normal":
        return torch.randn(shape, generator=generator)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    return (-uniform.sign() * torch.log1p(-2 * uniform.abs()) / math.sqrt(2)).float()


@pytest.mark.parametrize("dist", ["normal", "laplace"])
@pytest.mark.parametrize("injection", ["layerwise", "joint"])
def test_smooth_model(injection, dist):
    """Large noise through tanh and cross-entropy: the clean gradient is another one, which the test would notice."""
    model = filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), 1.5)
    x, label, sigma = v(1, 3), torch.tensor(1), 0.9
    generator = torch.Generator().manual_seed(0)

    def mean_loss(noised):
        """Pathwise: at fixed noise the loss is differentiable."""
        rows = 2**18
        hidden = model[0](x).expand(rows, 4)
        if "0" in noised:
            hidden = hidden + sigma * noise_of(dist, generator, rows, 4)
        outputs = model[2](torch.tanh(hidden))
        if "2" in noised:
            outputs = outputs + sigma * noise_of(dist, generator, rows, 3)
        return cross_entropy(outputs, label.expand(rows)).mean()

    if injection == "joint":
        exact = flat(torch.autograd.grad(mean_loss("02"), model.parameters()))
    else:
        exact = flat([g for i in "02" for g in torch.autograd.grad(mean_loss(i), model[int(i)].parameters())])
    samples = estimates(model, x, label, cross_entropy, sigma=sigma, injection=injection, dist=dist, copies=4)
    assert_unbiased(samples, exact)
    clean = flat(torch.autograd.grad(cross_entropy(model(x[None]), label[None]).sum(), model.parameters()))
    with pytest.raises(AssertionError):
        z_test(samples, clean)


# --- Rademacher: the enumerated expectation --------------------------------------------------------------------------


@pytest.mark.parametrize("antithetic, baseline", [(True, "mean"), (False, "clean"), (False, "mean")])
@pytest.mark.parametrize("injection", ["layerwise", "joint"])
def test_rademacher(injection, antithetic, baseline):
    """No density: at finite sigma the expectation is that of SPSA, a sum over all signs."""
    model = filled(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)), 1.2)
    x, target, sigma = v(1, 2), v(2, 1), 0.8

    def expected(noised):
        sums = [torch.zeros_like(p) for p in model.parameters()]
        patterns = list(itertools.product([-1.0, 1.0], repeat=3))
        for signs in patterns:
            first, second = torch.tensor(signs[:2]), torch.tensor(signs[2:])
            hidden = torch.tanh(model[0](x) + (sigma * first if "0" in noised else 0))
            output = model[2](hidden) + (sigma * second if "2" in noised else 0)
            loss = half_squares(output[None], target[None]).sum() / len(patterns) / sigma
            for index, eps, inputs in ((0, first, x), (2, second, hidden)):
                sums[index] += loss * torch.outer(eps, inputs)
                sums[index + 1] += loss * eps
        return sums

    with torch.no_grad():
        exact = expected("02") if injection == "joint" else expected("0")[:2] + expected("2")[2:]
    settings = {
        "antithetic": antithetic,
        "baseline": baseline,
        "injection": injection,
        "copies": 4 if antithetic else 3,
    }
    samples = estimates(model, x, target, half_squares, dist="rademacher", sigma=sigma, **settings)
    assert_unbiased(samples, flat(exact))


# --- losses and activations without a gradient -----------------------------------------------------------------------


def is_positive(outputs, targets):
    return outputs[:, 0] > 0


def test_zero_one_loss():
    """E[1(v > 0)] = Phi(z), z = (w x + b) / sigma: the gradient is phi(z) x / sigma, and -z phi(z) for ln sigma."""
    model, x, sigma = filled(nn.Sequential(nn.Linear(2, 1)), 0.7), v(1, 2), 0.8
    samples = estimates(model, x, None, is_positive, sigma=sigma, copies=4, learn_sigma=True, baseline="clean")
    z = model(x).item() / sigma
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    exact = torch.tensor([*(density / sigma * x).tolist(), density / sigma, -z * density])
    assert_unbiased(samples, exact)


def test_threshold_units_and_zero_one_loss():
    """A hidden layer of two steps: four patterns, each with its probability."""
    model, x, sigma = filled(nn.Sequential(nn.Linear(2, 2), Step(), nn.Linear(2, 1)), 1.2), v(1, 2), 0.8
    samples = estimates(model, x, None, is_positive, sigma=sigma, copies=4)
    on = torch.special.ndtr(model[0](x) / sigma)
    probability = torch.zeros(())
    for pattern in itertools.product([0.0, 1.0], repeat=2):
        chance = torch.stack([p if unit else 1 - p for p, unit in zip(on, pattern, strict=True)]).prod()
        probability = probability + chance * (model[2](torch.tensor(pattern)) > 0).float().squeeze()
    first = torch.autograd.grad(probability, model[0].parameters())
    second = torch.autograd.grad(
        torch.special.ndtr(model[2](model[1](model[0](x))) / sigma).sum(), model[2].parameters()
    )
    assert flat(first).abs().max() > 0.02
    assert_unbiased(samples, flat([*first, *second]))


# --- what models are made of -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("injection", ["layerwise", "joint"])
@pytest.mark.parametrize(
    "make, shape, classes",
    [(Residual, (5,), 3), (Twice, (5,), 3), (Tied, (5,), 5), (Pooled, (2, 4), 3), (Junction, (5,), 3)],
)
def test_structures(make, shape, classes, injection):
    """Small noise: autograd of the clean loss is right to 0.1 per cent."""
    model = filled(make(), 0.7)
    x, target = v(1, *shape), v(2, classes)
    exact = flat(torch.autograd.grad(half_squares(model(x[None]), target[None]).sum(), model.parameters()))
    samples = estimates(model, x, target, half_squares, sigma=0.01, injection=injection, copies=4)
    assert_unbiased(samples, exact)


# --- why a combination is refused ------------------------------------------------------------------------------------


def test_sobol_with_a_mean_of_the_others_is_biased():
    """Stratified copies: their scores sum to nearly 0, which makes the mean of the others scale by C / (C - 1)."""
    copies, rows = 8, 20_000
    for sampler, expected in (("sobol", copies / (copies - 1)), ("iid", 1.0)):
        eps = torch.stack([ulr.noise((rows, 1), 5, draw=c, sampler=sampler) for c in range(copies)])[..., 0]
        weights = loss_weights(2.0 * eps, None, "mean", antithetic=False)
        estimate = (weights * score(eps, "normal")).sum().item() / 2.0
        assert abs(estimate - expected) < 0.03, sampler
