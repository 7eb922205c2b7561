"""ulr.ULR: what it asks of the rows of a batch: samples first, each computed from its own alone, in any number."""

import pytest
import small_models
import torch
from small_models import batch, cross_entropy, filled, gradients, mlp, v
from torch import nn

import ulr_kernels as ulr

modules_may_draw = small_models.modules_may_draw  # used by every test of this file


class RandomScale(nn.Module):
    def forward(self, x):
        return x * torch.rand(x.shape, generator=torch.Generator().manual_seed(1))


class TimeFirst(nn.Module):
    def __init__(self, flat):
        super().__init__()
        self.fc, self.flat = nn.Linear(5, 3), flat

    def forward(self, x):
        steps = x.transpose(0, 1)  # [time, samples, features]
        return (self.fc(steps.flatten(0, 1)).unflatten(0, steps.shape[:2]) if self.flat else self.fc(steps)).mean(0)


@pytest.mark.parametrize(
    "flat, message", [(False, "a multiple of 6 for two copies"), (True, "different values in two")]
)
def test_samples_must_come_first(flat, message):
    with pytest.raises(ValueError, match=f"the input of layer 'fc'.*{message}"):
        gradients(TimeFirst(flat), batch=batch(3, 4, 5))


def test_samples_must_not_depend_on_one_another():
    with pytest.raises(ValueError, match="'model' must normalise by running statistics"):
        gradients(nn.Sequential(mlp(), nn.BatchNorm1d(3, affine=False, track_running_stats=False)))
    with pytest.raises(ValueError, match="without random numbers, got different values"):
        gradients(nn.Sequential(RandomScale(), mlp()))


class Mixed(nn.Module):
    """Two layers; `mix` is what the samples do with one another between them."""

    def __init__(self, mix):
        super().__init__()
        self.fc, self.head, self.mix = nn.Linear(5, 6), nn.Linear(6, 3), mix

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.fc, x)))


MIXED = {
    "mean": lambda fc, x: fc(x) - fc(x).mean(0),
    "attention": lambda fc, x: torch.softmax(fc(x) @ fc(x).T, -1) @ fc(x),
    "neighbours": lambda fc, x: fc(x).roll(1, 0),
    "groups": lambda fc, x: fc(x).view(-1, 4, 6).cumsum(1).view(-1, 6),
    "time-first": lambda fc, x: fc(x.repeat(4, 1)).view(4, len(x), -1).mean(0),
    "two-views": lambda fc, x: torch.maximum(*fc(torch.cat([x, x])).chunk(2)),
}


@pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("samples", [1, 8, 33])
def test_noise_must_keep_to_its_samples(mix, samples):
    x, y = batch(samples + -samples % 4 if mix is MIXED["groups"] else samples)
    with pytest.raises(ValueError, match=r"noise of other samples \(fc\)|each made from its own sample only"):
        gradients(filled(Mixed(mix)), batch=(x, y))


def test_losses_must_not_depend_on_other_samples():
    def of_pairs(outputs, targets):
        return (outputs - outputs.roll(len(outputs) // 2, 0)).square().mean(1) + cross_entropy(outputs, targets)

    with pytest.raises(ValueError, match="'the loss' must .* each made from its own sample only"):
        ulr.ULR(mlp()).backward(*batch(8), of_pairs)


@pytest.mark.parametrize("injection", ["layerwise", "joint"])
def test_rows_of_a_sample_may_follow_one_another(injection):
    """Several rows of a sample, and steps between layers that are no rows at all, are no mixing."""

    def steps(fc, x):
        return (fc(x.repeat_interleave(4, 0)).unflatten(0, (-1, 4)) > 0.1).float().cumsum(1)[:, -1]

    _, found = gradients(filled(Mixed(steps)), batch=batch(8), injection=injection)
    assert set(found) == {"fc.weight", "fc.bias", "head.weight", "head.bias"}


class Graph(nn.Module):
    """Its rows are the nodes of one graph."""

    def __init__(self):
        super().__init__()
        self.fc, self.edges = nn.Linear(5, 3), v(3, 8, 8)

    def forward(self, x):
        return self.edges @ self.fc(x)


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.state = nn.Linear(5, 3), 0.0

    def forward(self, x):
        self.state = 0.5 * self.state + self.fc(x)
        return self.state


def test_a_fixed_number_of_rows_is_named():
    message = r"'model' must take any number of rows, .*ulr\.optim.* got in a forward of two copies: .*8.*16"
    with pytest.raises(ValueError, match=message):
        gradients(Graph(), batch=batch(8))
    model = Stateful()
    with torch.no_grad():
        model(batch(8)[0])
    with pytest.raises(ValueError, match=message):
        gradients(model, batch=batch(8))
    x, y = batch(8)
    with pytest.raises(ValueError, match="'loss_fn' must take any number of rows, .*16.*8"):
        ulr.ULR(mlp()).backward(x, None, lambda outputs, _: cross_entropy(outputs, y))


def test_an_error_of_the_model_itself_is_left_alone():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        gradients(nn.Linear(6, 3), batch=batch(8))
