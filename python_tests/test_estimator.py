"""ulr.ULR: what it computes, how it meets models, and what it leaves alone. Unbiasedness is in test_unbiased.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ulr_kernels as ulr
from ulr_kernels.contract import site_id
from ulr_kernels.ops._linear import values

CPU = {"device": "cpu", "dtype": torch.float32}


@pytest.fixture(autouse=True)
def modules_may_draw():
    """torch's modules fill themselves from the global generator; put it back (test_nothing_else_changes watches it)."""
    with torch.random.fork_rng(devices=[]):
        yield


def cross_entropy(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


def squares(outputs, targets):
    return (outputs - targets).square().flatten(1).mean(1)


def filled(model, seed=0):
    """Reproducible parameters that do not touch torch's generators."""
    for index, parameter in enumerate(model.parameters()):
        parameter.data.copy_(0.5 * values(seed + index, *parameter.shape, **CPU))
    return model


def mlp():
    return filled(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)))


def batch(samples=3, *shape, classes=3):
    return values(99, samples, *(shape or (5,)), **CPU), torch.arange(samples) % classes


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
    targets = values(3, 2, 3, 4, **CPU)
    _, found = gradients(
        model, copies=2, antithetic=False, baseline="none", batch=(x, targets), loss_fn=squares, sigma=0.5
    )
    eps = noise("0", (6, 4), 2, False, 0, 0).view(2, 2, 3, 4)
    losses = torch.stack([squares(layer(x) + 0.5 * e, targets) for e in eps]).detach()
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


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        h = h + torch.tanh(self.branch(h))
        return self.head(h)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.core, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.core(torch.tanh(self.core(torch.tanh(self.stem(x)))))))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(5, 5), nn.Linear(5, 5)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(torch.tanh(self.encode(x)))


class SizeReader(nn.Module):
    """Reads the batch size before the noise; `late` uses it afterwards too."""

    def __init__(self, late):
        super().__init__()
        self.first, self.second, self.late = nn.Linear(5, 4), nn.Linear(4, 3), late

    def forward(self, x):
        rows = x.size(0)
        h = torch.tanh(self.first(x.view(rows, -1)))
        return self.second(h.view(rows, 4) if self.late else h.flatten(1))


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
        (Residual, {"stem": True, "branch": False, "head": True}),
        (Twice, {"stem": True, "core": True, "head": True}),
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
        assert {item.layers[0]: item.cut for item in plan.passes} == cuts
    else:
        assert [item.cut for item in plan.passes] == [next(iter(cuts.values()))]
    by_cutting = {name: p.grad for name, p in model.named_parameters()}
    monkeypatch.setattr(ulr.ULR, "_can_cut", lambda *_: False)
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
    first = noise("core", (3, 4), 2, False, 0, 0)
    key = ulr.fold_in(ulr.fold_in(ulr.fold_in(0, 0), site_id("core")), 1)
    second = torch.stack([ulr.noise((3, 4), key, draw=c) for c in range(2)])
    start = torch.tanh(model.stem(x))
    middle = torch.tanh(model.core(start) + 0.3 * first)
    outputs = model.head(torch.tanh(model.core(middle) + 0.3 * second))
    losses = torch.stack([cross_entropy(o, y) for o in outputs]).detach() / 6
    expected = torch.einsum("cb,cbn,bk->nk", losses, first, start) + torch.einsum(
        "cb,cbn,cbk->nk", losses, second, middle
    )
    torch.testing.assert_close(found["core.weight"], expected / 0.3, rtol=1e-4, atol=1e-5)


def test_tied_weights_are_one_layer():
    model = filled(Tied())
    targets = values(3, 3, 5, **CPU)
    estimator = ulr.ULR(model, copies=4, sigma={"encode": 0.1}, learn_sigma=False)
    with pytest.raises(ValueError, match="'sigma' must name layers of the model"):
        ulr.ULR(model, sigma={"encode.weight": 0.1})
    estimator.backward(batch()[0], targets, squares)
    (plan,) = estimator._plans.values()
    assert plan.layers == ("encode",)
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_inputs_may_be_tuples_and_dicts():
    a, b, scale = values(1, 3, 5, **CPU), values(2, 3, 2, **CPU), 0.7
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


# --- what it leaves alone --------------------------------------------------------------------------------------------


def test_training_goes_on_as_with_backward():
    """Accumulation, clipping and optimisers see ordinary gradients."""
    model, (x, y) = mlp(), batch(8)
    _, one = gradients(model)
    estimator = ulr.ULR(model, copies=4)
    estimator.backward(*batch(), cross_entropy)
    assert_same({n: 2 * g for n, g in one.items()}, {n: p.grad for n, p in model.named_parameters()}, 1e-5)

    for make in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop):
        model = mlp()
        estimator, optimizer = ulr.ULR(model, copies=8), make(model.parameters(), lr=0.05)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            losses.append(estimator.backward(x, y, cross_entropy).item())
            assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 0
            optimizer.step()
        assert losses[-1] < losses[0] - 0.02, make


def test_a_step_is_a_function_of_seed_step_and_batch():
    model = mlp()
    _, first = gradients(model, seed=-3)
    assert_same(first, gradients(model, seed=-3)[1], 0)
    assert not torch.equal(first["0.weight"], gradients(model, seed=4)[1]["0.weight"])

    estimator = ulr.ULR(model, copies=4, seed=-3)
    estimator.backward(*batch(), cross_entropy)
    model.zero_grad()
    estimator.backward(*batch(), cross_entropy)
    second = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert not torch.equal(first["0.weight"], second["0.weight"])

    resumed = ulr.ULR(model, sigma=0.7, copies=2, seed=9)
    resumed.load_state_dict({**estimator.state_dict(), "step": 1})
    model.zero_grad()
    resumed.backward(*batch(), cross_entropy)
    assert_same(second, {name: p.grad for name, p in model.named_parameters()}, 0)
    assert resumed.state_dict() == estimator.state_dict()


def test_nothing_else_changes():
    model = nn.Sequential(mlp(), nn.BatchNorm1d(3, affine=False), nn.Dropout(0.5))
    model[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    generator = torch.get_rng_state()
    x, y = batch()
    x_before = x.clone()
    gradients(model, batch=(x, y))

    def broken(outputs, targets):
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        gradients(model, loss_fn=broken)
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(x, x_before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(not p.grad.requires_grad and p.grad.grad_fn is None for p in model.parameters() if p.grad is not None)
    assert torch.is_grad_enabled()


def test_inference_mode():
    model = mlp()
    _, expected = gradients(model)
    with torch.inference_mode():
        _, found = gradients(model, batch=batch())
    assert_same(expected, found, 0)


def test_no_graph_is_built():
    """Losses that autograd would track: nothing in a pass requires a gradient."""
    seen = []
    model, w = mlp(), torch.ones(3, requires_grad=True)

    def loss_fn(outputs, targets):
        seen.append(outputs.requires_grad or (outputs @ w).requires_grad)
        return outputs @ w

    gradients(model, loss_fn=loss_fn)
    assert seen and not any(seen)
    assert w.grad is None


# --- learnt sigma ----------------------------------------------------------------------------------------------------


def test_learnt_sigma_has_a_parameter_per_feature():
    model, (x, y) = mlp(), batch()
    estimator = ulr.ULR(model, sigma={"0": 0.2, "2": 0.4}, copies=4, learn_sigma=True)
    assert [tuple(p.shape) for p in estimator.parameters()] == [(4,), (3,)]
    estimator.backward(x, y, cross_entropy)
    assert all(p.grad.abs().sum() > 0 for p in estimator.parameters())
    torch.optim.SGD(estimator.parameters(), lr=0.1).step()
    assert not torch.allclose(estimator.sigma("0"), torch.tensor(0.2))

    other = ulr.ULR(model, copies=4, learn_sigma=True)
    other.load_state_dict(estimator.state_dict())
    assert torch.equal(other.sigma("2"), estimator.sigma("2"))
    with pytest.raises(ValueError, match="'state' must hold ln sigma"):
        other.load_state_dict({**estimator.state_dict(), "log_sigma": {}})
    assert ulr.ULR(model).parameters() == []


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sigma": 0.0}, "'sigma' must be a finite number above 0.*got 0.0"),
        ({"sigma": float("nan")}, "'sigma' must be a finite number"),
        ({"sigma": {"0": -1}}, "'sigma' must be a finite number"),
        ({"sigma": {"9": 1.0}}, r"'sigma' must name layers of the model \(0, 2\), got 9"),
        ({"sigma": {"0": 1.0}}, "'sigma' must have an entry for every trained layer, also for '2'"),
        ({"copies": 0}, "'copies' must be an integer above 0.*got 0"),
        ({"copies": 2.0}, "'copies' must be an integer"),
        ({"copies": 5}, "'copies' must be even where antithetic is True, got 5"),
        ({"copies": {"0": 4, "1": 2}}, "'copies' must name layers"),
        ({"copies": {"0": 4, "2": 4}, "injection": "joint"}, "'copies' must be one number where injection is 'joint'"),
        ({"antithetic": 1}, "'antithetic' must be True or False"),
        ({"injection": "both"}, "'injection' must be 'layerwise' or 'joint', got 'both'"),
        ({"noise": "weights"}, "'noise' must be 'logits', got 'weights'"),
        ({"dist": "uniform"}, "'dist' must be 'normal' or 'laplace' or 'rademacher'"),
        ({"sampler": "halton"}, "'sampler' must be 'iid' or 'sobol'"),
        ({"baseline": "median"}, "'baseline' must be 'mean' or 'clean' or 'none'"),
        ({"dist": "rademacher", "learn_sigma": True}, "'learn_sigma' must be False where dist is 'rademacher'"),
        ({"dist": "rademacher", "sampler": "sobol"}, "'sampler' must be 'iid' where dist is 'rademacher'"),
        ({"sampler": "sobol", "antithetic": False}, "'baseline' must be 'clean' .or antithetic=True. where sampler is"),
        ({"sampler": "sobol", "learn_sigma": True}, "'baseline' must be 'clean' where sampler is 'sobol' and sigma is"),
        (
            {"sampler": "sobol", "injection": "joint"},
            "'baseline' must be 'clean' where sampler is 'sobol' and injection",
        ),
        ({"seed": 2**64}, r"must be in \[-2\^63, 2\^64\)"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        gradients(mlp(), **settings)


def test_sobol_refuses_a_mean_for_a_layer_called_twice():
    with pytest.raises(ValueError, match="a layer is called twice"):
        gradients(filled(Twice()), sampler="sobol")


X, Y = batch()


@pytest.mark.parametrize(
    "x, y, loss_fn, message",
    [
        (X[:0], Y[:0], cross_entropy, "'x' must have at least one sample"),
        (X, Y[:2], cross_entropy, r"'y' must have 3 samples on the first axis, got \[2\]"),
        (X, torch.tensor(1), cross_entropy, "'y' must hold tensors with samples on the first axis"),
        ([1, 2], Y, cross_entropy, "'x' must be or hold a tensor"),
        (X, Y, F.cross_entropy, r"'loss_fn' must return one loss per row, \[6\] here .*, got \[\]"),
        (X, Y, lambda o, t: o, r"'loss_fn' must return one loss per row, \[6\] here .*, got \[6, 3\]"),
        (X, Y, lambda o, t: 1.0, "'loss_fn' must return one loss per row.*got float"),
        (X, Y, lambda o, t: (o - o.cumsum(0)).sum(1), "the loss.* must have the samples on its first axis"),
        (X.double(), Y, cross_entropy, "same dtype"),
    ],
)
def test_batches_and_losses_are_checked(x, y, loss_fn, message):
    model = mlp()
    with pytest.raises((ValueError, RuntimeError), match=message):
        ulr.ULR(model, copies=4).backward(x, y, loss_fn)
    assert all(p.grad is None for p in model.parameters())


class Unreachable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.unused = nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(2, 2)
        self.table = nn.Embedding(3, 5)

    def forward(self, x):
        return self.norm(self.fc(x)) @ self.table.weight[:, :3] + self.fc.weight.norm()


def test_unreachable_parameters_are_named():
    with pytest.raises(ValueError) as error:
        gradients(Unreachable())
    for text in (
        "fc.weight (used by norm)",
        "norm.weight (used by layer_norm)",
        "table.weight (used by __getitem__)",
        "unused.bias (met in no call)",
        "requires_grad_(False)",
    ):
        assert text in str(error.value)
    assert "fc.bias" not in str(error.value)


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


class RandomScale(nn.Module):
    def forward(self, x):
        return x * torch.rand(x.shape, generator=torch.Generator().manual_seed(1))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        x += torch.tanh(self.fc(x))
        return self.head(x)


def test_inputs_modified_in_place():
    """As in autograd, the input of a layer is needed after the forward; the caller's tensor is never modified."""
    x, y = batch()
    before = x.clone()
    with pytest.raises(RuntimeError, match="must not be modified in place after the layer has read it"):
        gradients(filled(InPlace()), batch=(x, y))
    assert torch.equal(x, before)
