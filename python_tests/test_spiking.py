"""Spiking networks as their libraries build them, by stand-ins of plain torch that keep states as those libraries do.

Spikes have no derivative. So a network with states on its modules is compared with a twin that has the same layers and
noise, and passes its states on openly: both have the same gradient.
"""

import copy

import pytest
import small_models
import torch
import torch.nn.functional as F
from small_models import filled, v
from torch import nn

import ulr_kernels as ulr

modules_may_draw = small_models.modules_may_draw  # used by every test of this file

X, Y, STEPS = 3 * v(1, 6, 5), torch.arange(6) % 4, 5
SETTINGS = ({}, {"injection": "joint"}, {"injection": "joint", "memory": "recompute"}, {"max_rows": 24})


class Spike(torch.autograd.Function):
    """A step with a surrogate derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).float()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / (1 + (torch.pi * ctx.saved_tensors[0]).square())


class Buffered(nn.Module):
    """Keeps its membrane as a buffer, which begins anew where its size does not fit, as snnTorch's neurons do."""

    def __init__(self, leak=0.8):
        super().__init__()
        self.register_buffer("mem", torch.zeros(0), False)
        self.register_buffer("leak", torch.tensor(leak))

    def reset(self):
        self.mem = torch.zeros_like(self.mem, device=self.mem.device)

    def forward(self, current):
        if not self.mem.shape == current.shape:
            self.mem = torch.zeros_like(current, device=self.mem.device)
        fired = Spike.apply(self.mem - 1).clone().detach()
        self.mem = self.leak.clamp(0, 1) * self.mem + current - fired
        return Spike.apply(self.mem - 1)


class Memory(nn.Module):
    """Keeps its membrane in a dict: a number once it is reset, else a tensor, as spikingjelly's neurons do."""

    def __init__(self, leak=0.8):
        super().__init__()
        self._memories, self.leak = {"mem": 0.0}, leak

    def __getattr__(self, name):
        memories = self.__dict__.get("_memories", {})
        return memories[name] if name in memories else super().__getattr__(name)

    def reset(self):
        self._memories["mem"] = 0.0

    def forward(self, current):
        mem = self._memories["mem"]
        if isinstance(mem, float) or mem.shape != current.shape:
            mem = torch.zeros_like(current)
        fired = Spike.apply(mem - 1).detach()
        mem = self.leak * mem + current - fired
        self._memories["mem"] = mem
        return Spike.apply(mem - 1)


class Pairs(nn.Module):
    """Keeps a tuple of a current and a membrane, or None."""

    def __init__(self, leak=0.8):
        super().__init__()
        self.state, self.leak = None, leak

    def reset(self):
        self.state = None

    def forward(self, current):
        _, mem = self.state or (None, torch.zeros_like(current))
        fired = (mem > 1).float()
        mem = self.leak * mem + current - fired
        self.state = current, mem
        return (mem > 1).float()


class Net(nn.Module):
    """Neurons after two layers; the answer is the number of spikes, and the membranes at the end."""

    def __init__(self, neuron, resets=False):
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 4)
        self.one, self.two, self.resets = neuron(), neuron(), resets

    def reset(self):
        self.one.reset(), self.two.reset()

    def forward(self, x):
        if self.resets:
            self.reset()
        spikes = [self.two(self.second(self.one(self.first(x)))) for _ in range(STEPS)]
        return torch.stack(spikes, dim=0)


class Twin(Net):
    """The same with states that begin in the forward."""

    def __init__(self):
        super().__init__(nn.Identity)

    def forward(self, x):
        spikes, one, two = [], 0.0, 0.0
        fired_one = fired_two = 0.0
        for _ in range(STEPS):
            one = 0.8 * one + self.first(x) - fired_one
            fired_one = (one > 1).float()
            two = 0.8 * two + self.second(fired_one) - fired_two
            fired_two = (two > 1).float()
            spikes.append(fired_two)
        return torch.stack(spikes, dim=0)


def rates(outputs, targets):
    return F.cross_entropy(outputs.sum(0), targets, reduction="none")


def gradients(model, x=X, y=Y, loss_fn=rates, steps=2, after=lambda: None, **settings):
    """The gradients of some steps; `after` runs after each."""
    model.zero_grad()
    estimator = ulr.ULR(model, **{"sigma": 0.4, "copies": 16, **settings})
    for _ in range(steps):
        estimator.backward(x, y, loss_fn)
        after()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert expected[name].any(), name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


NEURONS = (Buffered, Memory, Pairs)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("resets", [True, False])
@pytest.mark.parametrize("neuron", NEURONS)
def test_states_of_modules_are_put_back(neuron, resets, settings):
    model = filled(Net(neuron, resets))
    assert_same(gradients(model, **settings), gradients(filled(Twin()), **settings))


@pytest.mark.parametrize("neuron", NEURONS)
def test_a_reset_after_the_step(neuron):
    """And forwards of the user's own between steps, each with a reset after it."""
    model = filled(Net(neuron))

    def after():
        with torch.no_grad():
            model(X[:3])
        model.reset()

    found = gradients(model, steps=3, after=after)
    assert_same(found, gradients(filled(Twin()), steps=3))


def silent(neuron):
    """A net that does not fire on X: nothing of its state shows in an output."""
    model = filled(Net(neuron))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.01)
        assert not model(X).any()
    model.reset()
    return model


@pytest.mark.parametrize("samples", [2, 6, 12, 24])
@pytest.mark.parametrize("neuron", NEURONS)
def test_a_state_of_an_earlier_forward_is_refused_though_it_does_not_show(neuron, samples):
    model = silent(neuron)
    with torch.no_grad():
        model(X.repeat(4, 1)[:samples])
    estimator = ulr.ULR(model, sigma=0.1, copies=4)
    if neuron is Pairs and samples not in (6, 12):  # no forward of X can run, be it the user's own
        with pytest.raises(RuntimeError, match="size of tensor"):
            model(X)
        return
    with pytest.raises(ValueError, match="'model' must .*(begin a step with fresh states: reset|reset it first)"):
        estimator.backward(X, Y, rates)
    assert all(p.grad is None for p in model.parameters())
    model.reset()
    estimator.backward(X, Y, rates)


@pytest.mark.parametrize("neuron", NEURONS)
def test_a_state_of_an_evaluation_between_steps_is_refused(neuron):
    model = silent(neuron)
    estimator = ulr.ULR(model, sigma=0.1, copies=4)
    for _ in range(2):
        estimator.backward(X, Y, rates)
    with torch.no_grad():
        model(X[:3])
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    for _ in range(2):
        with pytest.raises(ValueError, match=r"fresh states: reset them first.*\[3, 7\] in one\.(mem|state)"):
            estimator.backward(X, Y, rates)
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())
    model.reset()
    estimator.backward(X, Y, rates)


def test_a_state_with_a_graph_is_refused():
    model = filled(Net(Buffered))
    model(X)
    with pytest.raises(ValueError, match="fresh states: reset them first"):
        ulr.ULR(model, copies=4).backward(X, Y, rates)


class Keeps(nn.Module):
    """Keeps what it computes, for others to look at, and reads none of it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.seen, self.all = nn.Linear(5, 7), nn.Linear(7, 4), None, []

    def forward(self, x):
        self.seen = self.first(x).tanh()
        self.all.append(self.seen)
        return self.second(self.seen)[None]


def test_what_a_forward_keeps_and_does_not_read_is_no_state():
    model = filled(Keeps())
    with torch.no_grad():
        model(X[:3])
    kept = model.seen
    estimator = ulr.ULR(model, copies=4)
    estimator.backward(X, Y, rates)
    assert model.seen is kept and len(model.all) == 1
    with torch.no_grad():
        model(X[:2])
    estimator.backward(X, Y, rates)


class Resting(Net):
    """Potentials that rest at another number than 0, one of each neuron."""

    def __init__(self):
        super().__init__(nn.Identity)
        self.register_buffer("start", torch.full((7,), 0.3))
        self.register_buffer("u", None)
        self.reset()

    def reset(self):
        self.u = self.start

    def forward(self, x):
        total = 0.0
        for _ in range(STEPS):
            self.u = 0.8 * self.u + self.first(x)
            total = total + self.second((self.u > 1).float())
        return total[None]


def test_a_resting_potential_is_fresh():
    model = filled(Resting())
    estimator = ulr.ULR(model, sigma=0.4, copies=8)
    for _ in range(2):
        estimator.backward(X, Y, rates)
    assert model.u is model.start
    with torch.no_grad():
        model(X)
    with pytest.raises(ValueError, match="fresh states"):
        estimator.backward(X, Y, rates)


def test_a_copy_of_an_estimator_looks_at_its_own_model():
    model = filled(Net(Memory))
    estimator = ulr.ULR(model, copies=4)
    estimator.backward(X, Y, rates)
    other = copy.deepcopy(estimator)
    with torch.no_grad():
        model(X)
    other.backward(X, Y, rates)
    with pytest.raises(ValueError, match="fresh states"):
        estimator.backward(X, Y, rates)


class TimeFirst(nn.Module):
    """All time steps of a layer in one call: `[steps, samples, ...]`, or flat as `seq_to_ann_forward` makes them."""

    def __init__(self, flat):
        super().__init__()
        self.first, self.second, self.flat = nn.Linear(5, 7), nn.Linear(7, 4), flat

    def forward(self, x):
        steps = x.unsqueeze(0).repeat(STEPS, 1, 1)
        if self.flat:
            return self.second(self.first(steps.flatten(0, 1)).relu()).unflatten(0, (STEPS, -1))
        return self.second(self.first(steps).relu())


@pytest.mark.parametrize("flat", [True, False])
def test_time_first_rows_are_refused_by_name(flat):
    with pytest.raises(
        ValueError, match="'first'' must have the samples on its first axis.*loop over the steps.*got .* and time first"
    ):
        ulr.ULR(filled(TimeFirst(flat)), copies=4).backward(X, Y, rates)


def test_an_input_with_time_first_is_refused_by_name():
    with pytest.raises(ValueError, match="'y' must have 5 samples .*if x has time first, move that axis"):
        ulr.ULR(filled(Net(Memory)), copies=4).backward(v(3, 5, 6, 5), Y, rates)


@pytest.mark.parametrize("steps", [6, 12, 24])
def test_stacked_outputs_may_have_as_many_steps_as_samples(steps, monkeypatch):
    monkeypatch.setitem(globals(), "STEPS", steps)
    assert_same(gradients(filled(Net(Memory))), gradients(filled(Twin())))
