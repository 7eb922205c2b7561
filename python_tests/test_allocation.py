"""Copies in proportion to what a sample's loss does: unbiased, within the budget, and closer for the same copies."""

import pytest
import small_models
import torch
from small_models import assert_same, cross_entropy, filled, gradients, v
from torch import nn
from z_test import STEPS, z_test

import ulr_kernels as ulr
from ulr_kernels.estimators.allocation import groups, spread

modules_may_draw = small_models.modules_may_draw  # used by every test of this file

SAMPLES = 12
FAR = torch.tensor([12.0, 12, 12, 12, 12, 12, 12, 12, 1, 0, 12, 12])  # of the targets: these samples are sure


def model():
    return filled(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)))


def uneven():
    """A batch in which three samples have nearly all the gradient of the loss."""
    x, y = v(1, SAMPLES, 5), torch.arange(SAMPLES) % 3
    return x, {"label": y, "far": FAR}


def loss_fn(outputs, targets):
    """Cross-entropy of logits that are moved towards the label."""
    label = nn.functional.one_hot(targets["label"], 3)
    return cross_entropy(outputs + targets["far"].unsqueeze(1) * label, targets["label"])


@pytest.mark.parametrize("copies, least, copies_per_draw", [(32, 2, 2), (6, 4, 2), (33, 1, 1), (2, 2, 2), (64, 4, 2)])
def test_copies_are_in_proportion_and_within_the_budget(copies, least, copies_per_draw):
    spreads = v(3, 200).abs() ** 3
    found = groups(spreads, copies, least, copies_per_draw)
    assert torch.cat([group.samples for group in found]).sort().values.equal(torch.arange(200))
    of_sample = torch.empty(200)
    for group in found:
        assert group.copies >= least and group.copies % copies_per_draw == 0
        of_sample[group.samples] = group.copies
    assert of_sample.sum() <= 200 * copies
    if copies > least:
        assert of_sample.sum() > 0.8 * 200 * copies
        free = of_sample > least  # others would have fewer if they could
        ratio = of_sample[free] / spreads[free]
        assert ratio.max() / ratio.min() < 2.3
        variance = (spreads.square() / of_sample).sum() / (spreads.square() / copies).sum()
        assert variance < 0.5


@pytest.mark.parametrize("spreads", [torch.zeros(5), torch.full((5,), torch.nan), torch.ones(5)], ids=["0", "nan", "1"])
def test_samples_that_are_alike_have_the_same(spreads):
    (group,) = groups(spreads, 8, 2, 2)
    assert group.copies == 8 and group.samples.tolist() == [0, 1, 2, 3, 4]


def test_what_is_left_goes_to_some_of_those_that_are_alike():
    found = groups(torch.tensor([1.0] * 50 + [0.0] * 50), 32, 2, 2)
    assert [(group.copies, len(group.samples)) for group in found] == [(2, 50), (32, 4), (64, 46)]


def test_losses_that_are_not_finite_do_not_break_the_budget():
    spreads = torch.ones(100)
    spreads[:30], spreads[30] = torch.inf, torch.nan
    assert sum(group.copies * len(group.samples) for group in groups(spreads, 32, 2, 2)) <= 3200


def test_a_group_of_one_sample_has_rows_enough_for_any_model():
    """`squeeze` drops the samples' axis where there is one row alone."""

    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            filled(self)

        def forward(self, x):
            h = torch.tanh(self.first(x)).view(len(x), 6, 1, 1).squeeze()
            return self.third(torch.tanh(self.second(h)))

    x, y = uneven()
    estimator = ulr.ULR(Squeezed(), copies=8, allocation="neyman")
    for _ in range(3):
        estimator.backward(x, y, loss_fn)


def test_learnt_sigma_has_a_baseline():
    """A factor that is even in the noise keeps all of a loss that no baseline takes away."""
    net, (x, y) = model(), uneven()

    def far_off(outputs, targets):
        return loss_fn(outputs, targets) + 100

    def largest(allocation):
        estimator = ulr.ULR(net, copies=8, learn_sigma=True, allocation=allocation)
        for _ in range(4):
            estimator.backward(x, y, far_off)
        return max(p.grad.abs().max() for p in estimator.parameters())

    assert largest("neyman") < 3 * largest("even")


def test_a_spread_is_that_of_the_noise():
    """Of a linear loss, g . eps, it is |g|."""
    eps = ulr.noise((4096, 3, 2), 5)
    slopes = torch.tensor([[3.0, 4.0], [0.5, 0.0], [0.0, 0.0]])
    change = (eps * slopes).sum(-1)
    for losses, antithetic in ((7 + torch.cat([change, -change]), True), (7 + change, False)):
        torch.testing.assert_close(spread(losses, antithetic), slopes.norm(dim=1).double(), rtol=0.05, atol=1e-4)
    parts = change.unsqueeze(-1) * torch.tensor([0.25, 0.75])  # two losses of each sample
    torch.testing.assert_close(spread(parts, False), slopes.norm(dim=1).double(), rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"antithetic": False}, {"baseline": "clean", "dist": "laplace"}], ids=str)
def test_the_estimate_is_unbiased_and_closer(settings):
    """Small noise: the gradient of the smoothed loss is that of the clean one."""
    net, (x, y) = model(), uneven()
    loss_fn(net(x), y).mean().backward()
    truth = torch.cat([p.grad.flatten() for p in net.parameters()])

    def steps(allocation, copies):
        estimator = ulr.ULR(net, sigma=0.01, copies=copies, allocation=allocation, **settings)
        rows = []
        for _ in range(STEPS):
            net.zero_grad()
            estimator.backward(x, y, loss_fn)
            rows.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        return torch.stack(rows)

    z_test(steps("neyman", 4096), truth)
    first = slice(0, 36)  # the last layer has the same copies either way
    even, uneven_ = ((steps(kind, 32) - truth)[:, first].square().sum() for kind in ("even", "neyman"))
    assert uneven_ < 0.5 * even


def test_where_samples_are_alike_nothing_changes(monkeypatch):
    monkeypatch.setattr("ulr_kernels.estimators.ulr.spread", lambda losses, antithetic: torch.ones(SAMPLES))
    settings = {"batch": uneven(), "loss_fn": loss_fn}
    loss, even = gradients(model(), **settings)
    loss_of_groups, found = gradients(model(), allocation="neyman", **settings)
    assert_same(even, found, 1e-6)
    assert loss == pytest.approx(float(loss_of_groups), rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"memory": "recompute"},
        {"max_rows": 10},
        {"memory": "recompute", "baseline": "clean", "max_rows": 10},
        {"noise": {"2": "weights"}},
    ],
    ids=str,
)
def test_memory_changes_nothing(settings):
    plain = {name: value for name, value in settings.items() if name not in ("memory", "max_rows")}
    common = {"batch": uneven(), "loss_fn": loss_fn, "copies": 16, "allocation": "neyman"}
    loss, expected = gradients(model(), **common, **plain)
    again, found = gradients(model(), **common, **settings)
    torch.testing.assert_close(loss, again)
    assert_same(expected, found, 1e-4)


def test_samples_keep_their_affected_losses():
    net, x = filled(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))), v(1, SAMPLES, 4, 5)
    scale = v(2, SAMPLES, 4) ** 2
    scale[1::2, 1:] = 0  # every other sample has one loss that is not 0, so that its matrix needs no more
    affects = torch.eye(4).repeat(SAMPLES, 1, 1)
    affects[1::2, 1:] = 0

    def of_rows(outputs, scale):
        return outputs.squeeze(-1) * scale

    def step(affects):
        net.zero_grad()
        ulr.ULR(net, copies=8, allocation="neyman").backward(x, scale, of_rows, affects)
        return [p.grad.clone() for p in net.parameters()]

    for one, other in zip(step(affects), step(torch.eye(4)), strict=True):
        torch.testing.assert_close(one, other)


def test_a_joint_pass_has_none_to_learn_from():
    with pytest.raises(ValueError, match="ulr.ULR: 'allocation' must be 'even' where injection is 'joint'"):
        ulr.ULR(model(), injection="joint", allocation="neyman")
    with pytest.raises(ValueError, match="ulr.ULR: 'allocation' must be 'even' where baseline is 'none'"):
        ulr.ULR(model(), baseline="none", allocation="neyman")
    with pytest.raises(ValueError, match="ulr.ULR: 'allocation' must be 'even' or 'neyman', got 'optimal'"):
        ulr.ULR(model(), allocation="optimal")
