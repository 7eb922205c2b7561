"""Updates: what a step changes, from its record alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from samples import values
from torch import Tensor

import ulr_kernels as ulr
from ulr_kernels import noise_contract
from ulr_kernels.optim import Group, Rule, Update

NAMES = (("a.weight", "a.bias"), ("b.weight",))
GROUPS = (Group(lr=0.1, sigma=0.01, weight_decay=0.5), Group(lr=0.3, sigma=0.02))
RULES = {"sgd": {}, "momentum": {"momentum": 0.9}, "adam": {"betas": (0.8, 0.9)}}


def weights() -> dict[str, Tensor]:
    shapes = {"a.weight": (7, 5), "a.bias": (7,), "b.weight": (3, 2, 4)}
    return {n: values(i, *s, device="cpu", dtype=torch.float32) for i, (n, s) in enumerate(shapes.items())}


def updates(count: int) -> list[Update]:
    coefficients = values(9, count, 2, device="cpu", dtype=torch.float32) * 0.01
    return [Update(step, ulr.fold_in(4, step), c, GROUPS) for step, c in enumerate(coefficients)]


@pytest.mark.parametrize("dist", ["normal", "rademacher"])
@pytest.mark.parametrize("rule", RULES)
def test_update_is_its_formula(rule, dist):
    """torch's SGD and AdamW on the gradient sum of coefficient / sigma * eps, in fp64."""
    found, state = weights(), {}
    expected = {name: w.double() for name, w in found.items()}
    optimizers = []
    for names, group in zip(NAMES, GROUPS, strict=True):
        settings = {"lr": group.lr, "weight_decay": 0.0}
        make = torch.optim.SGD if "betas" not in RULES[rule] else torch.optim.AdamW
        optimizers.append(make([expected[n] for n in names], **settings, **RULES[rule]))
    for update in updates(4):
        Rule(NAMES, dist=dist, **RULES[rule]).apply(update, found, state)
        for names, group, optimizer in zip(NAMES, GROUPS, optimizers, strict=True):
            for name in names:
                key = ulr.fold_in(update.key, noise_contract.site_id(name))
                eps = [ulr.noise_like(found[name], key, draw=p, dist=dist).double() for p in range(2)]
                expected[name].grad = sum(c / group.sigma * e for c, e in zip(update.coefficients, eps, strict=True))
                expected[name] -= group.lr * group.weight_decay * expected[name]
            optimizer.step()
    for name in found:
        torch.testing.assert_close(found[name], expected[name].float(), rtol=2e-5, atol=2e-6)


def test_updates_that_do_not_fit_write_nothing():
    before, found = weights(), weights()
    update = updates(1)[0]
    with pytest.raises(ValueError, match="'update' must have a group for each of 1, got 2"):
        Rule(NAMES[:1]).apply(update, found, {})
    with pytest.raises(ValueError, match="'parameters' must hold 'c.weight', got 3 others"):
        Rule((*NAMES[:1], ("c.weight",))).apply(update, found, {})
    for group in (Group(lr=1e39, sigma=1.0), Group(lr=1e30, sigma=1e-20), Group(lr=0.1, sigma=1.0, weight_decay=1e39)):
        with pytest.raises(ValueError, match="must be finite in fp32, got Group"):
            Rule(NAMES).apply(dataclasses.replace(update, groups=(GROUPS[0], group)), found, {})
    for coefficients in (torch.tensor([1.0, torch.inf]), torch.tensor([1.0, 3e37])):
        groups = (Group(lr=0.1, sigma=1.0), Group(lr=100.0, sigma=1.0))
        with pytest.raises(ValueError, match="coefficients / sigma must be finite in fp32"):
            Rule(NAMES).apply(dataclasses.replace(update, groups=groups, coefficients=coefficients), found, {})
    assert all(torch.equal(found[name], before[name]) for name in found)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"dist": "cauchy"}, "'dist' must be one of normal, laplace, rademacher, got 'cauchy'"),
        ({"rank": 0}, "'rank' must be an integer above 0, or None, got 0"),
        ({"momentum": 1.0}, r"'momentum' must be in \[0, 1\), got 1.0"),
        ({"betas": (0.9, 1.0)}, r"'betas' must be two numbers in \[0, 1\), or None, got \(0.9, 1.0\)"),
        ({"betas": (0.9, 0.9), "momentum": 0.5}, "'momentum' must be 0 where betas are given, got 0.5"),
        ({"adam_eps": -1.0}, "'adam_eps' must be finite and at least 0, got -1.0"),
    ],
)
def test_rules_are_checked(settings, text):
    with pytest.raises(ValueError, match=text):
        Rule(NAMES, **settings)
