"""Small models with reproducible parameters, for the tests of the estimator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from samples import values
from torch import Tensor, nn

import ulr_kernels as ulr


@pytest.fixture(autouse=True)
def modules_may_draw():
    """torch's modules fill themselves from the global generator; put it back."""
    with torch.random.fork_rng(devices=[]):
        yield


def unfilled(kind: type[nn.Module], *args, **kwargs) -> nn.Module:
    """A module whose parameters have no values yet.

    `skip_init` makes it on the meta device first, where nothing is drawn; after some of torch.compile's graphs it is.
    """
    with torch.random.fork_rng(devices=[]):
        return nn.utils.skip_init(kind, *args, **kwargs)


def v(seed: int, *shape: int) -> Tensor:
    """Normal values that touch no generator of torch's."""
    return values(seed, *shape, device="cpu", dtype=torch.float32)


def filled(model: nn.Module, scale: float = 0.5) -> nn.Module:
    for index, parameter in enumerate(model.parameters()):
        parameter.data.copy_(scale * v(10 + index, *parameter.shape))
    return model


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(1).sum(1) / 2


class Step(nn.Module):
    def forward(self, x):
        return (x > 0).float()


class Residual(nn.Module):
    def __init__(self, inputs: int = 5, width: int = 4, outputs: int = 3) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, outputs)

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        return self.head(h + torch.tanh(self.branch(h)))


class Twice(Residual):
    """The branch is called twice, one call after the other."""

    def forward(self, x):
        return self.head(torch.tanh(self.branch(torch.tanh(self.branch(torch.tanh(self.stem(x)))))))


class Tied(nn.Module):
    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(width, width), nn.Linear(width, width)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(torch.tanh(self.encode(x)))


class Junction(nn.Module):
    """A residual block: the branch and its shortcut both end in a layer. `seen`: the branch is used elsewhere too."""

    def __init__(self, seen=False):
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.shortcut, self.seen = nn.Linear(5, 4, bias=False), seen

    def forward(self, x):
        h = self.branch(torch.tanh(self.stem(x)))
        total = h + self.shortcut(x)
        return self.head(torch.tanh(total + torch.sin(h) if self.seen else total))


class Pooled(nn.Module):
    """Positions, a layer called twice, a product with a parameter stored as [K, N], and a mean over positions."""

    def __init__(self, width: int = 4, outputs: int = 3) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Parameter(torch.empty(width, outputs))

    def forward(self, x):
        return (torch.tanh(self.first(torch.tanh(self.first(x)))) @ self.second).mean(1)


def mlp():
    return filled(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))


def batch(samples=3, *shape, classes=3):
    return v(99, samples, *(shape or (5,))), torch.arange(samples) % classes


def gradients(model, **settings):
    """The gradients of one step on a small batch."""
    x, y = settings.pop("batch", batch())
    loss_fn = settings.pop("loss_fn", cross_entropy)
    model.zero_grad()
    estimator = ulr.ULR(model, **{"copies": 4, **settings})
    loss = estimator.backward(x, y, loss_fn)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(first, second, tolerance=1e-4):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=tolerance, atol=tolerance)
