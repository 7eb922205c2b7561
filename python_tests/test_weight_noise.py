"""ulr.ULR with noise on weights: the formula, unbiasedness, beside noise on outputs, and what only it can train."""

import pytest
import small_models
import torch
import torch.nn.functional as F
from small_models import assert_same, batch, cross_entropy, filled, gradients, half_squares, mlp, v
from test_estimator_memory import conv_net, transformer_block
from torch import nn
from z_test import assert_unbiased, estimates, flat

import ulr_kernels as ulr
from ulr_kernels.estimators import plan as plans
from ulr_kernels.noise_contract import score, site_id

modules_may_draw = small_models.modules_may_draw  # used by every test of this file


@pytest.mark.parametrize("antithetic, dist", [(True, "normal"), (False, "laplace"), (True, "rademacher")])
@pytest.mark.parametrize("injection", ["layerwise", "joint"])
def test_gradient_is_the_formula(injection, antithetic, dist):
    """Each copy's weights written out: noise by the parameter's name, and one score for all samples of a copy."""
    model, (x, y), copies, sigma, seed = mlp(), batch(), 4, 0.3, 7
    settings = {"copies": copies, "antithetic": antithetic, "injection": injection, "dist": dist}
    estimator = ulr.ULR(model, sigma=sigma, noise="weights", seed=seed, **settings)
    estimator.step = 5
    loss = estimator.backward(x, y, cross_entropy)

    weights = {name: p.detach() for name, p in model.named_parameters()}
    draws, step_key = copies // 2 if antithetic else copies, ulr.fold_in(seed, 5)
    eps = {
        name: torch.stack(
            [
                ulr.noise_like(p, ulr.fold_in(step_key, site_id(name)), draw=c % draws, dist=dist)
                * (1 if c < draws else -1)
                for c in range(copies)
            ]
        )
        for name, p in weights.items()
    }
    means = []
    for prefix in ("0", "2") if injection == "layerwise" else ("",):
        noised = [name for name in weights if name.startswith(prefix)]
        losses = []
        for c in range(copies):
            own = {name: w + sigma * eps[name][c] * (name in noised) for name, w in weights.items()}
            losses.append(cross_entropy(torch.func.functional_call(model, own, (x,)), y).detach())
        row = torch.stack(losses)
        means.append(row.mean())
        groups = (row[:2] + row[2:]) / 2 if antithetic else row
        others = torch.stack([groups[[k for k in range(len(groups)) if k != c]].mean(0) for c in range(len(groups))])
        weight = ((row - (others.repeat(2, 1) if antithetic else others)) / (copies * 3)).sum(1)
        for name in noised:
            sign = torch.ones(copies).index_fill(0, torch.arange(draws, copies), -1.0)
            scores = torch.stack([score(s * e, dist) * s for s, e in zip(sign, eps[name], strict=True)])
            expected = torch.einsum("c,c...->...", weight, scores) / sigma
            torch.testing.assert_close(model.get_parameter(name).grad, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss, torch.stack(means).mean())


# --- unbiasedness ----------------------------------------------------------------------------------------------------

SIGMA = {"0": 0.4, "1": 0.3}
WEIGHTS, MIXED = {"0": "weights", "1": "weights"}, {"0": "weights"}


def quadratic(noise):
    """Two linear layers, a sample, and the exact gradient of the mean loss E|W2 (W1 x + b1) + b2 - t|^2 / 2.

    Noise of variance s1^2 on each number that makes h = W1 x + b1 has variance s1^2 (|x|^2 + 1) there, or s1^2 if it is
    on h itself; likewise after it.
    """
    model = filled(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), 0.7)
    x, target = v(1, 2), v(2, 2)

    def exact(injection):
        hidden = model[0](x)
        clean = (model[1](hidden) - target).square().sum() / 2
        if injection == "joint":
            clean = clean + SIGMA["0"] ** 2 * (x.square().sum() + 1) * model[1].weight.square().sum() / 2
            if noise.get("1") == "weights":
                clean = clean + SIGMA["1"] ** 2 * hidden.square().sum()  # times 2 outputs, / 2
        return flat(torch.autograd.grad(clean, model.parameters()))

    return model, x, target, exact


@pytest.mark.parametrize(
    "noise, dist, antithetic, baseline",
    [
        (WEIGHTS, "normal", True, "mean"),
        (WEIGHTS, "laplace", True, "mean"),
        (WEIGHTS, "normal", False, "clean"),
        (MIXED, "normal", True, "mean"),
    ],
    ids=["pairs", "laplace", "single", "mixed"],
)
@pytest.mark.parametrize("injection", ["layerwise", "joint"])
def test_unbiased(injection, noise, dist, antithetic, baseline):
    """All samples of a copy share its noise, so the copies are many here, not the samples."""
    model, x, target, exact = quadratic(noise)
    settings = {"dist": dist, "antithetic": antithetic, "baseline": baseline, "injection": injection, "noise": noise}
    samples = estimates(model, x, target, half_squares, sigma=SIGMA, copies=2**15, noised_rows=2**15, **settings)
    assert_unbiased(samples, exact(injection))


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [conv_net, transformer_block])
@pytest.mark.parametrize("noise", ["weights", "mixed"])
def test_copies_share_a_forward(make, noise, monkeypatch):
    """And give what forwards of one copy each give, where these are possible: where all noise is on weights."""
    model, data = make()
    model = filled(model).eval()
    names = [name for name in dict.fromkeys(ulr.ULR(model).view.layers.values()) if "in_proj" not in name]
    mapping = dict.fromkeys(names[::2], "weights") if noise == "mixed" else "weights"
    settings = {"batch": data, "copies": 6, "noise": mapping, "dist": "laplace"}
    _, layerwise = gradients(model, **settings)
    _, split = gradients(model, max_rows=7, **settings)
    assert_same(layerwise, split, 1e-4)
    _, joint = gradients(model, injection="joint", **settings)
    _, split = gradients(model, injection="joint", max_rows=7, memory="recompute", **settings)
    assert_same(joint, split, 1e-4)
    if noise == "weights":
        monkeypatch.setattr(plans, "_matches", lambda *_: False)
        _, apart = gradients(model, injection="joint", **settings)
        assert_same(joint, apart, 1e-4)


class Recurrent(nn.Module):
    """A recurrent layer, which noise on outputs does not reach where its sequences are packed, and a parameter in a
    function without samples.
    """

    def __init__(self, packed=False):
        super().__init__()
        self.fc, self.cell, self.packed = nn.Linear(5, 4), nn.LSTM(4, 3, batch_first=True), packed
        self.threshold, self.start = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        steps = self.fc(x)[:, None]
        if self.packed:
            steps = nn.utils.rnn.pack_padded_sequence(steps, torch.ones(len(x)), batch_first=True)
        _, (h, _) = self.cell(steps)
        return torch.sigmoid((h[-1] + self.start.abs() - self.threshold) * 2)


UNREACHED = ("cell.weight_ih_l0", "cell.weight_hh_l0", "cell.bias_ih_l0", "cell.bias_hh_l0")


@pytest.mark.parametrize(
    "noise, injection, steps",
    [
        ("weights", "layerwise", 4),
        (dict.fromkeys(UNREACHED, "weights"), "layerwise", 4),
        (dict.fromkeys(UNREACHED, "weights"), "joint", 20),
    ],
    ids=["all", "cell", "cell-joint"],
)
def test_a_recurrent_layer(noise, injection, steps):
    """Its hidden state has layers first; copies are evaluated together all the same. Small noise: autograd."""
    model, (x, y) = filled(Recurrent()), (v(5, 4, 5), v(6, 4, 3))
    exact = flat(torch.autograd.grad(half_squares(model(x), y).mean(), model.parameters()))
    estimator = ulr.ULR(model, sigma=0.01, copies=96, noise=noise, injection=injection)
    for _ in range(steps):
        estimator.backward(x, y, half_squares)
    found = flat([p.grad for p in model.parameters()]) / steps
    (plan,) = estimator._plans.values()
    assert not any(item.one_copy_per_forward for item in plan.passes)
    assert F.cosine_similarity(found, exact, 0) > 0.9
    assert found @ exact / exact.square().sum() == pytest.approx(1, abs=0.1)


def test_frozen_parameters_have_no_noise():
    model = mlp()
    model[0].weight.requires_grad_(False)
    _, found = gradients(model, noise="weights")
    assert model[0].weight.grad is None and set(found) == {"0.bias", "2.weight", "2.bias"}


def test_settings_survive_a_checkpoint():
    estimator = ulr.ULR(mlp(), copies=4, noise={"2": "weights"})
    other = ulr.ULR(mlp())
    other.load_state_dict(estimator.state_dict())
    for each in (estimator, other):
        each.backward(*batch(), cross_entropy)
    for a, b in zip(estimator.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_what_noise_on_weights_cannot_do_is_named():
    with pytest.raises(ValueError) as error:
        gradients(Recurrent(packed=True))
    for text in ("cell.weight_ih_l0 (used by lstm)", "noise on the weights (noise={name: 'weights'}, ulr.optim)"):
        assert text in str(error.value)
    bare = filled(nn.Sequential(nn.Linear(5, 3)))
    bare.unused = nn.Linear(2, 2)
    bare.forward = lambda x: nn.Sequential.__getitem__(bare, 0)(x)
    with pytest.raises(ValueError, match="'model' must use each trained parameter in its forward.*unused.weight"):
        gradients(bare, noise="weights")

    class Deciding(Recurrent):
        def forward(self, x):
            return super().forward(x) + self.start.square().sum().item()  # a number, which all copies share

    with pytest.raises(ValueError, match="'noise' must be the same for all layers, or injection 'layerwise'"):
        gradients(filled(Deciding()), noise=dict.fromkeys((*UNREACHED, "start"), "weights"), injection="joint")
    model, data = transformer_block()
    of_one_function = {"noise": {"1.self_attn.in_proj_bias": "weights"}, "injection": "joint"}
    with pytest.raises(ValueError, match="the same for all parameters of a function, also for .*in_proj_weight"):
        gradients(filled(model).eval(), batch=data, **of_one_function)
