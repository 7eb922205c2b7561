"""ulr.ULR of a plain MLP: one op does the step, with the gradients of the passes; anything else is left to them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
import truth
from small_models import unfilled
from torch import Tensor, nn

import ulr_kernels as ulr
from ulr_kernels import dispatch
from ulr_kernels.estimators import mlp_step

CROSS_ENTROPY = functools.partial(F.cross_entropy, reduction="none")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """One entry for each call of the op."""
    calls: list[None] = []

    def counted(*args, **how) -> Tensor:
        calls.append(None)
        return ulr.ops.noisy_mlp_step(*args, **how)

    monkeypatch.setattr(mlp_step, "noisy_mlp_step", counted)
    yield calls


def filled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for key, parameter in enumerate(model.parameters()):
            parameter.copy_(ulr.noise_like(parameter, key) / parameter.shape[-1] ** 0.5)
    return model


def make(device: str = "cpu", activation: type = nn.ReLU, bias: bool = True) -> nn.Sequential:
    first, second, third = (unfilled(nn.Linear, k, n, bias=bias, device=device) for k, n in ((12, 13), (13, 9), (9, 5)))
    return filled(nn.Sequential(nn.Flatten(), first, activation(), second, activation(), third))


def batch(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return truth.noise((8, 3, 2, 2), 1).to(device, dtype), (torch.arange(8) % 5).to(device)


def gradients(model: nn.Module, x: Tensor, y: Tensor, loss_fn: Callable, **settings) -> list[Tensor]:
    """The loss, and the gradients after two steps."""
    estimator = ulr.ULR(model, **{"sigma": 0.3, "copies": 8, "seed": 5, **settings})
    loss = [estimator.backward(x, y, loss_fn) for _ in range(2)][1]
    return [loss, *(p.grad for p in model.parameters())]


def needs_kernel(device: str) -> None:
    if not mlp_step._has_kernel(torch.device(device)):
        pytest.skip(f"no kernel of noisy_mlp_step runs on {device}")


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, {}),
        ({"injection": "joint", "baseline": "clean", "dist": "laplace"}, {"activation": nn.Tanh}),
        ({"antithetic": False, "copies": 3, "baseline": "none"}, {"bias": False}),
        ({"sigma": {"1": 0.1, "3": 0.2, "5": 0.3}, "dist": "rademacher", "max_rows": 8}, {"activation": nn.Sigmoid}),
    ],
    ids=["default", "joint", "unpaired", "by-layer"],
)
def test_the_op_gives_the_gradients_of_the_passes(settings: dict, kind: dict, steps: list, device: str) -> None:
    needs_kernel(device)
    x, y = batch(device)
    loss_fn = nn.CrossEntropyLoss(reduction="none", label_smoothing=0.2)
    by_op = gradients(make(device, **kind), x, y, loss_fn, **settings)
    assert len(steps) == 2
    by_layer = gradients(make(device, **kind), x, y, lambda *rows: loss_fn(*rows), **settings)
    assert len(steps) == 2  # what a function computes is not known
    for result, expected in zip(by_op, by_layer, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_bf16_too(steps: list, device: str) -> None:
    needs_kernel(device)
    x, y = batch(device, torch.bfloat16)
    loss, *_ = gradients(make(device).to(torch.bfloat16), x, y, CROSS_ENTROPY)
    expected, *_ = gradients(make(device).to(torch.bfloat16), x, y, lambda *rows: CROSS_ENTROPY(*rows))
    assert len(steps) == 2
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)


def hooked(model: nn.Sequential) -> nn.Sequential:
    model[1].register_forward_hook(lambda *_: None)
    return model


def frozen(model: nn.Sequential) -> nn.Sequential:
    model[1].weight.requires_grad_(False)
    return model


def tied(model: nn.Sequential) -> nn.Sequential:
    square = filled(unfilled(nn.Linear, 12, 12))
    return nn.Sequential(model[0], square, nn.ReLU(), square, nn.ReLU(), filled(unfilled(nn.Linear, 12, 5)))


def patched(model: nn.Sequential) -> nn.Sequential:
    model[1].forward = lambda x: F.linear(x, model[1].weight, model[1].bias)
    return model


class OwnLinear(nn.Linear):
    pass


def subclassed(model: nn.Sequential) -> nn.Sequential:
    model[1].__class__ = OwnLinear
    return model


def mixed(model: nn.Sequential) -> nn.Sequential:
    model[2] = nn.Tanh()
    return model


def one_bias_less(model: nn.Sequential) -> nn.Sequential:
    model[3].bias = None
    return model


CHANGES = (hooked, frozen, tied, patched, subclassed, mixed, one_bias_less)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_other_models_run_layer_by_layer(change: Callable, steps: list) -> None:
    model = change(make())
    gradients(model, *batch(), CROSS_ENTROPY)
    assert not steps and all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": "sobol", "antithetic": True},
        {"learn_sigma": True},
        {"copies": {"1": 8, "3": 8, "5": 4}},
        {"noise": "weights"},
        {"noise": {"3": "weights"}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_settings_run_layer_by_layer(settings: dict, steps: list) -> None:
    model = make()
    gradients(model, *batch(), CROSS_ENTROPY, **settings)
    assert not steps and all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "loss_fn",
    [
        functools.partial(CROSS_ENTROPY, weight=torch.ones(5)),
        functools.partial(CROSS_ENTROPY, ignore_index=3),
        functools.partial(F.multi_margin_loss, reduction="none"),
        nn.CrossEntropyLoss(weight=torch.ones(5), reduction="none"),
    ],
    ids=["weight", "ignore_index", "another", "module"],
)
def test_other_losses_run_layer_by_layer(loss_fn: Callable, steps: list) -> None:
    gradients(make(), *batch(), loss_fn)
    assert not steps


def test_autocast_and_other_back_ends_run_layer_by_layer(steps: list) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        gradients(make(), *batch(), CROSS_ENTROPY)
    with ulr.use_backend("torch"):
        gradients(make(), *batch(), CROSS_ENTROPY)
    assert not steps


def test_a_back_end_without_the_op_runs_layer_by_layer(steps: list, monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(op: str, device: torch.device) -> Callable:
        if op == "noisy_mlp_step":
            raise dispatch.BackendError("no kernel")
        return found(op, device)

    found = dispatch.lookup
    monkeypatch.setattr(dispatch, "lookup", lookup)
    gradients(make(), *batch(), CROSS_ENTROPY)
    assert not steps


def test_a_class_that_does_not_exist_is_torchs_error() -> None:
    model, (x, y) = make(), batch()
    estimator = ulr.ULR(model, copies=4)
    estimator.backward(x, y, CROSS_ENTROPY)
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(IndexError, match="out of bounds"):
        estimator.backward(x, y + 1, CROSS_ENTROPY)
    assert all(torch.equal(p.grad, was) for p, was in zip(model.parameters(), before, strict=True))
