"""ulr.ULR: what it leaves alone, how a run goes on, the learnt sigma, and the errors of bad input."""

import functools

import pytest
import small_models
import torch
import torch.nn.functional as F
from small_models import (
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
from ulr_kernels.noise_contract import site_id

modules_may_draw = small_models.modules_may_draw  # used by every test of this file

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
    model[:2].eval()  # in train mode the running statistics follow the batches: test_running_statistics.py
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
    """Losses that autograd would track: no output requires a gradient, and no graph outlives a step."""
    seen = []
    model, w = mlp(), torch.ones(3, requires_grad=True)

    def loss_fn(outputs, targets):
        seen.append(outputs.requires_grad)
        return outputs @ w

    mean, _ = gradients(model, loss_fn=loss_fn)
    assert seen and not any(seen) and not mean.requires_grad
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
    with pytest.raises(ValueError, match="'state' must be that of an estimator, got none with seed, step"):
        other.load_state_dict(torch.optim.SGD(other.view.parameters).state_dict())
    assert ulr.ULR(model).parameters() == []


def test_learnt_sigma_of_a_table_that_is_also_a_head_is_one_number():
    """Its calls have outputs of different features."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.words.weight

        def forward(self, tokens):
            return self.head(self.words(tokens).mean(1))

    estimator = ulr.ULR(filled(Tied()), copies=4, learn_sigma=True)
    estimator.backward(torch.arange(6).view(3, 2), torch.arange(3), cross_entropy)
    (log_sigma,) = estimator.parameters()
    assert log_sigma.shape == () and log_sigma.grad != 0


def test_a_bias_beside_a_tied_weight_has_its_layers_sigma():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    estimator = ulr.ULR(filled(Tied()), copies=4, learn_sigma=True)
    estimator.backward(*batch(classes=5), cross_entropy)
    (log_sigma,) = estimator.parameters()
    assert log_sigma.shape == (5,) and log_sigma.grad.all()


def test_learnt_sigma_of_a_weight_that_is_also_used_transposed():
    class Mirrored(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):
            return F.linear(torch.tanh(self.layer(x)), self.layer.weight.T)

    with pytest.raises(ValueError, match="'learn_sigma' must be False where .* those of 'layer', got 3 and 5"):
        gradients(filled(Mirrored()), learn_sigma=True)
    gradients(filled(Mirrored()))


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
        ({"copies": 5, "antithetic": True}, "'copies' must be even where antithetic is True, got 5"),
        ({"copies": {"0": 4, "1": 2}}, "'copies' must name layers"),
        ({"copies": {"0": 4, "2": 4}, "injection": "joint"}, "'copies' must be one number where injection is 'joint'"),
        ({"antithetic": 1}, "'antithetic' must be True or False"),
        ({"max_rows": 0}, "'max_rows' must be None or an integer above 0, got 0"),
        ({"max_rows": 1, "antithetic": True}, "'max_rows' must have room for a pair of copies of a sample .*, got 1"),
        ({"memory": "disk"}, "'memory' must be 'keep' or 'recompute', got 'disk'"),
        ({"injection": "both"}, "'injection' must be 'layerwise' or 'joint', got 'both'"),
        ({"noise": "inputs"}, "'noise' must be 'outputs' or 'weights', or a mapping .*got 'inputs'"),
        ({"noise": {"0": "both"}}, "'noise' must be 'outputs' or 'weights', or a mapping .*got 'both'"),
        ({"noise": {"0.bias": "weights"}}, r"'noise' must name layers of the model \(0, 2\), got 0.bias"),
        ({"noise": "weights", "learn_sigma": True}, "'learn_sigma' must be False where noise is 'weights'"),
        (
            {"noise": {"0": "weights"}, "sampler": "sobol", "antithetic": True},
            "'sampler' must be 'iid', 'hadamard' or 'auto' where noise is 'weights'",
        ),
        ({"dist": "uniform"}, "'dist' must be 'normal' or 'laplace' or 'rademacher'"),
        ({"sampler": "halton"}, "'sampler' must be 'iid' or 'sobol' or 'hadamard' or 'auto'"),
        ({"baseline": "median"}, "'baseline' must be 'mean' or 'clean' or 'none'"),
        ({"dist": "rademacher", "learn_sigma": True}, "'learn_sigma' must be False where dist is 'rademacher'"),
        (
            {"dist": "rademacher", "sampler": "sobol"},
            "'sampler' must be 'iid', 'hadamard' or 'auto' where dist is 'rademacher'",
        ),
        ({"sampler": "sobol", "antithetic": False}, "'baseline' must be 'clean' .or antithetic=True. where sampler is"),
        (
            {"sampler": "sobol", "learn_sigma": True, "antithetic": True},
            "'baseline' must be 'clean' where sampler is 'sobol' and sigma is",
        ),
        (
            {"sampler": "sobol", "injection": "joint", "antithetic": True},
            "'baseline' must be 'clean' where sampler is 'sobol' and injection",
        ),
        ({"seed": 2**64}, r"must be an integer in \[-2\^63, 2\^64\)"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        gradients(mlp(), **settings)


@pytest.mark.parametrize("make", [ulr.ULR, functools.partial(ulr.optim.MeZO, lr=1e-3)])
def test_parameters_are_no_model(make):
    """Torch's optimisers take them."""
    with pytest.raises(ValueError, match="'model' must be a torch.nn.Module, got generator"):
        make(mlp().parameters())


def test_sobol_refuses_a_mean_for_a_layer_called_twice():
    with pytest.raises(ValueError, match="a layer is called twice"):
        gradients(filled(Twice()), sampler="sobol", antithetic=True)


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
        self.fc, self.lstm, self.unused = nn.Linear(5, 4), nn.LSTM(4, 3, batch_first=True), nn.Linear(2, 2)
        self.threshold, self.start = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        steps = nn.utils.rnn.pack_padded_sequence(self.fc(x)[:, None], torch.ones(len(x)), batch_first=True)
        h = self.lstm(steps)[0].data
        h[:, 0] = self.start[0]
        return (h > self.threshold).float()


def test_unreachable_parameters_are_named():
    with pytest.raises(ValueError) as error:
        gradients(Unreachable())
    for text in (
        "lstm.weight_ih_l0 (used by lstm)",
        "threshold (used by lt)",
        "start (used by __setitem__)",
        "unused.bias (read by no function of the forward",
        "frozen (requires_grad_(False))",
        "noise on the weights",
        "left out of the model",
    ):
        assert text in str(error.value)
    assert "fc." not in str(error.value)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_parametrised_weights(learn_sigma):
    """A normalised weight is no parameter, but computed from two: both get what autograd takes back to them."""
    model = filled(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    _, found = gradients(model, learn_sigma=learn_sigma)
    assert set(found) == {"0.bias"}
    model.requires_grad_(True)
    _, found = gradients(model, learn_sigma=learn_sigma, antithetic=True)
    name = "0.parametrizations.weight.original1"  # the first in the call; the layer's name, and so its key's
    weight = model[0].weight
    x, y = batch()
    eps = torch.stack([ulr.noise((3, 3), ulr.fold_in(ulr.fold_in(0, 0), site_id(name)), draw=c) for c in range(2)])
    eps = torch.cat([eps, -eps])
    losses = torch.stack([cross_entropy(F.linear(x, weight, model[0].bias) + 0.1 * e, y) for e in eps]).detach()
    score = torch.einsum("cb,cbn->bn", losses / 12, eps) / 0.1
    parameters = [p for n, p in model.named_parameters() if n != "0.bias"]
    expected = torch.autograd.grad(weight, parameters, score.T @ x)
    for name, want in zip([n for n in found if n != "0.bias"], expected, strict=True):
        torch.testing.assert_close(found[name], want, rtol=1e-4, atol=1e-4)


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


# --- an error writes nothing -----------------------------------------------------------------------------------------


def assert_no_gradient(model: nn.Module) -> None:
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_mapping_without_every_layer_is_refused_before_any_gradient():
    model = mlp()
    with pytest.raises(ValueError, match="'copies' must have an entry for every trained layer"):
        ulr.ULR(model, copies={"0": 4}).backward(*batch(), cross_entropy)
    assert_no_gradient(model)


def test_a_mapping_may_name_modules():
    """The closest name counts."""
    inner = filled(nn.Sequential(mlp(), nn.Linear(3, 3)))
    by_module = {"copies": {"0": 8, "": 4}, "sigma": {"0": 0.2, "0.2": 0.3, "": 0.1}}
    by_layer = {"copies": {"0.0": 8, "0.2": 8, "1": 4}, "sigma": {"0.0": 0.2, "0.2": 0.3, "1": 0.1}}
    assert_same(gradients(inner, **by_module)[1], gradients(inner, **by_layer)[1], 0)
    noise = {"0.0": "weights", "0.2": "weights"}
    assert_same(gradients(inner, noise={"0": "weights"})[1], gradients(inner, noise=noise)[1], 0)
    with pytest.raises(ValueError, match=r"'copies' must have an entry for every trained layer, also for '1' \(''"):
        gradients(inner, copies={"0": 8})


def test_an_input_modified_after_it_was_read_is_refused_before_any_gradient():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = filled(nn.Linear(4, 4)), filled(nn.Linear(4, 3))

        def forward(self, x):
            h = self.a(x)
            z = self.b(h)
            h.add_(1)
            return z

    for injection in ("layerwise", "joint"):
        model = InPlace()
        with pytest.raises(RuntimeError, match="must not be modified in place"):
            ulr.ULR(model, copies=4, injection=injection).backward(
                torch.ones(5, 4), torch.zeros(5).long(), cross_entropy
            )
        assert_no_gradient(model)


def test_a_replaced_parameter_is_noticed():
    model = mlp()
    estimator = ulr.ULR(model, copies=4)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    with pytest.raises(ValueError, match="'model' must have the parameters that it had"):
        estimator.backward(*batch(), cross_entropy)
    assert_no_gradient(model)


def test_a_state_of_other_shapes_changes_nothing():
    wide, narrow = (nn.Sequential(filled(nn.Linear(4, n))) for n in (8, 6))
    estimator = ulr.ULR(narrow, learn_sigma=True, seed=3)
    state = ulr.ULR(wide, learn_sigma=True, seed=5).state_dict()
    with pytest.raises(
        ValueError, match=r"'state' must hold ln sigma of the shapes \{'0': \[6\]\}, got \{'0': \[8\]\}"
    ):
        estimator.load_state_dict(state)
    assert estimator.seed == 3


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("step", -1, r"'step' must be an integer in \[0, 2\^63\), got -1"),
        ("step", 1.0, "'step' must be an integer .*, got 1.0"),
        ("step", 2**63, "'step' must be an integer .*, got 9223372036854775808"),
        ("seed", "3", r"'seed' must be an integer in \[-2\^63, 2\^64\), got '3'"),
        ("seed", None, "'seed' must be an integer .*, got None"),
        ("settings", [], "'state' must hold a dict as 'settings', got list"),
        ("settings", {"copies": 3, "antithetic": True}, "'copies' must be even where antithetic is True, got 3"),
        ("settings", {"speed": 3}, "'state' must hold an estimator's settings, got .*'speed'"),
        ("log_sigma", None, "'state' must hold a dict as 'log_sigma', got NoneType"),
        ("log_sigma", {"0": [0.0] * 6}, r"'state' must hold ln sigma of the shapes .*, got \{'0': 'list'\}"),
    ],
)
def test_a_state_with_a_value_that_breaks_its_rule_changes_nothing(name, value, message):
    estimator = ulr.ULR(nn.Sequential(filled(nn.Linear(4, 6))), learn_sigma=True, seed=3)
    estimator.step = 2
    before = estimator.state_dict()
    state = ulr.ULR(nn.Sequential(filled(nn.Linear(4, 6))), learn_sigma=True, sigma=0.3, copies=8).state_dict()
    with pytest.raises(ValueError, match=f"^ulr.ULR: {message}"):
        estimator.load_state_dict({**state, name: value})
    after = estimator.state_dict()
    assert torch.equal(after.pop("log_sigma")["0"], before.pop("log_sigma")["0"])
    assert after == before


def test_a_step_is_set_to_a_number_from_0():
    estimator = ulr.ULR(nn.Sequential(filled(nn.Linear(4, 6))))
    with pytest.raises(ValueError, match="'step' must be an integer in .*, got -2"):
        estimator.step = -2
    assert estimator.step == 0


def test_functions_of_other_tensors_pass_by():
    """Products without a parameter, keyword forms, and biases that torch broadcasts are no layers."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = filled(nn.Linear(4, 3))
            self.register_buffer("shift", torch.tensor(5.0))

        def forward(self, x):
            x = torch.matmul(input=x, other=torch.eye(4)) + torch.matmul(x, other=torch.eye(4))
            return F.linear(self.layer(x), torch.eye(3), self.shift)

    model = Odd()
    x, y = torch.ones(5, 4), torch.zeros(5, dtype=torch.long)
    loss = ulr.ULR(model, sigma=1e-3, copies=4).backward(x, y, lambda out, target: out[:, 0])
    assert abs(loss.item() - model(x)[:, 0].mean().item()) < 0.01


def test_empty_tensors_are_not_taken_for_one_another():
    """A mask that selects no sample is empty, and so is a buffer: the shift that this joins comes from no sample."""

    class Selects(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.shift = nn.Linear(5, 3), nn.Parameter(torch.empty(3))
            self.register_buffer("more", torch.zeros(0))

        def forward(self, x):
            assert not len(x[x > 100])
            return self.layer(x) + torch.cat((self.shift, self.more))

    model, (x, y) = filled(Selects()), batch(5)
    report = ulr.check(model, x, y, cross_entropy, sigma=0.01, copies=32, steps=24)
    assert report.ok, report


def test_settings_among_the_inputs_are_part_of_what_was_looked_at():
    """A model that does something else for another flag or number has other layers."""

    class Switched(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x, both):
            return self.first(x) + torch.tanh(self.second(x)) if both else self.first(x).relu() + 0 * self.second(x)

    model, (x, y) = filled(Switched()), batch()
    used = ulr.ULR(model, copies=4, seed=3)
    used.backward((x, False), y, cross_entropy)
    model.zero_grad()
    used.step = 0
    used.backward((x, True), y, cross_entropy)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    _, expected = gradients(model, batch=((x, True), y), seed=3)
    assert_same(expected, found, 0)
    assert len(used._plans) == 2


def test_shapes_that_come_again_cost_no_forward():
    """Texts of a hundred lengths, as in the second epoch."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 3), nn.Linear(3, 2)

        def forward(self, x):
            forwards.append(len(x))
            return self.second(self.first(x).relu()).sum(1)

    forwards: list[int] = []
    model = filled(Counting())
    estimator = ulr.ULR(model, copies=2, seed=3, injection="joint")
    for _ in range(2):
        forwards.clear()
        for length in range(1, 100):
            estimator.backward(v(length, 2, length, 5), torch.tensor([0, 1]), cross_entropy)
    assert 99 <= len(forwards) <= 110  # and a look or two whether samples mix


def test_constants_with_a_row_for_each_sample_are_refused():
    """The gradient of one copy could not tell which of their rows are its own."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.gain = nn.Linear(5, 3), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return torch.addcmul(torch.zeros(len(x), 3), self.layer(x), self.gain)

    model = filled(Padded())
    with pytest.raises(ValueError, match=r"got gain \(used by addcmul, not sample by sample\)"):
        gradients(model)
    assert_no_gradient(model)


def test_an_embedding_scaled_by_frequency_is_refused():
    table, indices = nn.Embedding(6, 3, scale_grad_by_freq=True), torch.arange(4)
    with pytest.raises(ValueError, match="must have scale_grad_by_freq=False"):
        gradients(table, batch=(indices, indices % 3))
    assert_no_gradient(table)


def test_transformers_padding_in_eval_mode():
    """Unwatched and without gradients torch's encoder drops padded positions; with them, it computes them."""
    layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
    encoder = filled(nn.TransformerEncoder(layer, 1), 0.7).eval()
    x, padding = v(1, 2, 3, 4), torch.tensor([[False, False, True], [False, True, True]])
    inputs = {"src": x, "src_key_padding_mask": padding}
    target = v(2, 2, 3, 4)
    report = ulr.check(encoder, inputs, target, half_squares, sigma=0.01, copies=32, steps=16)
    assert report.ok, report
