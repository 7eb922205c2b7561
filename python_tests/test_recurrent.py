"""ulr.ULR on nn.LSTM, GRU and RNN: the steps it sees are torch's, the formula with each step's key, and memory.

Unbiasedness is in test_any_module.py.
"""

import pytest
import small_models
import torch
from small_models import assert_same, cross_entropy, filled, gradients, half_squares, v
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

import ulr_kernels as ulr
from ulr_kernels.nn import COMPOSITES
from ulr_kernels.noise_contract import site_id

modules_may_draw = small_models.modules_may_draw  # used by every test of this file


class Shown(TorchFunctionMode):
    """Calls the forms that show the steps, and counts them."""

    shown = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.shown += func in COMPOSITES
        return COMPOSITES.get(func, func)(*args, **(kwargs or {}))


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "given"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"batch_first": True},
        {"bias": False},
        {"num_layers": 3, "dropout": 0.5, "batch_first": True},
        {"num_layers": 2, "bidirectional": True},
        {"num_layers": 2, "bidirectional": True, "bias": False, "proj_size": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "relu"])
def test_steps_are_those_of_torch(kind, more, given):
    if "proj_size" in more and kind != "LSTM":
        more = {name: value for name, value in more.items() if name != "proj_size"}
    layer = nn.RNN(5, 4, nonlinearity="relu", **more) if kind == "relu" else getattr(nn, kind)(5, 4, **more)
    layer = filled(layer).eval()
    x = v(1, 3, 7, 5) if layer.batch_first else v(1, 7, 3, 5)
    states = layer.num_layers * (2 if layer.bidirectional else 1)
    start = v(2, states, 3, layer.proj_size or 4)
    start = (start, v(3, states, 3, 4)) if kind == "LSTM" else start
    expected = layer(x, start if given else None)
    with Shown() as mode:
        found = layer(x, start if given else None)
    assert mode.shown == 1
    for a, b in zip(_pytree.tree_leaves(expected), _pytree.tree_leaves(found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_an_lstm_cell_is_that_of_torch(bias):
    cell, x = filled(nn.LSTMCell(5, 4, bias)), v(1, 3, 5)
    expected = cell(x, cell(x))
    with Shown() as mode:
        found = cell(x, cell(x))
    assert mode.shown == 2
    torch.testing.assert_close(found, expected)


# --- the formula -----------------------------------------------------------------------------------------------------

SIGMA = 0.3


class TwoCalls(nn.Module):
    """A layer that is called twice, in both directions; what the second call's steps make is the output."""

    def __init__(self, kind):
        super().__init__()
        self.layer = getattr(nn, kind)(4, 2, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.layer(self.layer(x)[0])[0].mean(1)


def step_noise(name, call, time, width):
    """[copies, samples, width]: the call's number is folded in from the second on, and then the time step."""
    key = ulr.fold_in(ulr.fold_in(0, 0), site_id(name))
    key = ulr.fold_in(ulr.fold_in(key, call) if call else key, time)
    return torch.stack([ulr.noise((3, width), key, draw=c) for c in range(2)])


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_gradient_is_the_formula(kind):
    """Each direction is a site of its own, whose steps count from 0 in the order in which it takes them."""
    model, x, targets = filled(TwoCalls(kind), 0.7), v(1, 3, 3, 4), v(2, 3, 4)
    settings = {"antithetic": False, "baseline": "none", "injection": "joint", "sigma": SIGMA}
    loss, found = gradients(model, copies=2, batch=(x, targets), loss_fn=half_squares, **settings)

    steps = []  # weights of the direction, what the step reads, its eps
    outputs = x.expand(2, 3, 3, 4)
    for call in range(2):
        directions = []
        for end in ("", "_reverse"):
            own = [getattr(model.layer, f"{name}_l0{end}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            h = c = torch.zeros(2, 3, 2)
            made = []
            for time in range(3):
                x_t = outputs[:, :, -1 - time if end else time]
                eps = step_noise(f"layer.weight_ih_l0{end}", call, time, 8 if kind == "LSTM" else 2)
                steps.append((end, own, x_t, h, eps))
                if kind == "LSTM":
                    gates = x_t @ own[0].T + h @ own[1].T + own[2] + own[3] + SIGMA * eps
                    i, f, g, o = gates.chunk(4, -1)  # torch's order
                    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    h = o.sigmoid() * c.tanh()
                else:
                    h = torch.gru_cell(x_t.flatten(0, 1), h.flatten(0, 1), *own).view(2, 3, 2) + SIGMA * eps
                h, c = h.detach(), c.detach()
                made.append(h)
            directions.append(torch.stack(made[::-1] if end else made, 2))
        outputs = torch.cat(directions, -1)
    losses = torch.stack([half_squares(out.mean(1), targets) for out in outputs])
    torch.testing.assert_close(loss, losses.mean())

    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for end, own, x_t, h, eps in steps:
        score = losses[..., None] / 6 * eps / SIGMA
        if kind == "LSTM":
            parts = [torch.einsum("cbn,cbk->nk", score, each) for each in (x_t, h)] + [score.sum((0, 1))] * 2
        else:
            state = torch.gru_cell(x_t.flatten(0, 1), h.flatten(0, 1), *own)
            parts = torch.autograd.grad(state, own, score.flatten(0, 1))
        for name, part in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), parts, strict=True):
            expected[f"layer.{name}_l0{end}"] += part
    assert_same(expected, found)


# --- a reader of sequences -------------------------------------------------------------------------------------------


class Reader(nn.Module):
    def __init__(self, kind, **more):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(3, 3)
        self.cells, self.packed = getattr(nn, kind)(4, 3, **more), False

    def forward(self, tokens):
        x = self.table(tokens)
        if self.packed:
            x = nn.utils.rnn.pack_padded_sequence(x, torch.full((len(x),), x.shape[1]), batch_first=True)
        else:
            x = x if self.cells.batch_first else x.transpose(0, 1)
        last = self.cells(x)[1]
        return self.head((last[0] if isinstance(last, tuple) else last)[-1])


BATCH = torch.arange(15).view(3, 5) * 7 % 9, torch.arange(3)


@pytest.mark.parametrize("injection", ["layerwise", "joint"])
@pytest.mark.parametrize("kind, more", [("LSTM", {"num_layers": 2}), ("GRU", {"batch_first": True}), ("RNN", {})])
def test_chunks_and_recomputing_give_the_same_gradients(kind, more, injection):
    """And copies are made at the noise: the states that a layer begins with are the samples' own."""
    model = filled(Reader(kind, **more))
    settings = {"batch": BATCH, "copies": 6, "injection": injection, "learn_sigma": True}
    estimator = ulr.ULR(model, copies=6, injection=injection)
    estimator.backward(*BATCH, cross_entropy)
    (plan,) = estimator._plans.values()
    assert all(item.expand_late and item.reuses_prefix for item in plan.passes)
    _, expected = gradients(model, **settings)
    assert len(expected) == len(list(model.parameters()))
    for more in ({"max_rows": 6}, {"max_rows": 2}, {"memory": "recompute"}, {"memory": "recompute", "max_rows": 6}):
        _, found = gradients(model, **settings, **more)
        assert_same(expected, found)


@pytest.mark.parametrize("kind, more", [("LSTM", {"num_layers": 2}), ("GRU", {})])
def test_cosines_follow_the_law(kind, more):
    model = filled(Reader(kind, **more), 0.7)
    report = ulr.check(model, *BATCH, cross_entropy, sigma=0.01, copies=128, steps=16)
    assert report.ok, report
    for layer in report.layers:
        assert layer.cosine == pytest.approx(layer.predicted_cosine, abs=max(0.05, 5 * layer.cosine_error)), report


def test_steps_are_shown_only_for_noise_inside(monkeypatch):
    """Elsewhere torch's own function runs, which is faster; also where the layer's weights have noise themselves."""
    shown = []
    form = COMPOSITES[torch.gru]
    monkeypatch.setitem(COMPOSITES, torch.gru, lambda *args: shown.append(1) or form(*args))

    def steps_shown(**settings):
        estimator = ulr.ULR(model, copies=4, max_rows=100, **settings)
        estimator.backward(*BATCH, cross_entropy)
        shown.clear()
        estimator.backward(*BATCH, cross_entropy)
        return len(shown)

    model = filled(Reader("GRU"))
    assert steps_shown() == 1  # of three passes
    names = [name for name, _ in model.named_parameters() if name.startswith("cells")]
    assert steps_shown(noise=dict.fromkeys(names, "weights")) == 0
    model.cells.requires_grad_(False)
    assert steps_shown() == 0


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_noise_on_the_weights_of_a_layer_is_one_pass(kind):
    """Its noises are those of a pass for each parameter; their gradients differ, as all move the loss."""
    model = filled(Reader(kind))
    names = [name for name, _ in model.named_parameters() if name.startswith("cells")]
    settings = {"copies": 4, "noise": dict.fromkeys(names, "weights")}
    estimator = ulr.ULR(model, **settings)
    passes = estimator.plan(*BATCH, cross_entropy).passes
    assert [pass_.weights for pass_ in passes if pass_.weights] == [tuple(names)]
    copies = dict.fromkeys(names, 8) | {names[0]: 4, "": 4}
    passes = ulr.ULR(model, **settings | {"copies": copies}).plan(*BATCH, cross_entropy).passes
    assert [pass_.weights for pass_ in passes if pass_.weights] == [(names[0],), tuple(names[1:])]


def test_the_preset_has_orthogonal_signs_in_passes_with_one_noise():
    def samplers(**settings):
        passes = ulr.ULR(model, copies=4, preset="best", **settings).plan(*BATCH, cross_entropy).passes
        return {"+".join(sorted({layer.split(".")[0] for layer in p.layers})): p.sampler for p in passes}

    model = filled(Reader("GRU"))
    alone = samplers()
    assert alone.pop("cells") == "iid" and set(alone.values()) == {"hadamard"}
    assert set(samplers(injection="joint").values()) == {"iid"}
    with pytest.warns(UserWarning, match="sampler='auto' leaves independent signs to layers"):
        assert set(samplers(dist="rademacher", sampler="hadamard").values()) == {"hadamard"}


def test_what_noise_on_the_steps_cannot_do_is_named():
    model = filled(Reader("LSTM"))
    with pytest.raises(ValueError, match="'baseline' must be 'clean' where sampler is 'sobol' and a layer is called"):
        gradients(model, batch=BATCH, sampler="sobol", antithetic=True)
    gradients(model, batch=BATCH, sampler="sobol", baseline="clean")
    model.packed = True
    with pytest.raises(ValueError, match=r"noise=.name: 'weights'.*cells.weight_ih_l0 \(used by lstm\)"):
        gradients(model, batch=BATCH)
    names = [name for name, _ in model.named_parameters() if name.startswith("cells")]
    gradients(model, batch=BATCH, noise=dict.fromkeys(names, "weights"))
