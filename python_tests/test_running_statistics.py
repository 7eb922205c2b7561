"""Batch normalisation in train mode: its running statistics follow the forward without noise, by torch's rule."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from small_models import filled, unfilled, v
from torch import nn

import ulr_kernels as ulr
from ulr_kernels.nn.running_statistics import RunningStatistics

LOSS = functools.partial(F.cross_entropy, reduction="none")


def network(momentum: float | None = 0.1) -> nn.Module:
    convolution, linear = unfilled(nn.Conv2d, 1, 4, 3, padding=1), unfilled(nn.Linear, 64, 3)
    filled(convolution), filled(linear)
    return nn.Sequential(convolution, nn.BatchNorm2d(4, momentum=momentum), nn.ReLU(), nn.Flatten(), linear)


X, Y = 3 * v(0, 20, 1, 4, 4) + 1, torch.arange(20) % 3


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    "settings",
    [{}, {"preset": "best"}, {"baseline": "clean"}, {"max_rows": 16}, {"noise": "weights"}, {"memory": "recompute"}],
    ids=str,
)
def test_a_step_moves_them_as_a_forward_of_torch_does(settings, momentum) -> None:
    model = network(momentum)
    expected = copy.deepcopy(model)
    estimator = ulr.ULR(model, copies=4, seed=0, **settings)
    for step in range(2):
        with torch.no_grad():
            expected[1](expected[0](X + step))  # the layers before it are the same in both modes
        estimator.backward(X + step, Y, LOSS)
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-5, atol=1e-6, msg=name)
    assert model[1].num_batches_tracked == 2


def test_the_forwards_of_a_step_use_those_from_before_it() -> None:
    trained, frozen = network(), network()
    frozen.eval()
    losses = [ulr.ULR(model, copies=4, seed=0).backward(X, Y, LOSS) for model in (trained, frozen)]
    assert torch.equal(*losses)
    for a, b in zip(trained.parameters(), frozen.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert not torch.equal(trained[1].running_mean, frozen[1].running_mean)


def test_in_eval_mode_they_stay() -> None:
    model = network()
    model[1].eval()
    ulr.ULR(model, copies=4, seed=0).backward(X, Y, LOSS)
    assert not model[1].running_mean.any() and model[1].num_batches_tracked == 0
    assert not RunningStatistics(model)


def test_a_module_of_several_calls_moves_once_and_one_without_a_call_stays() -> None:
    model = nn.ModuleList([nn.BatchNorm1d(2, momentum=0.5), nn.BatchNorm1d(2)])
    statistics, x = RunningStatistics(model), v(1, 6, 2)
    model.eval()
    with statistics.watching():
        model[0](x[:2])
        model[0](x[2:])
    model[0](x)  # outside of the block
    statistics.update()
    torch.testing.assert_close(model[0].running_mean, 0.5 * x.mean(0))
    torch.testing.assert_close(model[0].running_var, 0.5 + 0.5 * x.var(0))
    assert torch.equal(model[1].running_var, torch.ones(2)) and model[1].num_batches_tracked == 0
