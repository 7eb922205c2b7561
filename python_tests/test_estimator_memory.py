"""The memory of ulr.ULR: recomputed passes, which keep no activation, and the chunks that it chooses itself."""

import itertools

import pytest
import small_models
import torch
import torch.nn.functional as F
from small_models import Junction, Residual, Twice, assert_same, batch, cross_entropy, filled, gradients, mlp, v
from test_cpp_backend import MEGABYTE, peak_bytes
from torch import nn

import ulr_kernels as ulr
from ulr_kernels import ops
from ulr_kernels.nn.linear import LinearCall

modules_may_draw = small_models.modules_may_draw  # used by every test of this file

LABELS = torch.arange(3)
ALL = 10**6  # rows


def conv_net():
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)]
    body = [nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2)]
    return nn.Sequential(*body, nn.ReLU(), *head), (v(1, 3, 2, 7, 6), LABELS)


def transformer_block():
    """Attention, normalisations, residuals, a table and a 1-d convolution."""
    block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    head = [nn.Conv1d(5, 3, 3), nn.Flatten(), nn.Linear(18, 3)]
    return nn.Sequential(nn.Embedding(12, 8), block, *head), (torch.arange(15).view(3, 5) % 12, LABELS)


MODELS = {
    "mlp": lambda: (mlp(), batch()),
    "residual": lambda: (Residual(), batch()),
    "twice": lambda: (Twice(), batch()),
    "junction": lambda: (Junction(), batch()),
    "convolutions": conv_net,
    "transformer": transformer_block,
}


@pytest.mark.parametrize("max_rows", [None, 12])
@pytest.mark.parametrize("injection", ["layerwise", "joint"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_recomputing_gives_the_same_gradients(make, injection, max_rows):
    model, data = make()
    model = filled(model).eval()
    settings = {"injection": injection, "batch": data, "copies": 6, "dist": "laplace"}
    loss, kept = gradients(model, **settings)
    again, recomputed = gradients(model, memory="recompute", max_rows=max_rows, **settings)
    torch.testing.assert_close(again, loss)
    assert_same(kept, recomputed, 2e-5)


@pytest.mark.parametrize("injection", ["layerwise", "joint"])
def test_recomputing_of_a_learnt_sigma(injection):
    model, (x, y) = filled(Junction()), batch()
    learnt = []
    for memory in ("keep", "recompute"):
        estimator = ulr.ULR(model, copies=4, injection=injection, learn_sigma=True, memory=memory)
        estimator.backward(x, y, cross_entropy)
        learnt.append({str(i): p.grad for i, p in enumerate(estimator.parameters()) if p.grad is not None})
    assert_same(*learnt, 1e-5)


@pytest.mark.parametrize("injection, recomputed", [("layerwise", 0), ("joint", 1)])
def test_a_second_forward_makes_output_and_gradient_in_one(injection, recomputed, monkeypatch):
    """But for the last layer, whose output nobody needs: all that a layer-wise pass recomputes is a gradient."""
    counts = dict.fromkeys(("noisy_linear", "noisy_linear_recompute_", "noisy_linear_grad_"), 0)

    def counted(name, call):
        def run(*args, **kwargs):
            counts[name] += 1
            return call(*args, **kwargs)

        return run

    for name in counts:
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    estimator = ulr.ULR(mlp(), copies=4, injection=injection, memory="recompute")
    estimator.backward(*batch(), cross_entropy)
    counts.update(dict.fromkeys(counts, 0))
    ran = []
    estimator.model.register_forward_hook(lambda *_: ran.append(1))
    estimator.backward(*batch(), cross_entropy)
    assert counts == {"noisy_linear": 2, "noisy_linear_recompute_": recomputed, "noisy_linear_grad_": 2 - recomputed}
    assert len(ran) == (4 if injection == "layerwise" else 2)  # to its end, as a model may put back a state there


LAYERS, COPIES, SAMPLES, WIDTH = 10, 16, 32, 64
ACTIVATION = 4 * COPIES * SAMPLES * WIDTH  # bytes


def deep(kind):
    linear = kind == "linear"
    layers = [nn.Linear(WIDTH, WIDTH) if linear else nn.Conv2d(16, 16, 3, padding=1) for _ in range(LAYERS)]
    body = [module for layer in layers for module in (layer, nn.Tanh())]
    return nn.Sequential(*body), v(1, SAMPLES, *((WIDTH,) if linear else (16, 2, 2)))


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_recomputing_keeps_no_activation(kind):
    """Jointly, all copies at once: the default holds each layer's input, the other way those of one layer."""
    model, x = deep(kind)
    model = filled(model, 0.1)

    def peak(memory):
        settings = {"injection": "joint", "copies": COPIES, "max_rows": ALL, "memory": memory}
        estimator = ulr.ULR(model, **settings)
        return peak_bytes(lambda: estimator.backward(x, None, lambda y, _: y.square().flatten(1).sum(1)))

    kept, recomputed = peak("keep"), peak("recompute")
    assert kept > LAYERS * ACTIVATION
    assert recomputed < kept - (LAYERS - 4) * ACTIVATION


def big_images():
    """8 x 32 x 32 numbers, 32 KiB, of an image after the first layer; a hundredth of it after the second."""
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(8), nn.Flatten(), nn.Linear(128, 3)]
    return filled(nn.Sequential(*layers), 0.1), (v(1, 100, 1, 32, 32), torch.arange(100) % 3)


@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("injection", ["layerwise", "joint"])
def test_a_cpu_is_given_as_many_rows_as_its_caches_hold(injection, memory):
    """By default no tensor after the noise has much more than 4 MiB, 128 images here; the gradients are the same."""
    model, data = big_images()
    settings = {"batch": data, "copies": 6, "injection": injection, "memory": memory}
    rows: dict[str, list[int]] = {"0": [], "4": []}
    for name in rows:
        model[int(name)].register_forward_hook(lambda _, inputs, output, name=name: rows[name].append(len(output)))
    estimator = ulr.ULR(model, **{k: settings[k] for k in ("copies", "injection", "memory")})
    estimator.backward(*data, cross_entropy)
    for seen in rows.values():
        seen.clear()
    estimator.backward(*data, cross_entropy)
    assert max(rows["0"]) <= 128
    assert max(rows["4"]) == (600 if injection == "layerwise" else max(rows["0"]))
    loss, found = gradients(model, **settings)
    whole_loss, whole = gradients(model, max_rows=ALL, **settings)
    torch.testing.assert_close(loss, whole_loss)
    assert_same(whole, found, 1e-4)


def test_chunks_bound_the_memory():
    model, (x, y) = big_images()

    def peak(max_rows):
        estimator = ulr.ULR(model, copies=6, max_rows=max_rows)
        return peak_bytes(lambda: estimator.backward(x, y, cross_entropy))

    assert peak(None) < 4 * 4 * MEGABYTE
    assert peak(ALL) > 2 * 600 * 32 * 1024


class Front(nn.Module):
    """Frozen functions before a layer, some of them in place, whose results are used after it too."""

    def __init__(self, writes):
        super().__init__()
        self.front, self.layer, self.head, self.writes = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3), writes
        self.front.requires_grad_(False)

    def forward(self, x):
        h = F.relu_(self.front(x))
        if self.writes == "new":  # into a tensor that each forward makes anew
            room = torch.ones(h.shape)
            room.mul_(h)
            h = room
        first, second = h.chunk(2, -1)
        y = torch.tanh(self.layer(torch.cat((second, first), -1)))
        if self.writes == "after":  # the noise, what all chunks would read
            h.mul_(2)
        return self.head(y + h)


@pytest.mark.parametrize("writes, resumes, fronts", [("", True, 2), ("new", False, 8), ("after", False, 5)])
def test_chunks_share_what_is_before_the_noise(writes, resumes, fronts, monkeypatch):
    """It runs for the first of them, where that is found to change nothing."""
    model, forwards = filled(Front(writes)), []
    forward = LinearCall.forward
    monkeypatch.setattr(LinearCall, "forward", lambda self, *xs: forwards.append(self) or forward(self, *xs))
    estimator = ulr.ULR(model, copies=8, max_rows=6)
    estimator.backward(*batch(), cross_entropy)
    (plan,) = estimator._plans.values()
    assert plan.passes[0].expand_late and plan.passes[0].reuses_prefix is resumes
    forwards.clear()
    estimator.backward(*batch(), cross_entropy)
    of_front = [call for call in forwards if call._w is model.front.weight]
    assert len(of_front) == fronts
    _, whole = gradients(model, copies=8, max_rows=ALL)
    _, found = gradients(model, copies=8, max_rows=6)
    assert_same(whole, found, 1e-5)


class Counter(nn.Module):
    """Computes something else each time, or calls other layers from some forward on. It counts outside of its own
    state, which a step puts back."""

    def __init__(self, until=None):
        super().__init__()
        self.fc, self.other, self.until = nn.Linear(5, 4), nn.Linear(4, 3), until
        self.count = itertools.count(1).__next__

    def forward(self, x):
        calls = self.count()
        if self.until is None:
            return self.other(calls * self.fc(x))
        h = self.fc(x)
        return self.other(h) if calls < self.until else self.other(self.fc(x) + h)


def test_a_forward_that_changes_is_refused():
    model = filled(Counter())
    with pytest.raises(ValueError, match="'model' must compute the same in every forward"):
        gradients(model)
    assert all(p.grad is None for p in model.parameters())
    steady = filled(Counter(until=100))
    gradients(steady, injection="joint", memory="recompute")
    model = filled(Counter(until=steady.count() - 1))  # the last forward of a step is the second one
    with pytest.raises(RuntimeError, match="must call the layers fc, other in a second forward as in the first, got"):
        gradients(model, injection="joint", memory="recompute")
