"""ulr.check: its numbers against what is known, and its verdicts on models that are wrong in known ways."""

import math

import pytest
import small_models
import torch
import torch.nn.functional as F
from small_models import Pooled, Step, cross_entropy, filled, v
from torch import nn

import ulr_kernels as ulr
from ulr_kernels.nn.linear import LinearCall

modules_may_draw = small_models.modules_may_draw  # used by every test of this file


def mlp():
    return filled(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 5)))


X, Y = v(1, 6, 12), torch.arange(6) % 5


def numbers(report, field):
    return {layer.layer: getattr(layer, field) for layer in report.layers}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"antithetic": False},
        {"antithetic": False, "baseline": "clean"},
        {"dist": "laplace"},
        {"dist": "rademacher"},
        {"injection": "joint", "sigma": {"0": 0.005, "2": 0.01, "4": 0.02}},
        {"noise": "weights", "copies": 64},
        {"noise": "weights", "copies": 64, "dist": "laplace", "antithetic": False},
        {"noise": "weights", "copies": 64, "injection": "joint", "sigma": {"0": 0.005, "2": 0.01, "4": 0.02}},
        {"noise": {"0": "weights"}, "copies": 64},
    ],
)
def test_cosines_follow_the_law(settings):
    report = ulr.check(mlp(), X, Y, cross_entropy, steps=48, **{"sigma": 0.01, "copies": 24, **settings})
    assert report.ok and report.verdict == "The estimates agree with autograd."
    assert sorted(layer.layer for layer in report.layers) == ["0", "2", "4"]
    for layer in report.layers:
        assert abs(layer.slope - 1) < 4.5 * layer.slope_error < 0.5
        assert layer.cosine == pytest.approx(layer.predicted_cosine, abs=0.05)
        assert layer.agreement == pytest.approx(layer.predicted_cosine**2, abs=0.05)


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("dist, kappa, c", [("normal", 1, 1), ("rademacher", 1, -1), ("laplace", 2, -0.5)])
def test_law_of_one_sample(dist, kappa, c, antithetic):
    """(1 + kappa (d + c) / M)^(-1/2) with d outputs and M directions: copies, or pairs."""
    how = {"copies": 20} if antithetic else {"copies": 10, "baseline": "clean"}
    report = ulr.check(mlp(), X[:1], Y[:1], cross_entropy, dist=dist, antithetic=antithetic, steps=2, **how)
    for layer, d in (("0", 16), ("2", 8), ("4", 5)):
        assert numbers(report, "predicted_cosine")[layer] == pytest.approx((1 + kappa * (d + c) / 10) ** -0.5, rel=1e-5)


def test_law_with_positions_and_repeated_calls():
    report = ulr.check(filled(Pooled()), v(1, 4, 3, 4), Y[:4] % 3, cross_entropy, sigma=0.01, copies=24, steps=48)
    assert report.ok and len(report.layers) == 2
    for layer in report.layers:
        assert layer.cosine == pytest.approx(layer.predicted_cosine, abs=0.04)


def test_law_of_convolutions_and_normalisation():
    """A stride and a padding; and normalisation."""
    layers = [nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3)]
    images = v(1, 6, 2, 4, 4)
    report = ulr.check(
        filled(nn.Sequential(*layers)), images, Y[:6] % 3, cross_entropy, sigma=0.01, copies=64, steps=48
    )
    assert report.ok, report
    assert len(report.layers) == 3
    for layer in report.layers:
        assert layer.cosine == pytest.approx(layer.predicted_cosine, abs=0.04)


def test_no_baseline_is_seen_in_the_law():
    settings = {"antithetic": False, "baseline": "none", "sigma": 0.05, "copies": 8, "steps": 64}
    for layer in ulr.check(mlp(), X, Y, cross_entropy, **settings).layers:
        assert layer.predicted_cosine < 0.05
        assert abs(layer.cosine - layer.predicted_cosine) < 0.06


def test_report_reads_well():
    text = str(ulr.check(mlp(), X, Y, cross_entropy, sigma=0.01, steps=4))
    header, *rows, streams, verdict = text.splitlines()
    assert header.split() == ["layer", "slope", "cosine", "predicted", "agreement"]
    assert len(rows) == 3 and {len(row) for row in rows} == {len(header)}
    assert streams.startswith("greatest correlation of noise streams, in standard deviations: layers ")
    assert verdict.startswith("The estimates agree with autograd.")


def test_nothing_changes():
    model = mlp()
    model[0].weight.grad = torch.ones(16, 12)
    ulr.check(model, X, Y, cross_entropy, steps=2)
    assert torch.equal(model[0].weight.grad, torch.ones(16, 12))
    assert model[2].weight.grad is None
    assert model.training


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_sigma_too_large():
    report = ulr.check(mlp(), X, Y, cross_entropy, sigma=4.0, copies=64)
    assert not report.ok
    assert report.verdict.startswith("sigma is too large for '0'")
    assert numbers(report, "slope")["0"] < 0.8


def test_sigma_too_small():
    """The noise drowns in the rounding of the losses."""
    report = ulr.check(mlp(), X, Y, cross_entropy, sigma=1e-8, copies=64)
    assert not report.ok
    assert report.verdict.startswith("sigma is too small for '0', '2', '4'")


def test_loss_that_is_not_per_row():
    report = ulr.check(mlp(), X, Y, F.cross_entropy)
    assert not report.ok and report.layers == ()
    assert "'loss_fn' must return one loss per row" in str(report)


def test_model_that_cannot_be_trained():
    model = nn.Sequential(mlp(), nn.Linear(5, 5))
    model[1].register_parameter("unused", nn.Parameter(torch.zeros(2)))
    report = ulr.check(model, X, Y, cross_entropy)
    assert not report.ok
    assert "1.unused (read by no function of the forward" in report.verdict


class Last(nn.Module):
    """The last state of a recurrent layer of packed sequences: a function with several outputs."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x):
        lengths = torch.full((len(x),), x.shape[1])
        _, (h, _) = self.cell(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))
        return self.head(h[-1])


def test_functions_with_several_outputs_take_noise_on_their_weights():
    model, x = filled(Last()), v(1, 6, 3, 4)
    report = ulr.check(model, x, Y, cross_entropy)
    assert not report.ok and report.layers == ()
    assert "cell.weight_ih_l0 (used by lstm)" in report.verdict
    report = ulr.check(model, x, Y, cross_entropy, sigma=0.02, copies=64, steps=32, noise={"cell": "weights"})
    assert report.ok, report
    for layer in report.layers:
        assert layer.cosine == pytest.approx(layer.predicted_cosine, abs=0.05)


def test_loss_without_a_gradient():
    report = ulr.check(mlp(), X, Y, lambda outputs, targets: outputs.argmax(1) != targets)
    assert report.ok and "Autograd has no gradient to compare with" in report.verdict
    assert all(math.isnan(layer.slope) and not math.isnan(layer.agreement) for layer in report.layers)


def test_layer_without_a_gradient():
    model = filled(nn.Sequential(nn.Linear(12, 6), Step(), nn.Linear(6, 5)))
    report = ulr.check(model, X, Y, cross_entropy, sigma=0.02, copies=64)
    assert report.ok and "Autograd has no gradient for '0'" in report.verdict
    assert math.isnan(numbers(report, "cosine")["0"]) and numbers(report, "cosine")["2"] > 0.5


def test_too_few_copies():
    report = ulr.check(mlp(), X, Y, cross_entropy, injection="joint", copies=2, antithetic=True, steps=4)
    assert report.ok and report.verdict == "For '0', '2', '4' more copies or steps are needed to tell."


def test_estimator_that_is_scaled(monkeypatch):
    """A planted fault: the gradient op gets losses 30 per cent too large."""
    add_gradient = LinearCall.add_gradient
    monkeypatch.setattr(LinearCall, "add_gradient", lambda call, weight, *rest: add_gradient(call, 1.3 * weight, *rest))
    report = ulr.check(mlp(), X, Y, cross_entropy, sigma=0.01, copies=64, steps=32)
    assert not report.ok
    assert report.verdict.startswith(
        "The estimate is biased or too noisy for '0', '2', '4', and 0.1 times sigma does not help"
    )


def test_estimator_that_adds_the_same_each_time(monkeypatch):
    """A planted fault that leaves the slope alone: what estimates have in common is more than the gradient."""
    model, add_gradient = mlp(), LinearCall.add_gradient
    gradients = torch.autograd.grad(cross_entropy(model(X), Y).mean(), list(model.parameters()))
    same = {p: 0.8 * g.norm() / g.numel() ** 0.5 for p, g in zip(model.parameters(), gradients, strict=True)}

    def planted(call, *args):
        add_gradient(call, *args)
        for parameter in call.parameters:
            parameter.grad.view(-1)[::2] += same[parameter]
            parameter.grad.view(-1)[1::2] -= same[parameter]

    monkeypatch.setattr(LinearCall, "add_gradient", planted)
    report = ulr.check(model, X, Y, cross_entropy, sigma=0.01, copies=64, steps=32)
    assert not report.ok
    assert "The estimate is biased or too noisy for" in report.verdict
    for layer in report.layers:
        assert abs(layer.slope - 1) < 0.35 and layer.predicted_cosine - layer.cosine < 0.3 * layer.predicted_cosine
        assert layer.agreement > layer.cosine**2 + 0.2


def test_streams_that_are_the_same(monkeypatch):
    """A planted fault: every site has the same number."""
    monkeypatch.setattr("ulr_kernels.noise_contract.site_id", lambda name: 1)
    report = ulr.check(mlp(), X, Y, cross_entropy, steps=2)
    assert not report.ok and "The noise of two layers is correlated" in report.verdict
    assert report.correlations["layers"] > 60 and report.correlations["steps"] < 6


def test_arguments():
    with pytest.raises(ValueError, match="'steps' must be at least 2, got 1"):
        ulr.check(mlp(), X, Y, cross_entropy, steps=1)
    with pytest.raises(ValueError, match="'sigma' must be"):
        ulr.check(mlp(), X, Y, cross_entropy, sigma=-1)
    with pytest.raises(ValueError, match="'noise' must be the same for all layers, or injection 'layerwise'"):
        ulr.check(mlp(), X, Y, cross_entropy, noise={"0": "weights"}, injection="joint")
