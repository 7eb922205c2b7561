"""ulr.ULR hands the linear layers of a pass to one op: the same gradients, in as few calls as can be."""

import pytest
import small_models
import torch
from small_models import Junction, Pooled, Tied, Twice, batch, cross_entropy, filled, gradients, half_squares, mlp, v
from torch import nn

from ulr_kernels import ops
from ulr_kernels.nn.linear import LinearCall

modules_may_draw = small_models.modules_may_draw  # used by every test of this file


def bias_only():
    model = mlp()
    model[0].weight.requires_grad_(False)
    return model


def normalised():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3, bias=False))


def mixed_dtypes():
    class Cast(nn.Module):
        def forward(self, x):
            return x.bfloat16()

    return nn.Sequential(
        nn.Linear(5, 4), nn.Linear(4, 4), Cast(), nn.Linear(4, 4).bfloat16(), nn.Linear(4, 3).bfloat16()
    )


X, LABELS = batch()
TOKENS, SQUARES = (v(99, 3, 2, 4), v(98, 3, 3)), (X, v(98, 3, 5))
MODELS = {  # model, batch, loss, calls of the op on many layers, and of the op on one
    "mlp": (mlp, batch(), cross_entropy, 1, 0),
    "junction": (Junction, batch(), cross_entropy, 1, 0),
    "called twice": (Twice, batch(), cross_entropy, 1, 1),
    "tied": (Tied, SQUARES, half_squares, 0, 2),
    "positions": (Pooled, TOKENS, half_squares, 1, 1),
    "bias alone": (bias_only, batch(), cross_entropy, 0, 2),
    "parametrised": (normalised, batch(), cross_entropy, 1, 0),
    "dtypes": (mixed_dtypes, batch(), cross_entropy, 2, 0),
}


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS.keys())
def test_one_call_for_many_layers(case, monkeypatch):
    make, data, loss_fn, together, alone = case
    counts = {"foreach_noisy_linear_grad_": 0, "noisy_linear_grad_": 0}

    def counted(name, call):
        def run(*args, **kwargs):
            counts[name] += 1
            return call(*args, **kwargs)

        return run

    model = make()
    with torch.no_grad():
        trained = [p.requires_grad for p in model.parameters()]
        filled(model)
    settings = {"injection": "joint", "batch": data, "loss_fn": loss_fn, "dist": "laplace"}
    for name in counts:
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    _, grouped = gradients(model, **settings)
    assert counts == {"foreach_noisy_linear_grad_": together, "noisy_linear_grad_": alone}
    monkeypatch.setattr(LinearCall, "joins", lambda self, others: False)
    _, one_by_one = gradients(model, **settings)
    assert [p.requires_grad for p in model.parameters()] == trained and grouped.keys() == one_by_one.keys()
    for name, gradient in grouped.items():
        assert torch.equal(gradient, one_by_one[name]), name


def test_a_learnt_sigma_takes_the_op_on_one_layer():
    """Whose gradient has a part for ln sigma."""
    _, found = gradients(mlp(), injection="joint", learn_sigma=True)
    _, expected = gradients(mlp(), injection="joint")
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)
