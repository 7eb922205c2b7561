"""Guides (ulr.ULR(guide=...)): never biased, never harmful, worth what |delta - g|^2 says; state, chunks, memory.

Supports (support="active"): where they are, and what they gain.
"""

from __future__ import annotations

import copy
import math

import pytest
import small_models
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from z_test import assert_unbiased, estimates

import ulr_kernels as ulr
from ulr_kernels import ops
from ulr_kernels.estimators.clean_pass import CleanForward
from ulr_kernels.estimators.guides import MOST_PARTS, Parts
from ulr_kernels.nn.gates import MARGIN, Gate
from ulr_kernels.nn.module_state import ModuleState

modules_may_draw = small_models.modules_may_draw  # used by every test of this file
ORTHOGONAL = {"dist": "rademacher", "sampler": "hadamard"}
SIGNS = {**ORTHOGONAL, "antithetic": False, "baseline": "clean"}
KINDS = [{"antithetic": False}, {"dist": "laplace"}, SIGNS, {"injection": "joint", **SIGNS}]


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(-1)


def linear() -> tuple[nn.Module, Tensor, Tensor]:
    """With a squared loss: the gradient of the smoothed loss is that of the loss, for any noise."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), torch.randn(4), torch.randn(3)


def set_guides(estimator: ulr.ULR, x: Tensor, y: Tensor, weight) -> None:
    """Give each layer's guide a weight, with the coefficient 1: one step makes the guides, and is taken back."""
    model, step = estimator.model, estimator.step
    estimator.backward(x, y, squared)
    model.zero_grad()
    estimator.step = step
    for (layer, *_), learnt in estimator._guides._learnt.items():
        learnt.weight = weight(layer, learnt.weight)
        learnt.fit = torch.tensor([1.0, 1.0])


class Guided(ulr.ULR):
    """With guides that stay as they were set."""

    def __init__(self, *args, weight, samples: tuple[Tensor, Tensor], **settings) -> None:
        super().__init__(*args, guide="feedback", **settings)
        set_guides(self, *samples, weight)
        self._guides.finish = lambda ranks: None


@pytest.mark.parametrize("kind", ["random", "ten times too large"])
@pytest.mark.parametrize("how", KINDS, ids=str)
def test_a_wrong_guide_leaves_the_mean(how: dict, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = linear()
    sigma, generator = 0.3, torch.Generator().manual_seed(0)
    squared(model(x), y).backward()
    if "injection" in how:  # the second layer's inputs have the first one's noise
        model[1].weight.grad += 2 * sigma**2 * model[1].weight.detach()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    right = {"0": model[1].weight.detach().T, "1": torch.eye(3)}

    def weight(layer: str, present: Tensor) -> Tensor:
        return torch.randn(present.shape, generator=generator) if kind == "random" else 10 * right[layer]

    def make(model, **settings):
        return Guided(model, weight=weight, samples=(x[None], y[None]), **settings)

    monkeypatch.setattr(ulr, "ULR", make)
    found = estimates(
        model, x, y, squared, copies=8, sigma=sigma, noised_rows=2**17 if kind == "random" else 2**18, **how
    )
    assert_unbiased(found, expected)


def digits(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A network of two hidden layers, and classes that depend on the inputs."""
    torch.manual_seed(seed)
    x = torch.randn(64, 20)
    y = (x @ torch.randn(20, 5)).argmax(-1)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 5)), x, y


cross_entropy = nn.CrossEntropyLoss(reduction="none")


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(cross_entropy(model(x), y).mean(), model.parameters())])


def squared_errors(model: nn.Module, x: Tensor, y: Tensor, estimator: ulr.ULR, steps: int) -> Tensor:
    """|estimate - gradient|^2 of each parameter, the mean over steps."""
    expected, totals = torch.autograd.grad(cross_entropy(model(x), y).mean(), model.parameters()), []
    for _ in range(steps):
        model.zero_grad()
        estimator.backward(x, y, cross_entropy)
        pairs = zip(model.parameters(), expected, strict=True)
        totals.append(torch.stack([(p.grad - g).square().sum() for p, g in pairs]))
    return torch.stack(totals).mean(0)


@pytest.mark.parametrize("how", [{"antithetic": False}, SIGNS], ids=str)
def test_a_learnt_guide_gains_what_it_explains(how: dict) -> None:
    """The error falls by |delta|^2 / |delta - g|^2, within 15 %, in the first layer, whose inputs are fixed."""
    model, x, y = digits()
    plain, guided = (ulr.ULR(model, 0.02, 16, guide=guide, **how) for guide in (None, "feedback"))
    for _ in range(60):
        guided.backward(x, y, cross_entropy)
    learnt = copy.deepcopy(guided._guides)
    guided._guides.finish = lambda ranks: None  # learns no more
    without, with_guide = (squared_errors(model, x, y, each, 60)[0] for each in (plain, guided))
    batch, runner = guided._batch(x, y, None), guided._runner
    with runner.forwards():
        clean = runner.clean_pass(guided.plan(x, y, cross_entropy).clean, batch, cross_entropy, learnt)
    learnt.begin(clean)
    v = model[0](x).detach().requires_grad_()
    cross_entropy(model[1:](v), y).sum().backward()
    guess, coefficient = learnt.guess(("0", 0), slice(0, 64), v.shape, -1)
    explained = v.grad.square().sum() / (v.grad - coefficient * guess).square().sum()
    assert explained > 1.5
    assert without / with_guide == pytest.approx(float(explained), rel=0.15)


def meaningless(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.randn(64, 6, generator=torch.Generator().manual_seed(3))


def large(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.full((64, 1), 1e4)


@pytest.mark.parametrize("features", [meaningless, large])
def test_a_useless_guide_does_no_harm(features) -> None:
    model, x, y = digits()
    plain, guided = (ulr.ULR(model, 0.02, 16, guide=guide, **SIGNS) for guide in (None, features))
    for _ in range(20):
        guided.backward(x, y, cross_entropy)
    without, with_guide = (squared_errors(model, x, y, each, 40).sum() for each in (plain, guided))
    assert with_guide < 1.05 * without


def after(steps: int, **settings) -> Tensor:
    """The gradient of one more step."""
    model, x, y = digits()
    estimator = ulr.ULR(model, 0.1, 8, guide="feedback", **settings)
    for _ in range(steps):
        estimator.backward(x, y, cross_entropy)
    model.zero_grad()
    estimator.backward(x, y, cross_entropy)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("how", [{"injection": "joint"}, {}], ids=str)
@pytest.mark.parametrize("split", [{"max_rows": 128}, {"max_rows": 40}, {"memory": "recompute"}], ids=str)
def test_chunks_and_recomputing_change_nothing(split: dict, how: dict) -> None:
    torch.testing.assert_close(after(3, **how, **split, **SIGNS), after(3, **how, **SIGNS), atol=2e-5, rtol=1e-3)


def test_a_state_goes_on() -> None:
    model, x, y = digits()
    whole = ulr.ULR(model, 0.1, 8, guide="feedback", **SIGNS)
    for _ in range(3):
        whole.backward(x, y, cross_entropy)
    resumed = ulr.ULR(model)
    resumed.load_state_dict(whole.state_dict())
    found = []
    for estimator in (whole, copy.deepcopy(whole), resumed):
        estimator.model.zero_grad()
        estimator.backward(x, y, cross_entropy)
        found.append(torch.cat([p.grad.flatten() for p in estimator.model.parameters()]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_loss_without_derivative_has_outputs_and_targets_as_features() -> None:
    model, x, y = digits()
    estimator = ulr.ULR(model, 0.3, 8, guide="feedback", **SIGNS)
    for _ in range(5):
        estimator.backward(x, y, lambda outputs, targets: (outputs.argmax(-1) != targets).float())
    assert {weight.shape[1] for _, weight in estimator._guides.weights()} == {5 + 5 + 1}
    assert all(weight.any() for _, weight in estimator._guides.weights())


def gates_of(model: nn.Module, x: Tensor, margin: float | None = None) -> dict[tuple[str, int], Gate]:
    sigma = 0.1 if margin is None else margin / MARGIN
    forward = CleanForward(ulr.ULR(model).view, x, lambda layer: sigma, margin is not None)
    outputs = forward.run(model, x, ModuleState(model))
    gates = forward.gates()
    del outputs
    return gates


class Block(nn.Module):
    """A residual block with batch normalisation and a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.after = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.conv(x)) + x)
        return torch.tanh(self.after(F.max_pool2d(h, 2).flatten(1)))


def test_gates_are_the_derivatives_of_what_reads_an_output() -> None:
    torch.manual_seed(0)
    model = Block().eval()
    model.norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(3, 2, 4, 4)
    gates = {site: gate.derivative for site, gate in gates_of(model, x).items()}
    v = model.conv(x).detach().requires_grad_()
    F.max_pool2d(F.relu(model.norm(v) + x), 2).sum().backward()
    torch.testing.assert_close(gates["conv", 0], v.grad)
    o = model.after(F.max_pool2d(F.relu(model.norm(model.conv(x)) + x), 2).flatten(1))
    torch.testing.assert_close(gates["after", 0], 1 - torch.tanh(o).square())


def test_the_gate_of_a_step_is_the_derivative_of_its_mean_over_the_noise() -> None:
    """So a guide of a spiking layer knows which neurons are near their threshold."""
    model = Net(lambda m, x: (0.5 * m.a(x) - 0.2 > 0.1).float(), a=line())
    h = model.a(X).detach()
    gate = gates_of(model, X, 0.6)["a", 0].derivative
    density = torch.exp(-(((0.5 * h - 0.3) / 0.3) ** 2) / 2) / (0.3 * (2 * torch.pi) ** 0.5)
    torch.testing.assert_close(gate, 0.5 * density)


# --- any model, any setting -------------------------------------------------------------------------------------------

X, Y, TEXTS = small_models.v(1, 6, 5), small_models.v(2, 6, 4), small_models.v(3, 6, 3, 5)
PAIRS = {"dist": "normal", "sampler": "iid", "antithetic": True, "baseline": "mean"}


class Net(nn.Module):
    """`function(model, x)` with some modules and parameters."""

    def __init__(self, function, **parts) -> None:
        super().__init__()
        self.function, self.steps = function, 0
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(torch.empty(part)) if isinstance(part, tuple) else part)
        small_models.filled(self)

    def forward(self, x):
        return self.function(self, x)


def line(inputs: int = 5, outputs: int = 6) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def plain(m, x):
    return m.c(F.relu(m.a(x)))


def with_autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return plain(m, x).float()


def changing(m, x):
    h = F.relu(m.a(x))
    return m.c(torch.tanh(m.b(h)) if m.steps > 2 else h + 0.1 * m.b(h))


def normalised(m, x):
    return m.c(m.drop(F.relu(m.norm(m.a(x)))))


def of_two(outputs, y):
    return squared(outputs["a"], y) + squared(outputs["more"][0].sin(), y)


def writing(outputs, y):
    outputs *= 2
    return squared(outputs, y)


def of_rows(outputs, y):
    return squared(outputs.unflatten(0, (len(y), -1)).mean(1), y)


def of_tokens(outputs, _):
    return outputs.square().mean((1, 2))


def in_fp32(outputs, y):
    return squared(outputs.float(), y)


def dense(function=plain, **parts):
    return lambda: Net(function, **{"a": line(), "c": line(6, 4), **parts})


def residual(m, x):
    return m.c(F.relu(m.a(x) + m.b(x.sin())))


def of_gru(m, x):
    return m.c(m.a(x)[0].mean(1))


CASES = {  # model, loss, inputs, settings
    "neyman": (dense(), squared, X, {"allocation": "neyman"}),
    "neyman in pairs": (dense(), squared, X, {"allocation": "neyman", **PAIRS}),
    "learnt sigma": (dense(), squared, X, {"learn_sigma": True, **PAIRS}),
    "learnt sigma, recomputed": (dense(), squared, X, {"learn_sigma": True, "memory": "recompute", **PAIRS}),
    "a residual sum": (dense(residual, b=line()), squared, X, {}),
    "a residual sum, jointly": (dense(residual, b=line()), squared, X, {"injection": "joint", **PAIRS}),
    "a layer called twice": (
        dense(lambda m, x: m.c(m.a(m.a(x).tanh()).tanh()), a=line(5, 5), c=line(5, 4)), squared, X, PAIRS,
    ),
    "lstm": (dense(lambda m, x: m.c(m.a(x)[0][:, -1]), a=nn.LSTM(5, 6, batch_first=True)), squared, TEXTS, PAIRS),
    "gru": (dense(of_gru, a=nn.GRU(5, 3, batch_first=True, bidirectional=True)), squared, TEXTS, PAIRS),
    "lengths": (dense(of_gru, a=nn.GRU(5, 6, batch_first=True)), squared, [TEXTS, TEXTS[:, :2]], PAIRS),
    "lengths of outputs": (dense(), of_tokens, [TEXTS, TEXTS[:, :2]], {}),
    "a dict": (dense(lambda m, x: {"a": m.a(x), "more": (m.c(x), 3)}, a=line(5, 4), c=line(5, 4)), of_two, X, {}),
    "rows of a sample": (dense(lambda m, x: plain(m, x.flatten(0, 1))), of_rows, TEXTS, {}),
    "a class token": (
        dense(lambda m, x: m.c(torch.cat([m.t.expand(len(x), -1, -1), m.a(x)], 1).tanh()).mean(1), t=(1, 1, 6)),
        squared, TEXTS, {},
    ),
    "bf16": (lambda: dense()().bfloat16(), in_fp32, X.bfloat16(), {"sigma": 0.2}),
    "autocast": (dense(with_autocast), squared, X, {"sigma": 0.2}),
    "dropout and batch norm": (
        dense(normalised, norm=nn.BatchNorm1d(6), drop=nn.Dropout(0.5)), squared, X, {"injection": "joint", **PAIRS},
    ),
    "a few rows": (dense(), squared, X, {"max_rows": 48}),
    "a few rows, jointly": (dense(), squared, X, {"max_rows": 48, "injection": "joint", **PAIRS}),
    "weights": (dense(), squared, X, {"noise": "weights", "copies": 2048, **PAIRS}),
    "weights and outputs": (dense(), squared, X, {"noise": {"a": "weights"}, "copies": 2048, **PAIRS}),
    "a loss that writes": (dense(), writing, X, {}),
    "a forward that changes": (dense(changing, b=line(6, 6)), squared, X, {}),
}  # fmt: skip


@pytest.mark.parametrize(
    "case,support",
    [
        (case, support)
        for case, (*_, settings) in CASES.items()
        for support in (("all",) if "learn_sigma" in settings else ("all", "active"))
    ],
)
def test_guides_and_supports_in_any_model(case: str, support: str) -> None:
    """The slope of the estimate, <estimate, gradient> / |gradient|^2, is 1 once guides have learnt something."""
    make, loss_fn, x, settings = CASES[case]
    settings = {**settings, "support": support}
    model, batches = make().train(), x if isinstance(x, list) else [x]
    estimator = ulr.ULR(model, **{"sigma": 0.01, "copies": 256, "guide": "feedback", **SIGNS, **settings})
    for step in range(4 * len(batches)):
        model.steps = step
        estimator.backward(batches[step % len(batches)], Y, loss_fn)
    model.zero_grad()
    for batch in batches * 4:
        estimator.backward(batch, Y, loss_fn)
    assert all(weight.dtype == torch.float32 for _, weight in estimator._guides.weights())
    assert bool(estimator._guides._learnt) is (settings.get("noise") != "weights")
    model.eval()
    means = [loss_fn(model(batch), Y).mean() for batch in batches]
    expected = torch.autograd.grad(torch.stack(means).sum(), list(model.parameters()))
    for (name, p), g in zip(model.named_parameters(), expected, strict=True):
        slope = float((p.grad.double() / 4 * g).sum() / g.double().square().sum())
        assert slope == pytest.approx(1, abs=0.15), name


def test_autocast_around_a_step_leaves_guides_exact() -> None:
    model, x, y = digits()
    estimator = ulr.ULR(model, 0.1, 8, preset="best")
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            estimator.backward(x, y, cross_entropy)
    assert all(weight.dtype == torch.float32 and weight.any() for _, weight in estimator._guides.weights())


def test_positions_share_weights_by_parts() -> None:
    """Ever new lengths do not take ever more memory."""
    model = Net(lambda m, x: m.a(x).mean(1), a=line())
    estimator = ulr.ULR(model, copies=4, preset="best")
    for length in range(1, 9):
        estimator.backward(small_models.v(length, 2, length, 5), None, lambda outputs, _: outputs.sum(1))
    assert [name[2] for name in estimator._guides._learnt] == [6 * n for n in range(1, MOST_PARTS + 1)]


@pytest.mark.parametrize("grid,feature_dim", [((6, 5, 7, 2), 1), ((6, 9, 3), -1), ((12, 4), -1), ((3, 5), -1)])
def test_parts(grid: tuple[int, ...], feature_dim: int) -> None:
    """Means of parts, spread again: each position has the mean of those whose index times 4 over the size is the same,
    rounded down."""
    x = small_models.v(1, *grid)
    parts = Parts(grid, feature_dim, 3, x.device)
    expected = x.unflatten(0, (3, -1))
    features = feature_dim % len(grid) + 1
    for axis in {*range(1, len(grid) + 1)} - {features}:
        index = torch.arange(expected.shape[axis])
        part = index * MOST_PARTS // expected.shape[axis] if expected.shape[axis] > MOST_PARTS else index
        means = [expected.index_select(axis, index[part == own]).mean(axis, keepdim=True) for own in part]
        expected = torch.cat(means, axis)
    assert parts.means(x).shape == (3, parts.units)
    torch.testing.assert_close(parts.spread(parts.means(x)), expected)


# --- supports ---------------------------------------------------------------------------------------------------------


def kept_in(m, h):
    m.kept = h
    return F.relu(h).square()


def two_readers(m, h):
    return F.relu(h).sum(1, keepdim=True) + h.sin()


def sized(m, h):
    return torch.relu(h).view(h.shape[0], h.size(1)).square()


def in_place(m, h):
    return h.relu_().square()


def written(m, h):
    h[:, 0] = 0.0
    return F.relu(h).square()


def pooled(m, h):
    return F.max_pool1d(F.relu(h).unsqueeze(1), 3).square()


def two_paths(m, h):
    return torch.cat([F.relu(h), F.relu(-h)[:, :3]], 1).square()


def returned(m, h):
    return F.relu(h), h


def sine(m, h):
    return h.sin()


def spikes(m, h):
    return (h > 0).float()


def clipped(m, h):
    return F.hardtanh(h).square()


def shifted(m, h):
    return F.relu(torch.tanh(h) + 0.1).square()


def many(m, h):
    for _ in range(6):
        h = F.relu(h)
    return h


SUPPORTS = {  # what reads the output h -> its support, of h
    kept_in: None,
    two_readers: None,
    sized: lambda h, margin: h > -margin,
    in_place: lambda h, margin: h > -margin,
    written: None,
    pooled: lambda h, margin: h > -margin,  # a view ends what is followed
    two_paths: None,
    returned: None,
    sine: None,
    spikes: None,
    clipped: lambda h, margin: (h > -1 - margin) & (h < 1 + margin),
    shifted: lambda h, margin: torch.tanh(h + margin) > -0.1,
    many: lambda h, margin: h > -margin,
}


@pytest.mark.parametrize("read", SUPPORTS, ids=lambda read: read.__name__)
@pytest.mark.parametrize("margin", [1e-5, 0.3])
def test_a_support_is_where_all_readers_let_something_through(read, margin: float) -> None:
    model = Net(lambda m, x: read(m, m.a(x)), a=line())
    h, expected = model.a(X).detach(), SUPPORTS[read]
    support = gates_of(model, X, margin)["a", 0].support
    if expected is None:
        assert support is None
    else:
        assert torch.equal(support, expected(h, margin)) and not support.all()
    assert not torch.equal(h > 0, h > -0.3)  # some elements are within the margin


def test_outside_of_the_support_the_estimate_is_0() -> None:
    """Of one sample a bias has the gradient of the output: with the same noise, all of it or its active part."""
    found = []
    for support in ("all", "active"):
        model = Net(plain, a=line(5, 12), c=line(12, 3))
        estimator = ulr.ULR(model, 0.1, 16, antithetic=False, support=support)
        estimator.backward(X[:1], None, lambda outputs, _: outputs.square().sum(1))
        found.append(model.a.bias.grad)
    active = model.a(X[0]) > -0.2
    torch.testing.assert_close(found[1], found[0] * active)
    assert 0 < active.sum() < 12


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.c = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.max_pool2d(F.relu(self.b(F.relu(self.a(x)))), 4).flatten(1))


def images() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Images(), torch.randn(10, 2, 8, 8), torch.arange(10) % 3


def test_a_check_predicts_no_cosine_of_a_part_of_the_outputs() -> None:
    model, x, y = images()
    report = ulr.check(model, x, y, cross_entropy, sigma=0.02, copies=32, support="active")
    assert report.ok and all(math.isnan(layer.predicted_cosine) for layer in report.layers)


def test_the_winners_of_a_pool_are_its_support() -> None:
    model, x, _ = images()
    h = model.b(F.relu(model.a(x))).detach()
    winners = F.max_unpool2d(*F.max_pool2d(h + 9, 4, return_indices=True), 4) > 0
    for margin in (1e-5, 0.3):
        assert torch.equal(gates_of(model, x, margin)["b", 0].support, winners & (h > -margin))


def test_derivatives_that_cancel_are_in_the_support() -> None:
    """Of an element that is broadcast, and of one that wins two windows of a pool."""
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    model = Net(lambda m, x: m.a(x) * signs, a=line(5, 1))
    assert gates_of(model, X, 0.2)["a", 0].support is None
    model = Net(lambda m, x: F.max_pool1d(m.a(x.unsqueeze(1)), 2, 1) * signs, a=nn.Conv1d(1, 2, 3, padding=1))
    winners = F.max_pool1d(model.a(X.unsqueeze(1)), 2, 1, return_indices=True)[1]
    expected = F.one_hot(winners, 5).sum(2)
    assert expected.max() == 2
    assert torch.equal(gates_of(model, X, 0.2)["a", 0].support, expected > 0)


def test_a_support_gains_what_it_leaves_out() -> None:
    """The error of a layer falls by the share of its outputs that are in the support: at most a sixteenth before the
    pool, about a half before the other ReLU."""
    model, x, y = images()
    found = [
        squared_errors(model, x, y, ulr.ULR(model, 0.01, 16, antithetic=False, baseline="clean", support=support), 60)
        for support in ("all", "active")
    ]
    shares = [float(gate.support.float().mean()) for gate in list(gates_of(model, x, 0.02).values())[:2]]
    gains = (found[1] / found[0])[:4:2].tolist()
    assert gains == pytest.approx(shares, rel=0.35) and shares[1] < 1 / 15.9


@pytest.mark.parametrize("guide", [None, "feedback"])
@pytest.mark.parametrize("split", [{"max_rows": 40}, {"memory": "recompute"}], ids=str)
def test_supports_in_chunks_and_recomputed(split: dict, guide: str | None) -> None:
    found = []
    for how in ({}, split):
        model, x, y = images()
        estimator = ulr.ULR(model, 0.1, 8, guide=guide, support="active", **how, **SIGNS)
        for _ in range(3):
            model.zero_grad()
            estimator.backward(x, y, cross_entropy)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-3)


def test_the_step_of_an_mlp_has_the_supports_of_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own op, and layer by layer."""
    found = []
    for by_op in (True, False):
        if not by_op:
            monkeypatch.setattr("ulr_kernels.estimators.ulr.run_mlp_step", lambda *_: None)
        model, x, y = digits()
        estimator = ulr.ULR(model, 0.1, 8, preset="best")
        for _ in range(3):
            model.zero_grad()
            estimator.backward(x, y, cross_entropy)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=pytest.mark.pair("cpp/cpu"))])
@pytest.mark.parametrize("how", [{}, ORTHOGONAL, {"dist": "laplace", "antithetic": True}], ids=str)
def test_noise_dot(backend: str, how: dict) -> None:
    x, sigma = torch.randn(3, 40, 4, 5, generator=torch.Generator().manual_seed(0)), torch.rand(40)
    with ulr.use_backend(backend):
        for positions in (1, 20, 60):
            at = {"positions": positions, "draw": 5, "row_offset": 20, **how}
            found = ops.noise_dot(x, sigma, 7, copies=6, feature_dim=1, **at)
            noise = ops.noise_add(torch.zeros_like(x), sigma, 7, copies=6, feature_dim=1, shared=True, **at)
            products = (noise.double() * x).movedim(2, -1).sum(-1).flatten(1).unflatten(1, (-1, positions)).sum(-1)
            torch.testing.assert_close(found.double(), products, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda m, x, y: ulr.ULR(m, guide="magic"), "ulr.ULR: 'guide' must be None, 'feedback' or a function"),
        (
            lambda m, x, y: ulr.ULR(m, guide=lambda o, t: o[:3]).backward(x, y, cross_entropy),
            r"'guide' must return \[64, features\] of outputs and targets, got \[3, 5\]",
        ),
        (
            lambda m, x, y: ulr.ULR(m, guide="feedback").backward(x, y, cross_entropy, torch.ones(1, 1)),
            "'affects' must be None where there is a guide",
        ),
        (lambda m, x, y: ulr.ULR(m, support="relu"), "ulr.ULR: 'support' must be 'all' or 'active', got 'relu'"),
        (
            lambda m, x, y: ulr.ULR(m, support="active", learn_sigma=True),
            "'support' must be 'all' where sigma is learnt",
        ),
        (
            lambda m, x, y: ulr.ULR(m, support="active").backward(x, y, cross_entropy, torch.ones(1, 1)),
            "'affects' must be None where support is 'active'",
        ),
        (
            lambda m, x, y: ops.noise_dot(x, 1.0, 3, positions=5),
            "'positions' must divide the 64 rows, got 5",
        ),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*digits())
