"""ulr.ULR's first batch of a shape: how many forwards a plan takes, and what the next shapes take over from it."""

import contextlib

import pytest
import small_models
import torch
import torch.nn.functional as F
from small_models import Junction, batch, cross_entropy, filled, gradients, v
from test_models_of_others import classes, lively, transformers
from torch import nn

import ulr_kernels as ulr
from ulr_kernels.nn import call as calls

modules_may_draw = small_models.modules_may_draw  # used by every test of this file


class FirstGradient(Exception):
    """Ends a step."""


class Forwards:
    """Counts a model's forwards before a step writes its first gradient, and ends it there if `stops`."""

    def __init__(self, model, monkeypatch):
        self.count, self.before_gradient, self.stops = 0, None, False
        model.register_forward_pre_hook(self._forward)
        buffer = calls.gradient_buffer

        def written(parameter):
            if self.before_gradient is None:
                self.before_gradient = self.count
                if self.stops:
                    raise FirstGradient
            return buffer(parameter)

        monkeypatch.setattr(calls, "gradient_buffer", written)
        monkeypatch.setattr("ulr_kernels.estimators.weight_noise.gradient_buffer", written)

    def _forward(self, *_):
        self.count += 1

    def of(self, step, stops=False):
        """Those before the first gradient, and in all."""
        self.count, self.before_gradient, self.stops = 0, None, stops
        with contextlib.suppress(FirstGradient):
            step()
        return self.before_gradient, self.count


def bert(layers=6):
    settings = transformers.BertConfig(
        vocab_size=12, hidden_size=8, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return lively(transformers.BertForSequenceClassification(settings).eval())


def texts(samples, tokens):
    ids = (torch.arange(samples * tokens).view(samples, tokens) * 7 + samples) % 12
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    return {"input_ids": ids, "attention_mask": mask}, torch.arange(samples) % 3, classes


MIXED = {"noise": {"bert.encoder": "weights"}}
MODES = ({}, {"injection": "joint"}, MIXED, {"injection": "joint", **MIXED}, {"noise": "weights", "injection": "joint"})
SHAPES = ((4, 5), (4, 6), (4, 9), (4, 7), (4, 3), (2, 5), (1, 5))


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_forwards_before_the_first_gradient(settings, monkeypatch):
    """At most eight, however many layers a model has, and two where a batch of its kind was planned before."""
    model = bert(2 if "noise" in settings else 6)
    estimator, forwards = ulr.ULR(model, copies=2, **settings), Forwards(model, monkeypatch)
    for number, shape in enumerate(SHAPES):
        before, _ = forwards.of(lambda: estimator.backward(*texts(*shape)), stops=number > 0)  # noqa: B023
        assert before <= (8 if number == 0 else 2), shape
    if len(settings) == 1:
        _, in_all = forwards.of(lambda: estimator.backward(*texts(4, 5)))
        _, at_a_new_shape = forwards.of(lambda: estimator.backward(*texts(3, 8)))
        assert at_a_new_shape == in_all + 1


@pytest.mark.parametrize("settings", [{}, {"injection": "joint"}], ids=str)
def test_a_shape_that_takes_over_a_plan_has_the_same_gradients(settings):
    """As an estimator for which it is the first."""
    model = bert(1)
    used = ulr.ULR(model, copies=2, max_rows=4, **settings)
    for shape in SHAPES:
        used.step = 0
        model.zero_grad()
        used.backward(*texts(*shape))
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        ulr.ULR(model, copies=2, max_rows=4, **settings).backward(*texts(*shape))
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_tokens_with_losses_of_their_own_take_a_trial_for_each_shape(monkeypatch):
    model = filled(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 4)))

    def of_tokens(outputs, targets):
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)

    estimator, forwards = ulr.ULR(model, copies=4), Forwards(model, monkeypatch)
    for number, tokens in enumerate((40, 24, 7)):
        x, y = v(1, 3, tokens, 6), torch.arange(3 * tokens).view(3, tokens) % 4
        before, _ = forwards.of(lambda: estimator.backward(x, y, of_tokens, torch.eye(tokens)))  # noqa: B023
        assert before <= (8 if number == 0 else 3)
    x, y, leaks = v(1, 3, 9, 6), torch.zeros(3, 9, dtype=torch.long), torch.ones(9, 9).tril(-1)
    with pytest.raises(ValueError, match="must not be 0 where a row's noise changes a loss"):
        estimator.backward(x, y, of_tokens, leaks)


class Sized(nn.Module):
    """Does something else from some number of features on, or of rows."""

    def __init__(self, kind):
        super().__init__()
        self.fc, self.head, self.kind = nn.Linear(5, 4), nn.Linear(4, 3), kind

    def forward(self, x):
        h = torch.tanh(self.fc(x))
        if x.shape[1] > 6:
            h = {"mixes": lambda: h.roll(1, 0), "twice": lambda: torch.tanh(self.fc(x.flip(1)) + h)}[self.kind]()
        return self.head(h).mean(1)


def test_a_shape_in_which_the_model_does_something_else_is_planned_anew():
    model = filled(Sized("mixes"))
    estimator = ulr.ULR(model, copies=4)
    estimator.backward(*batch(3, 6, 5), cross_entropy)
    model.zero_grad()
    with pytest.raises(ValueError, match=r"made from its own sample only"):
        estimator.backward(*batch(3, 7, 5), cross_entropy)
    assert all(p.grad is None for p in model.parameters())

    model = filled(Sized("twice"))
    used = ulr.ULR(model, copies=4)
    used.backward(*batch(3, 6, 5), cross_entropy)
    used.step = 0
    model.zero_grad()
    used.backward(*batch(3, 7, 5), cross_entropy)
    _, expected = gradients(filled(Sized("twice")), batch=batch(3, 7, 5))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name])


@pytest.mark.parametrize("layer", ["stem", "branch"])
def test_a_small_share_of_mixing_shows_beside_the_noise_of_many_layers(layer):
    """Five per cent of one layer's noise go to other samples; the noise of all other layers is a hundred times it."""

    class Leaks(Junction):
        def forward(self, x):
            h = torch.tanh(self._leak("stem", self.stem(x)))
            total = self._leak("branch", self.branch(h)) + self.shortcut(x)
            return self.head(torch.tanh(total))

        @staticmethod
        def _leak(name, h):
            return h + 0.05 * h.roll(1, 0) if name == layer else h

    with pytest.raises(ValueError, match=r"noise of other samples \((stem|branch)"):
        gradients(filled(Leaks()), batch=batch(8), sigma={layer: 0.01, "": 1.0})
