"""ulr.ULR: the formula, and how models are met. Unbiasedness is in test_unbiased.py."""

import pytest
import small_models
import torch
import torch.nn.functional as F
from small_models import (
    Junction,
    Residual,
    Tied,
    Twice,
    assert_same,
    batch,
    cross_entropy,
    filled,
    gradients,
    half_squares,
    mlp,
    v,
)
from torch import nn

import ulr_kernels as ulr
from ulr_kernels.estimators import plan as plans
from ulr_kernels.noise_contract import site_id

modules_may_draw = small_models.modules_may_draw  # used by every test of this file


def noise(layer, shape, copies, antithetic, seed, step, **kind):
    """The noise of a layer's copies, from the contract."""
    key = ulr.fold_in(ulr.fold_in(seed, step), site_id(layer))
    draws = copies // 2 if antithetic else copies
    eps = torch.stack([ulr.noise(shape, key, draw=c, **kind) for c in range(draws)])
    return torch.cat([eps, -eps]) if antithetic else eps


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("injection", ["layerwise", "joint"])
def test_gradient_is_the_formula(injection, antithetic):
    """The whole step, written out: noise by name and step, losses, baseline of the others, score times input."""
    model, (x, y), copies, sigma, seed = mlp(), batch(), 4, 0.3, 7
    estimator = ulr.ULR(
        model, sigma=sigma, copies=copies, antithetic=antithetic, injection=injection, baseline="mean", seed=seed
    )
    estimator.step = 5
    loss = estimator.backward(x, y, cross_entropy)

    eps = {name: noise(name, (3, width), copies, antithetic, seed, 5) for name, width in (("0", 4), ("2", 3))}
    losses = []
    for noised in [("0",), ("2",)] if injection == "layerwise" else [("0", "2")]:
        hidden = torch.tanh(model[0](x) + (sigma * eps["0"] if "0" in noised else torch.zeros(copies, 3, 4)))
        outputs = model[2](hidden) + (sigma * eps["2"] if "2" in noised else 0)
        row = torch.stack([cross_entropy(o, y) for o in outputs]).detach()
        losses.append(row.mean())
        groups = (row[:2] + row[2:]) / 2 if antithetic else row
        others = torch.stack([groups[[k for k in range(len(groups)) if k != c]].mean(0) for c in range(len(groups))])
        weight = (row - (others.repeat(2, 1) if antithetic else others)) / (copies * 3)
        for name, inputs in (("0", x.expand(copies, 3, 5)), ("2", hidden)):
            if name in noised:
                layer = model[int(name)]
                expected = torch.einsum("cb,cbn,cbk->nk", weight, eps[name], inputs) / sigma
                torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(
                    layer.bias.grad, torch.einsum("cb,cbn->n", weight, eps[name]) / sigma, rtol=1e-4, atol=1e-5
                )
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert loss.dim() == 0 and not loss.requires_grad
    assert estimator.step == 6


def test_positions_are_rows_of_their_sample():
    """Tokens: one loss per sample weighs all its rows."""
    layer, (x, _) = filled(nn.Linear(5, 4)), batch(2, 3, 5)
    model = nn.Sequential(layer)
    targets = v(3, 2, 3, 4)
    _, found = gradients(
        model, copies=2, antithetic=False, baseline="none", batch=(x, targets), loss_fn=half_squares, sigma=0.5
    )
    eps = noise("0", (6, 4), 2, False, 0, 0).view(2, 2, 3, 4)
    losses = torch.stack([half_squares(layer(x) + 0.5 * e, targets) for e in eps]).detach()
    expected = torch.einsum("cb,cbpn,bpk->nk", losses / 4, eps, x) / 0.5
    torch.testing.assert_close(found["0.weight"], expected, rtol=1e-4, atol=1e-5)


# --- how models are met ----------------------------------------------------------------------------------------------


class Functional(nn.Module):
    """The MLP of `mlp`, by another way of writing it."""

    def __init__(self, form):
        super().__init__()
        source = mlp()
        self.form = form
        columns = form in ("matmul", "@", "addmm", "mm")
        self.first = nn.Parameter(source[0].weight.detach().T.clone() if columns else source[0].weight.detach().clone())
        self.second = nn.Linear(4, 3)
        self.second.load_state_dict(source[2].state_dict())
        self.bias = nn.Parameter(source[0].bias.detach().clone(), requires_grad=form in ("linear", "addmm", "t"))

    def forward(self, x):
        form, w, b = self.form, self.first, self.bias
        hidden = {
            "linear": lambda: F.linear(x, w, bias=b),
            "t": lambda: torch.addmm(b, x, w.t()),
            "T": lambda: x @ w.T + b,
            "transpose": lambda: torch.matmul(x, w.transpose(0, 1)) + b,
            "@": lambda: x @ w + b,
            "matmul": lambda: x.matmul(w) + b,
            "mm": lambda: torch.mm(x, w) + b,
            "addmm": lambda: torch.addmm(b, x, w),
        }[form]()
        return self.second(torch.tanh(hidden))


@pytest.mark.parametrize("form", ["linear", "t", "T", "transpose", "@", "matmul", "mm", "addmm"])
def test_functional_calls(form):
    """The site of a bare parameter has the parameter's name; its gradient has the parameter's layout."""
    model, (x, y) = Functional(form), batch()
    _, found = gradients(model, copies=2, antithetic=False, sigma=0.3)
    eps = noise("first", (3, 4), 2, False, 0, 0)
    w, b = mlp()[0].parameters()
    losses = torch.stack(
        [cross_entropy(model.second(torch.tanh(F.linear(x, w, b) + 0.3 * e)), y) for e in eps]
    ).detach()
    weight = (losses - losses.flip(0)) / 6
    expected = torch.einsum("cb,cbn,bk->nk", weight, eps, x) / 0.3
    columns = model.first.shape == (5, 4)
    torch.testing.assert_close(found["first"].T if columns else found["first"], expected, rtol=1e-4, atol=1e-5)
    if model.bias.requires_grad:
        torch.testing.assert_close(found["bias"], torch.einsum("cb,cbn->n", weight, eps) / 0.3, rtol=1e-4, atol=1e-5)
    else:
        assert "bias" not in found


class SizeReader(nn.Module):
    """Reads the batch size before the noise; `late` uses it afterwards too."""

    def __init__(self, late):
        super().__init__()
        self.first, self.second, self.late = nn.Linear(5, 4), nn.Linear(4, 3), late

    def forward(self, x):
        rows = x.size(0)
        h = torch.tanh(self.first(x.view(rows, -1)))
        return self.second(h + torch.zeros(rows, 4) if self.late else h.view(rows, 4))


class Dict(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(5, 3), nn.Linear(2, 3)

    def forward(self, a, b, scale):
        return self.left(a) + scale * torch.tanh(self.right(b))


@pytest.mark.parametrize(
    "make, cuts",
    [
        (mlp, {"0": True, "2": True}),
        (Residual, {"stem": True, "branch": True, "head": True}),
        (Twice, {"stem": True, "branch": True, "head": True}),
        (lambda: SizeReader(False), {"first": True, "second": True}),
        (lambda: SizeReader(True), {"first": False, "second": True}),
        (lambda: nn.Sequential(nn.Flatten(), mlp()), {"1.0": True, "1.2": True}),
    ],
    ids=["mlp", "residual", "twice", "size-early", "size-late", "flatten"],
)
@pytest.mark.parametrize("injection", ["layerwise", "joint"])
def test_prefix_on_one_copy(make, cuts, injection, monkeypatch):
    """The prefix runs on one copy exactly where nothing else is alive at the layer, and nothing changes by it."""
    model = filled(make())
    x, y = batch()
    estimator = ulr.ULR(model, copies=4, injection=injection)
    estimator.backward(x, y, cross_entropy)
    (plan,) = estimator._plans.values()
    if injection == "layerwise":
        assert {item.layers[0]: item.expand_late for item in plan.passes} == cuts
    else:
        assert [item.expand_late for item in plan.passes] == [next(iter(cuts.values()))]
    by_cutting = {name: p.grad for name, p in model.named_parameters()}
    monkeypatch.setattr(plans, "can_expand_late", lambda *_: (False, False))
    _, at_the_input = gradients(model, injection=injection)
    assert_same(by_cutting, at_the_input)


def test_prefix_runs_on_one_copy():
    rows = []
    model = mlp()
    model.insert(0, nn.Identity())
    model[0].register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    estimator = ulr.ULR(model, copies=8)
    estimator.backward(*batch(), cross_entropy)
    rows.clear()
    estimator.backward(*batch(), cross_entropy)
    assert rows == [3, 3]


def test_second_call_has_its_own_noise():
    model, (x, y) = filled(Twice()), batch()
    _, found = gradients(model, copies=2, antithetic=False, baseline="none", sigma=0.3)
    first = noise("branch", (3, 4), 2, False, 0, 0)
    key = ulr.fold_in(ulr.fold_in(ulr.fold_in(0, 0), site_id("branch")), 1)
    second = torch.stack([ulr.noise((3, 4), key, draw=c) for c in range(2)])
    start = torch.tanh(model.stem(x))
    middle = torch.tanh(model.branch(start) + 0.3 * first)
    outputs = model.head(torch.tanh(model.branch(middle) + 0.3 * second))
    losses = torch.stack([cross_entropy(o, y) for o in outputs]).detach() / 6
    expected = torch.einsum("cb,cbn,bk->nk", losses, first, start) + torch.einsum(
        "cb,cbn,cbk->nk", losses, second, middle
    )
    torch.testing.assert_close(found["branch.weight"], expected / 0.3, rtol=1e-4, atol=1e-5)


def test_tied_weights_are_one_layer():
    model = filled(Tied())
    targets = v(3, 3, 5)
    estimator = ulr.ULR(model, copies=4, sigma={"encode": 0.1}, learn_sigma=False)
    with pytest.raises(ValueError, match="'sigma' must name layers of the model"):
        ulr.ULR(model, sigma={"encode.weight": 0.1})
    estimator.backward(batch()[0], targets, half_squares)
    (plan,) = estimator._plans.values()
    assert plan.names == ("encode",)
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_inputs_may_be_tuples_and_dicts():
    a, b, scale = v(1, 3, 5), v(2, 3, 2), 0.7
    y = batch()[1]
    model = filled(Dict())
    loss, by_name = gradients(model, batch=({"a": a, "b": b, "scale": scale}, {"label": y}),
                              loss_fn=lambda o, t: cross_entropy(o, t["label"]))  # fmt: skip
    again, by_position = gradients(model, batch=((a, b, scale), (y,)), loss_fn=lambda o, t: cross_entropy(o, t[0]))
    assert_same(by_name, by_position, 0)
    assert loss == again
    gradients(model, batch=((a, b, scale), None), loss_fn=lambda o, t: o.square().sum(1))


def test_wrappers_change_no_name():
    model = mlp()
    _, expected = gradients(model)
    _, found = gradients(nn.DataParallel(torch.compile(model)))
    assert_same(expected, {name.removeprefix("module._orig_mod."): g for name, g in found.items()}, 0)


def test_frozen_layers_have_no_noise():
    model = mlp()
    _, expected = gradients(model)
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    _, found = gradients(model, injection="joint")
    assert_same({n: g for n, g in expected.items() if n.startswith("2")}, found)
    assert model[0].weight.grad is None


def test_frozen_weight_with_a_trained_bias():
    model = mlp()
    _, expected = gradients(model)
    model[0].weight.requires_grad_(False)
    _, found = gradients(model)
    assert_same({n: g for n, g in expected.items() if n != "0.weight"}, found)


def test_settings_by_layer():
    model = mlp()
    _, a = gradients(model, copies={"0": 4, "2": 2}, sigma={"0": 0.2, "2": 0.4})
    _, b = gradients(model, copies=4, sigma=0.2)
    _, c = gradients(model, copies=2, sigma=0.4)
    assert_same(a, {n: (b if n.startswith("0") else c)[n] for n in a}, 0)


def test_bfloat16():
    model = mlp()
    loss, expected = gradients(model, copies=64, sigma=1.0)
    x, y = batch()
    coarse, found = gradients(mlp().bfloat16(), copies=64, sigma=1.0, batch=(x.bfloat16(), y))
    assert abs(loss - coarse) < 0.02 and coarse.dtype == torch.float32
    for name, gradient in found.items():
        assert gradient.dtype == torch.bfloat16
        assert F.cosine_similarity(gradient.float().flatten(), expected[name].flatten(), 0) > 0.99
    with torch.autocast("cpu", torch.bfloat16):
        _, found = gradients(model, copies=64, sigma=1.0)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert F.cosine_similarity(gradient.flatten(), expected[name].flatten(), 0) > 0.99


def test_learnt_sigma_of_a_bare_parameter_is_one_number():
    """A call alone shows how a bare parameter is used, and so which of its axes are features."""
    model = Functional("@")
    estimator = ulr.ULR(model, copies=4, learn_sigma=True)
    assert [tuple(p.shape) for p in estimator.parameters()] == [(), (3,)]
    estimator.backward(*batch(), cross_entropy)
    assert all(p.grad.abs().sum() > 0 for p in estimator.parameters())


def test_compiled_submodules_run_as_they_were_written():
    """Also those that were compiled before: their graphs would hide the layers' calls."""
    plain, compiled = mlp(), mlp()
    compiled[0].compile(backend="eager")
    compiled[2] = torch.compile(compiled[2], backend="eager")
    compiled(batch()[0])
    found = {name.replace("_orig_mod.", ""): g for name, g in gradients(compiled)[1].items()}
    assert_same(gradients(plain)[1], found, 1e-5)


# --- sums of layers, and copies in chunks ----------------------------------------------------------------------------


@pytest.mark.parametrize("injection", ["layerwise", "joint"])
def test_a_sum_of_layers_has_one_noise(injection):
    """It is injected once, and both layers' gradients have the same score: that of the first layer's name."""
    model, (x, y) = filled(Junction()), batch()
    estimator = ulr.ULR(model, copies=2, antithetic=False, baseline="none", injection=injection, sigma=0.3)
    estimator.backward(x, y, cross_entropy)
    (plan,) = estimator._plans.values()
    assert plan.outline.shared_noise == {"shortcut": "branch"}
    assert len(plan.passes) == (3 if injection == "layerwise" else 1)
    eps = {n: noise(n, (3, k), 2, False, 0, 0) for n, k in (("stem", 4), ("branch", 4), ("head", 3))}
    if injection == "layerwise":
        eps["stem"] = eps["head"] = torch.zeros(2, 1, 1)
    inner = torch.tanh(model.stem(x) + 0.3 * eps["stem"])
    total = model.branch(inner) + model.shortcut(x) + 0.3 * eps["branch"]
    outputs = model.head(torch.tanh(total)) + 0.3 * eps["head"]
    losses = torch.stack([cross_entropy(o, y) for o in outputs]).detach() / 6
    score = losses[..., None] * eps["branch"] / 0.3
    for layer, inputs in ((model.branch, inner), (model.shortcut, x.expand(2, 3, 5))):
        expected = torch.einsum("cbn,cbk->nk", score, inputs.expand(2, 3, -1))
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-4, atol=1e-5)


def test_an_output_that_is_used_elsewhere_has_its_own_noise():
    estimator = ulr.ULR(filled(Junction(seen=True)), copies=2)
    estimator.backward(*batch(), cross_entropy)
    (plan,) = estimator._plans.values()
    assert plan.outline.shared_noise == {}


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("injection", ["layerwise", "joint"])
@pytest.mark.parametrize("make", [mlp, Twice, Junction])
@pytest.mark.parametrize("max_rows", [12, 4])
def test_chunks_give_the_same_gradients(max_rows, make, injection, antithetic):
    """Of the copies, and of the samples where a pair of copies of all three has no room."""
    model, rows = filled(make()), []
    next(iter(model.children())).register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    settings = {"copies": 10, "injection": injection, "antithetic": antithetic}
    loss, whole = gradients(model, **settings)
    rows.clear()
    in_chunks, found = gradients(model, max_rows=max_rows, **settings)
    assert max(rows) <= (max_rows if max_rows > 6 else 6)  # the look at the first batch takes two copies
    torch.testing.assert_close(in_chunks, loss)
    assert_same(whole, found, 1e-5)
