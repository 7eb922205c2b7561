"""Losses of a sample's parts: each row's noise is weighed by the losses that it affects, and by no others."""

import pytest
import small_models
import torch
import torch.nn.functional as F
from small_models import assert_same, cross_entropy, filled, unfilled, v
from torch import nn
from z_test import STEPS, z_test

import ulr_kernels as ulr

modules_may_draw = small_models.modules_may_draw  # used by every test of this file

SAMPLES, TOKENS = 3, 5


def of_tokens(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def tokens():
    return v(1, SAMPLES, TOKENS, 6), torch.arange(SAMPLES * TOKENS).view(SAMPLES, TOKENS) % 4


class Gain(nn.Module):
    """A product with a parameter, for torch's derivative of it."""

    def __init__(self, features):
        super().__init__()
        self.gain = nn.Parameter(torch.empty(features))

    def forward(self, x):
        return x * self.gain


def token_model():
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4), Gain(4)]
    return filled(nn.Sequential(*layers))


def found(model, x, y, loss_fn, affects=None, **settings):
    """Loss and gradients of a step."""
    model.zero_grad()
    estimator = ulr.ULR(model, **{"copies": 4, **settings})
    loss = estimator.backward(x, y, loss_fn, affects)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    learnt = {f"log_sigma {i}": p.grad.clone() for i, p in enumerate(estimator.parameters())}
    return {"loss": loss, **gradients, **learnt}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"injection": "joint"},
        {"memory": "recompute"},
        {"injection": "joint", "memory": "recompute"},
        {"max_rows": 8},
        {"injection": "joint", "max_rows": 4},
        {"learn_sigma": True},
        {"antithetic": False},
        {"antithetic": False, "copies": 3, "baseline": "none"},
        {"dist": "rademacher", "baseline": "clean"},
        {"noise": {"3": "weights"}},
    ],
    ids=str,
)
def test_tokens_that_affect_their_own_loss_alone_are_samples(settings):
    """A model of each token by itself: tokens as rows of a sample, or as samples, are the same noise."""
    model, (x, y) = token_model(), tokens()
    rows = found(model, x, y, of_tokens, torch.eye(TOKENS), **settings)
    samples = found(model, x.flatten(0, 1), y.flatten(), cross_entropy, **settings)
    assert_same(samples, rows, 1e-5)


def test_pixels_are_rows_of_a_convolution():
    model, x, y = (
        filled(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Tanh(), nn.Conv2d(4, 2, 1))),
        v(1, 2, 3, 2, 3),
        v(2, 2, 2, 2, 3),
    )

    def of_pixels(outputs, targets):
        return (outputs - targets).square().sum(1).flatten(1)

    def as_samples(image):
        return image.movedim(1, -1).flatten(0, 2).unsqueeze(-1).unsqueeze(-1)

    for settings in ({}, {"memory": "recompute"}):
        rows = found(model, x, y, of_pixels, torch.eye(6), **settings)
        samples = found(
            model, as_samples(x), as_samples(y), lambda o, t: (o - t).square().flatten(1).sum(1), **settings
        )
        assert_same(samples, rows, 1e-5)


@pytest.mark.parametrize("form", ["bool", "sparse", "integers", "weights", "by sample", "by layer", "of modules"])
def test_forms_of_affects(form):
    model, (x, y) = token_model(), tokens()
    one = torch.ones(TOKENS, TOKENS).triu()
    forms = {
        "bool": one.bool(),
        "sparse": (2 * one).to_sparse_coo(),
        "integers": -one.long(),
        "weights": one / 3,  # a normalised adjacency
        "by sample": one.expand(SAMPLES, -1, -1),
        "by layer": {name: one for name in ("0", "2", "3", "4.gain")},
        "of modules": {"": one, "3": one.bool()},
    }
    assert_same(found(model, x, y, of_tokens, one), found(model, x, y, of_tokens, forms[form]), 1e-6)


def test_samples_have_their_own_matrices_also_in_parts():
    """A pass in parts gives the same as a whole one."""
    model, (x, y) = token_model(), tokens()
    affects = torch.eye(TOKENS) + (v(7, SAMPLES, TOKENS, TOKENS) > 0).float()
    whole = found(model, x, y, of_tokens, affects.clamp(max=1))
    assert_same(whole, found(model, x, y, of_tokens, affects.clamp(max=1), max_rows=2), 1e-5)
    other = found(model, x, y, of_tokens, affects.flip(0).clamp(max=1))
    assert (whole["0.weight"] - other["0.weight"]).abs().max() > 1e-3


class Graph(nn.Module):
    """Two graph convolutions; noise after the neighbours' sum affects its own node and then its neighbours."""

    def __init__(self, adjacency):
        super().__init__()
        self.first, self.second = unfilled(nn.Linear, 3, 4), unfilled(nn.Linear, 4, 2)
        self.register_buffer("adjacency", adjacency)

    def forward(self, nodes):
        return self.second(self.adjacency @ torch.tanh(self.first(self.adjacency @ nodes)))


NODES = 12
RING = torch.eye(NODES) + torch.eye(NODES).roll(1, 0) + torch.eye(NODES).roll(-1, 0)
LABELLED = torch.tensor([0, 3, 4, 9])


def graph():
    model = filled(Graph(RING / 3))
    return model, v(1, 1, NODES, 3), v(2, 1, len(LABELLED), 2)


def of_nodes(outputs, targets):
    return (outputs[:, LABELLED] - targets).square().sum(-1)


HOPS = {"first": RING[:, LABELLED], "second": torch.eye(NODES)[:, LABELLED]}


@pytest.mark.parametrize("settings", [{}, {"antithetic": False}, {"injection": "joint"}], ids=str)
def test_the_estimate_is_unbiased_and_closer_than_without(settings):
    """Small noise: the gradient of the smoothed loss is that of the clean one, and the graph's is estimated."""
    model, x, y = graph()
    of_nodes(model(x), y).mean().backward()
    truth = torch.cat([p.grad.flatten() for p in model.parameters()])

    def steps(affects, copies):
        estimator = ulr.ULR(model, sigma=0.01, copies=copies, **settings)
        rows = []
        for _ in range(STEPS):
            model.zero_grad()
            estimator.backward(x, y, of_nodes, affects)
            rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        return torch.stack(rows)

    z_test(steps(HOPS, 16384), truth)
    near, far = (steps(affects, 64) for affects in (HOPS, torch.ones(NODES, len(LABELLED))))
    errors = [(estimate - truth).square().sum() for estimate in (near, far)]
    assert errors[0] < 0.5 * errors[1]


def test_a_missing_1_is_refused():
    model, x, y = graph()
    for affects in ({"second": HOPS["second"].roll(1, 0)}, {"first": torch.eye(NODES)[:, LABELLED]}):
        with pytest.raises(
            ValueError, match="ulr.ULR: 'affects' must not be 0 where a row's noise changes a loss, got 0"
        ):
            ulr.ULR(model).backward(x, y, of_nodes, affects)
    assert all(p.grad is None for p in model.parameters())
    causal = torch.ones(TOKENS, TOKENS).triu()
    recurrent = Steps()
    x, y = tokens()
    with pytest.raises(ValueError, match="must not be 0 where"):
        ulr.ULR(recurrent).backward(x, y, of_tokens, {"cell": causal.T, "head": torch.eye(TOKENS)})


class Steps(nn.Module):
    """A prediction after each time step."""

    def __init__(self, kind="LSTM"):
        super().__init__()
        self.cell, self.head = getattr(nn, kind)(6, 5, batch_first=True), nn.Linear(5, 4)
        filled(self)

    def forward(self, x):
        return self.head(self.cell(x)[0])


@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_time_step_affects_itself_and_later_ones(kind, memory):
    """The rows of a recurrent layer are its time steps, one call after the other."""
    model, (x, y) = Steps(kind), tokens()
    affects = {"cell": torch.ones(TOKENS, TOKENS).triu(), "head": torch.eye(TOKENS)}
    settings = {"steps": 24, "copies": 256, "sigma": 0.02, "memory": memory}
    near = ulr.check(model, x, y, of_tokens, affects=affects, **settings)
    assert near.ok, near
    far = ulr.check(model, x, y, of_tokens, affects=torch.ones(TOKENS, TOKENS), **settings)
    for one, other in zip(near.layers, far.layers, strict=True):
        assert one.cosine > other.cosine, (near, far)


@pytest.mark.parametrize(
    ("affects", "message"),
    [
        ([[1.0]], "'affects' must be or hold tensors of bool or real numbers, got list"),
        (torch.eye(TOKENS) * 1j, "'affects' must be or hold tensors of bool or real numbers, got torch.complex64"),
        (torch.eye(TOKENS, device="meta"), "'affects' must be on the model's device, cpu, got meta"),
        ({}, "'affects' must be a matrix or a mapping"),
        ({"9": torch.eye(TOKENS)}, "'affects' must name layers with noise on their outputs .0, 2, 3, 4.gain., got 9"),
        (
            torch.ones(TOKENS),
            r"'affects' must be \[rows, losses\], or dense \[3, rows, losses\] by sample, got \[5\], torch.strided",
        ),
        (torch.ones(2, TOKENS, TOKENS), r"'affects' must be .*, got \[2, 5, 5\]"),
        (torch.ones(4, TOKENS), r"'affects' must have 5 rows for layer '0', .*, got \[4, 5\]"),
        ({"0": torch.ones(TOKENS, 4), "": torch.eye(TOKENS)}, "'affects' must have a column for each loss of a sample"),
        (torch.ones(TOKENS, 4), r"'loss_fn' must return \[copies \* samples, columns of affects\], \[6, 4\] here"),
        (
            None,
            r"'loss_fn' must return one loss per row, \[6\] here \(of several, their mean; or give affects\), got",
        ),
    ],
    ids=str,
)
def test_a_bad_argument_is_refused_before_anything_is_written(affects, message):
    model, (x, y) = token_model(), tokens()
    with pytest.raises(ValueError, match="ulr.ULR: " + message):
        ulr.ULR(model).backward(x, y, of_tokens, affects)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("tokens", [2, 3, 5, 16, 17, 200])
def test_the_last_loss_is_tried(tokens):
    """The last row's loss sees the first row, which the affects denies; in a long sample, too."""

    class Leak(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = filled(nn.Linear(3, 2))

        def forward(self, x):
            h = self.fc(x)
            return torch.cat([h[:, :-1], h[:, -1:] + 0.2 * h[:, :1]], 1)

    x, affects = v(1, 2, tokens, 3), torch.eye(tokens)

    def squares(outputs, _):
        return outputs.square().sum(-1)

    with pytest.raises(ValueError, match=f"'affects' must not be 0 .* changes loss {tokens - 1} "):
        ulr.ULR(Leak(), copies=2).backward(x, None, squares, affects)
    affects[0, -1] = 1
    ulr.ULR(Leak(), copies=2).backward(x, None, squares, affects)


def test_low_precision():
    """Weights stay fp32 under autocast; a bf16 forward's rounding is not taken for a affects."""
    model, (x, y) = token_model(), tokens()
    affects = torch.ones(TOKENS, TOKENS).triu()
    for form in (affects, affects.to_sparse_csr(), affects.expand(SAMPLES, -1, -1)):
        with torch.autocast("cpu", torch.bfloat16):
            ulr.ULR(model, copies=4).backward(x, y, lambda o, t: of_tokens(o.float(), t), form)
    for kind in ("GRU", "LSTM", "RNN"):
        ulr.ULR(Steps(kind).bfloat16(), copies=4).backward(
            x.bfloat16(), y, lambda o, t: of_tokens(o.float(), t), torch.ones(TOKENS, TOKENS)
        )


def test_sobol_has_whole_samples():
    model, (x, y) = token_model(), tokens()
    with pytest.raises(ValueError, match="'affects' must be None where sampler is 'sobol'"):
        ulr.ULR(model, sampler="sobol", baseline="clean").backward(x, y, of_tokens, torch.eye(TOKENS))
