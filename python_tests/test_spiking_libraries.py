"""snnTorch and spikingjelly, as their tutorials write networks: the gradient is that of a twin with open states."""

import re
from pathlib import Path

import pytest
import small_models
import torch
import torch.nn.functional as F
from small_models import filled, v
from test_spiking import STEPS, X, Y, assert_same, gradients
from torch import nn

import ulr_kernels as ulr

modules_may_draw = small_models.modules_may_draw  # used by every test of this file

IMAGES = 3 * v(2, 6, 1, 8, 8)


def of_last(outputs, targets):
    """Membranes and spikes of all time steps, `[steps, samples, classes]`."""
    spikes, membranes = outputs
    return F.cross_entropy(spikes.sum(0), targets, reduction="none") + membranes.square().mean((0, 2))


def cross_entropy(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


# --- snnTorch --------------------------------------------------------------------------------------------------------


@pytest.fixture
def snn():
    return pytest.importorskip("snntorch")


class Tutorial(nn.Module):
    """snnTorch's fifth tutorial: `neuron` makes a layer's neurons, whose states are passed on by the forward."""

    def __init__(self, neuron):
        super().__init__()
        self.fc1, self.lif1, self.fc2, self.lif2 = nn.Linear(5, 7), neuron(7), nn.Linear(7, 4), neuron(4)

    def forward(self, x):
        one, two = self.lif1.reset_mem(), self.lif2.reset_mem()
        one, two = (state if isinstance(state, tuple) else (state,) for state in (one, two))
        spikes, membranes = [], []
        for _ in range(STEPS):
            spikes1, *one = self.lif1(self.fc1(x), *one)
            if getattr(self.lif1, "recurrent", None) is not None:
                one.insert(0, spikes1)  # which it reads too
            spikes2, *two = self.lif2(self.fc2(spikes1), *two)
            spikes.append(spikes2)
            membranes.append(two[-1])
        return torch.stack(spikes, dim=0), torch.stack(membranes, dim=0)


class Leaky(nn.Module):
    """snnTorch's Leaky (of second order: Synaptic) with its state as an argument alone."""

    def __init__(self, alpha=None, beta=0.8):
        super().__init__()
        self.alpha, self.beta = alpha, beta

    def reset_mem(self):
        return (0.0,) if self.alpha is None else (0.0, 0.0)

    def forward(self, current, *state):
        *synapse, mem = state
        fired = (torch.as_tensor(mem) > 1).float()
        if synapse:
            current = self.alpha * synapse[0] + current
        mem = self.beta * mem + current - fired
        return (mem > 1).float(), *((current,) if synapse else ()), mem


@pytest.mark.parametrize("injection", ["layerwise", "joint"])
def test_snntorch_leaky_and_synaptic(snn, injection):
    model = filled(Tutorial(lambda _: snn.Leaky(beta=0.8)))
    twin = filled(Tutorial(lambda _: Leaky()))
    assert_same(*(gradients(each, loss_fn=of_last, injection=injection) for each in (model, twin)))
    model = filled(Tutorial(lambda _: snn.Synaptic(alpha=0.6, beta=0.8)))
    twin = filled(Tutorial(lambda _: Leaky(0.6)))
    assert_same(*(gradients(each, loss_fn=of_last, injection=injection) for each in (model, twin)))


@pytest.mark.parametrize("resets", ["in the forward", "before the forward"])
@pytest.mark.parametrize("convolutional", [False, True])
def test_snntorch_hidden_states(snn, resets, convolutional):
    from snntorch import utils

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            front = [nn.Conv2d(1, 3, 3), nn.MaxPool2d(2)] if convolutional else [nn.Linear(5, 7)]
            back = [nn.Flatten(), nn.Linear(27, 4)] if convolutional else [nn.Linear(7, 4)]
            ends = snn.Leaky(beta=0.8, init_hidden=True), snn.Leaky(beta=0.8, init_hidden=True, output=True)
            self.net = nn.Sequential(*front, ends[0], *back, ends[1])

        def forward(self, x):
            if resets == "in the forward":
                utils.reset(self.net)
            found = [self.net(x) for _ in range(STEPS)]
            return tuple(torch.stack(each) for each in zip(*found, strict=True))

    class Open(Hidden):
        def forward(self, x):
            *front, one = self.net[: 3 if convolutional else 2]
            *back, two = self.net[len(front) + 1 :]
            states, found = [0.0, 0.0], []
            for _ in range(STEPS):
                h = x
                for number, (layers, neuron) in enumerate(((front, one), (back, two))):
                    for layer in layers:
                        h = layer(h)
                    fired = (torch.as_tensor(states[number]) > 1).float()
                    states[number] = neuron.beta * states[number] + h - fired
                    h = (states[number] > 1).float()
                found.append((h, states[1]))
            return tuple(torch.stack(each) for each in zip(*found, strict=True))

    x, model, twin = IMAGES if convolutional else X, filled(Hidden()), filled(Open())

    def after():
        with torch.no_grad():
            model(x[:4])
        utils.reset(model.net)

    found = gradients(model, x, loss_fn=of_last, after=after, steps=3)
    assert_same(found, gradients(twin, x, loss_fn=of_last, steps=3))
    if resets == "before the forward":
        with torch.no_grad():
            model(x[:4])
        with pytest.raises(ValueError, match=r"reset them first.*utils\.reset\(model\).*mem"):
            ulr.ULR(model, copies=4).backward(x, Y, of_last)


class Learnt(nn.Module):
    """snnTorch's RLeaky with learnt constants, with its states as arguments alone."""

    def __init__(self, features, recurrent):
        super().__init__()
        self.beta, self.threshold = nn.Parameter(torch.tensor(0.8)), nn.Parameter(torch.tensor(1.0))
        self.recurrent = nn.Linear(features, features) if recurrent else None

    def reset_mem(self):
        return (None,) if self.recurrent is None else (None, None)

    def forward(self, current, *state):
        *spikes, mem = state
        mem = torch.zeros_like(current) if mem is None else mem
        fired = (mem - self.threshold > 0).float()
        mem = self.beta.clamp(0, 1) * mem + current
        if self.recurrent is not None:
            mem = mem + self.recurrent(torch.zeros_like(current) if spikes[0] is None else spikes[0])
        mem = mem - fired * self.threshold
        return (mem - self.threshold > 0).float(), mem


def test_snntorch_recurrence_and_learnt_constants(snn):
    learnt = {"learn_beta": True, "learn_threshold": True}
    model, twin = Tutorial(lambda _: snn.Leaky(0.8, **learnt)), Tutorial(lambda n: Learnt(n, False))
    model.lif1, twin.lif1 = snn.RLeaky(0.8, linear_features=7, **learnt), Learnt(7, True)
    for each in (model, twin):
        filled(each)
        with torch.no_grad():
            for neuron in (each.lif1, each.lif2):
                neuron.beta.fill_(0.8), neuron.threshold.fill_(1.0)
    assert_same(*(gradients(each, loss_fn=of_last) for each in (model, twin)))


# --- spikingjelly ----------------------------------------------------------------------------------------------------


@pytest.fixture
def jelly():
    return pytest.importorskip("spikingjelly.activation_based")


class Steps(nn.Module):
    """The rate of spikes over a loop of single steps, as spikingjelly's first tutorial has it."""

    def __init__(self, neuron):
        super().__init__()
        self.layer = nn.Sequential(nn.Flatten(), nn.Linear(5, 7), neuron(), nn.Linear(7, 4), neuron())

    def forward(self, x):
        return sum(self.layer(x) for _ in range(STEPS)) / STEPS


class OpenSteps(Steps):
    """The same with the membranes of integrate-and-fire neurons, leaky ones if tau is given, in the forward."""

    def __init__(self, tau):
        super().__init__(nn.Identity)
        self.tau = tau

    def _fired(self, v, x):
        v = v + x if self.tau is None else v + (x - v) / self.tau
        fired = (v >= 1).float()
        return fired, (1 - fired) * v

    def forward(self, x):
        one = two = total = 0.0
        for _ in range(STEPS):
            spikes, one = self._fired(one, self.layer[1](x))
            spikes, two = self._fired(two, self.layer[3](spikes))
            total = total + spikes
        return total / STEPS


@pytest.mark.parametrize("injection", ["layerwise", "joint"])
@pytest.mark.parametrize("tau", [None, 1.5])
def test_spikingjelly_single_steps(jelly, tau, injection):
    from spikingjelly.activation_based import functional, neuron

    def neurons():
        return neuron.IFNode() if tau is None else neuron.LIFNode(tau=tau)

    model, twin = filled(Steps(neurons)), filled(OpenSteps(tau))

    def after():
        with torch.no_grad():
            model(X[:4])
        functional.reset_net(model)

    found = gradients(model, loss_fn=cross_entropy, after=after, injection=injection)
    assert_same(found, gradients(twin, loss_fn=cross_entropy, injection=injection))


def test_spikingjelly_without_a_reset_is_refused(jelly):
    from spikingjelly.activation_based import functional, neuron

    model = filled(Steps(lambda: neuron.LIFNode()))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.01)
        assert not model(X).any()
    estimator = ulr.ULR(model, copies=4)
    with pytest.raises(ValueError, match=r"functional\.reset_net\(model\).*layer\.2\.v"):
        estimator.backward(X, Y, cross_entropy)
    functional.reset_net(model)
    estimator.backward(X, Y, cross_entropy)


def test_spikingjelly_multiple_steps_are_refused(jelly):
    from spikingjelly.activation_based import functional, layer, neuron

    model = nn.Sequential(layer.Conv2d(1, 3, 3), layer.BatchNorm2d(3), neuron.IFNode(), layer.Flatten())
    functional.set_step_mode(model, "m")
    whole = small_models.filled(nn.Sequential(Repeated(), model))
    with pytest.raises(ValueError, match=r"first axis.*set_step_mode\(model, 's'\).*got .* and time first"):
        ulr.ULR(whole, copies=4).backward(IMAGES, Y, lambda o, y: o.square().mean((0, 2)))


class Repeated(nn.Module):
    def forward(self, x):
        return x.unsqueeze(0).repeat(STEPS, 1, 1, 1, 1)


def test_spikingjelly_learnt_leaks_have_noise_on_weights(jelly):
    from spikingjelly.activation_based import neuron

    model = filled(Steps(lambda: neuron.ParametricLIFNode(init_tau=1.5)))
    with pytest.raises(ValueError, match=r"noise on the weights .*layer\.2\.w \(used by"):
        ulr.ULR(model, copies=4).backward(X, Y, cross_entropy)
    noise = {"layer.2": "weights", "layer.4": "weights"}
    assert gradients(model, loss_fn=cross_entropy, noise=noise)["layer.2.w"].any()


# --- docs/networks.md ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["snntorch", "spikingjelly"])
def test_first_examples(library):
    pytest.importorskip(library)
    page = (Path(__file__).parents[1] / "docs/networks.md").read_text()
    (example,) = (code for code in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if library in code)
    names = {"images": v(3, 8, 1, 28, 28).abs(), "labels": torch.arange(8)}
    exec(example, names)
    assert names["loss"] > 0
    assert all(p.grad.any() for p in names["net"].parameters())
