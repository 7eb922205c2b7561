"""The optimisers over a run: what must stay as it was, resuming and replaying, and what is refused."""

from __future__ import annotations

import copy
import functools
import io
import json
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from reader_model import copies, moved, needs, reader, site_noise
from small_models import cross_entropy, filled, modules_may_draw, v  # noqa: F401
from torch import nn

import ulr_kernels as ulr
from ulr_kernels.nn.names import parameter_names
from ulr_kernels.nn.perturbed import WeightDraws
from ulr_kernels.optim import EGGROLL, ES, FZOO, MeZO, Rule

# --- what stays as it was --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_probing_leaves_weights_bitwise_as_they_are(dtype):
    model, tokens, targets = reader()
    model = model.to(dtype)
    # Aliases of the same memory: no parameters of the model, so that the mode lets them through.
    aliases = [p.data for p in model.parameters()]
    before = [a.clone() for a in aliases]
    versions = [p._version for p in model.parameters()]
    clean = model(tokens).detach()
    outputs = []

    def closure():
        out = model(tokens)
        outputs.append(out)
        assert all(torch.equal(a, b) for a, b in zip(aliases, before, strict=True))
        return F.cross_entropy(out.float(), targets)

    optimizer = MeZO(model, eps=3e-2, probes=2)
    optimizer.accumulate(closure)
    assert len(outputs) == 4 and not any(torch.equal(out, clean) for out in outputs)
    assert versions == [p._version for p in model.parameters()]
    assert torch.equal(model(tokens), clean)
    optimizer.step()
    assert versions != [p._version for p in model.parameters()]


def test_frozen_parameters_stay_and_groups_have_their_own_numbers():
    model, tokens, targets = reader()
    model.words.weight.requires_grad_(False)
    groups = [
        {"params": model.body.parameters(), "lr": 0.1, "eps": 1e-2},
        {"params": model.norm.parameters(), "lr": 0.0},
        {"params": [model.scale], "weight_decay": 0.5},
    ]
    start = copies(model)
    optimizer = MeZO(model, lr=0.01, eps=2e-2, params=groups)
    optimizer.step(lambda: F.cross_entropy(model(tokens), targets))
    change = {name: p.detach() - start[name] for name, p in model.named_parameters()}
    still = {name for name, c in change.items() if not c.any()}
    assert still == set(change) - {"body.weight", "body.bias", "scale"}
    slope = optimizer.last_update.coefficients.item()
    z = site_noise(model, 0, 0, 0)
    torch.testing.assert_close(change["body.weight"], -0.1 * slope / 1e-2 * z["body.weight"], rtol=1e-4, atol=1e-6)
    decayed = -0.01 * (slope / 2e-2 * z["scale"] + 0.5 * start["scale"])
    torch.testing.assert_close(change["scale"], decayed, rtol=1e-4, atol=1e-6)


def test_a_group_may_be_empty():
    """As one of those without decay is, where a model has no biases."""
    model, tokens, targets = reader()
    start = copies(model)
    optimizer = MeZO(model, lr=0.1, params=[{"params": []}, {"params": model.body.parameters()}])
    optimizer.step(lambda: F.cross_entropy(model(tokens), targets))
    assert moved(model, start).any()


def test_a_loss_that_overflows_leaves_the_weights():
    model, tokens, _ = reader()
    start = copies(model)
    loss = MeZO(model, lr=0.1).step(lambda: model(tokens).sum() * float("inf"))
    assert not loss.isfinite() and not moved(model, start).any()


# --- a run -----------------------------------------------------------------------------------------------------------

RULES = {"sgd": {}, "momentum": {"momentum": 0.9, "weight_decay": 0.1}, "adam": {"betas": (0.9, 0.99)}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_a_run_resumes_bitwise_from_its_state(rule, dtype):
    def run(model, optimizer, steps):
        for _ in range(steps):
            optimizer.step(lambda: F.cross_entropy(model(tokens).float(), targets))

    model, tokens, targets = reader()
    model.to(dtype)
    settings = {"lr": 1e-2, "eps": 1e-2, "probes": 2, "stochastic": dtype == torch.bfloat16, **RULES[rule]}
    optimizer = MeZO(model, seed=3, **settings)
    run(model, optimizer, 3)
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    run(model, optimizer, 3)
    other = reader()[0].to(dtype)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    other.load_state_dict(state["model"])
    resumed = MeZO(other)
    resumed.load_state_dict(state["optimizer"])
    run(other, resumed, 3)
    assert resumed.steps == 6
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_replayed_updates_rebuild_the_weights_bitwise(rule, device):
    """From the base weights and the updates alone, on any back end."""
    needs(device, "combine_")
    model, tokens, targets = reader()
    optimizer = MeZO(model, lr=1e-2, eps=1e-2, probes=3, **RULES[rule])
    updates = []
    with ulr.use_backend("torch"):
        for _ in range(4):
            optimizer.step(lambda: F.cross_entropy(model(tokens), targets))
            updates.append(optimizer.last_update)
    base = {name: p.to(device) for name, p in copies(reader()[0]).items()}
    state: dict = {}
    for update in updates:
        optimizer.rule.apply(update, base, state)
    for name, p in model.named_parameters():
        assert torch.equal(base[name].cpu(), p), name


def test_gradient_accumulation_is_the_mean_over_micro_batches():
    model, tokens, targets = reader()
    whole, parts = MeZO(model, lr=0.1, eps=1e-2), None
    start = copies(model)
    whole.step(lambda: F.cross_entropy(model(tokens), targets))
    expected = moved(model, start)
    model.load_state_dict(start, strict=False)
    parts = MeZO(model, lr=0.1, eps=1e-2)
    for part in (slice(0, 2), slice(2, 4), slice(4, 6)):
        parts.accumulate(lambda part=part: F.cross_entropy(model(tokens[part]), targets[part]))
    parts.step()
    assert (moved(model, start) - expected).norm() < 2e-3 * expected.norm()
    parts.accumulate(lambda: F.cross_entropy(model(tokens), targets))
    parts.forget()
    with pytest.raises(ValueError, match="'closure' must be given where nothing was accumulated"):
        parts.step()


def test_torch_schedulers_set_the_learning_rate():
    model, tokens, targets = reader()
    optimizer = MeZO(model, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    used = []
    for _ in range(3):
        optimizer.step(lambda: F.cross_entropy(model(tokens), targets))
        scheduler.step()
        used.append(optimizer.last_update.groups[0].lr)
    assert used == pytest.approx([0.1, 0.05, 0.1 / 3])


# --- what is refused -------------------------------------------------------------------------------------------------


def test_errors_name_the_argument():
    model, tokens, targets = reader()
    for make, text in (
        (lambda: MeZO(model, probes=0), "ulr.optim.MeZO: 'probes' must be an integer of at least 1, got 0"),
        (lambda: MeZO(model, eps=0.0), "'eps' must be finite and above 0, got 0.0"),
        (lambda: MeZO(model, lr=-1.0), "'lr' must be finite and at least 0, got -1.0"),
        (lambda: MeZO(model, dist="cauchy"), "'dist' must be one of normal, laplace, rademacher, got 'cauchy'"),
        (lambda: MeZO(model, seed=0.5), "'seed' must be an integer"),
        (lambda: MeZO(model, betas=(0.9, 0.9), momentum=0.5), "'momentum' must be 0 where betas are given, got 0.5"),
        (lambda: MeZO(model, params=[nn.Parameter(torch.ones(2))]), "'params' must be parameters of the model"),
        (lambda: EGGROLL(model, population=5, antithetic=True), "ulr.optim.EGGROLL: 'population' must be even"),
        (lambda: ES(model, shaping="none at all"), "'shaping' must be 'none' or 'zscore' or 'rank' or 'group'"),
        (lambda: EGGROLL(model, rank=0), "'rank' must be an integer above 0, or None, got 0"),
        (lambda: EGGROLL(model, rank=True), "'rank' must be an integer above 0, or None, got True"),
        (lambda: MeZO(model, two_sided="no"), "ulr.optim.MeZO: 'two_sided' must be True or False, got 'no'"),
        (lambda: ES(model, antithetic=0), "'antithetic' must be True or False, got 0"),
        (lambda: EGGROLL(model, maximize=1), "ulr.optim.EGGROLL: 'maximize' must be True or False, got 1"),
        (lambda: FZOO(model, stochastic="bf16"), "ulr.optim.FZOO: 'stochastic' must be True or False, got 'bf16'"),
        (lambda: MeZO(model).step(), "'closure' must be given"),
        (lambda: MeZO(model).step(lambda: model(tokens)), "'closure' must return one loss"),
        (
            lambda: MeZO(model).step_batch(tokens[:0], targets[:0], cross_entropy),
            "ulr.optim.MeZO: 'x' must have at least one sample",
        ),
        (
            lambda: FZOO(model).step_batch(tokens, targets, F.cross_entropy),
            "ulr.optim.FZOO: 'loss_fn' must return one loss per row",
        ),
    ):
        with pytest.raises(ValueError, match=text.replace("(", r"\(").replace("[", r"\[")):
            make()


def test_a_parameter_that_no_function_uses_is_named():
    model, tokens, targets = reader()
    model.unused = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="no function of step 0 has used unused.weight, unused.bias"):
        MeZO(model).step(lambda: F.cross_entropy(model(tokens), targets))


def test_a_forward_that_writes_its_weights_is_refused():
    layer = nn.Linear(3, 3)

    def closure():
        layer.weight.mul_(0.5)
        return layer(torch.ones(1, 3)).sum()

    with pytest.raises(RuntimeError, match="must not write a trained parameter, got mul_"):
        MeZO(layer).step(closure)


def test_functions_of_parameters_alone_are_each_members_own():
    class Shared(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function, self.weight = function, nn.Parameter(torch.ones(3, 3))

        def forward(self, x):
            return x @ self.function(self.weight)

    for function in (lambda w: w * 2.0, lambda w: F.linear(torch.ones(3), w)):
        optimizer = ES(Shared(function), population=8)
        optimizer.accumulate(lambda optimizer=optimizer: optimizer.model(torch.ones(4, 3)).sum())
        one_by_one = optimizer._losses.pop()
        optimizer.accumulate_batch(torch.ones(4, 3), None, lambda out, _: out.reshape(len(out), -1).sum(1) * 4)
        torch.testing.assert_close(optimizer._losses.pop().mean(1, keepdim=True), one_by_one, rtol=1e-5, atol=1e-5)


def test_rows_that_depend_on_one_another_are_refused():
    class Running(nn.Linear):
        def forward(self, x):
            return super().forward(x + x.cumsum(0)).square().sum(1)

    model = filled(Running(3, 2))
    with pytest.raises(ValueError, match="'model' must compute each row from its own inputs"):
        ES(model, population=8).step_batch(v(1, 4, 3), None, lambda out, _: out)


def test_rows_in_another_order_are_refused_however_small_the_noise():
    """If positions come before samples, each row would see the weights of some other member."""

    class SequenceFirst(nn.Linear):
        def forward(self, x):
            rows = super().forward(x.transpose(0, 1).flatten(0, 1))
            return torch.tanh(rows).unflatten(0, (x.shape[1], -1)).sum(0).square().sum(1)

    model = filled(SequenceFirst(3, 8))
    for make in (MeZO, FZOO):
        with pytest.raises(ValueError, match="'model' must compute each row from its own inputs"):
            make(model, eps=1e-3, probes=4).step_batch(v(1, 4, 6, 3), None, lambda out, _: out)


def test_state_of_other_parameters_is_refused():
    model, _, _ = reader()
    with pytest.raises(ValueError, match="'state_dict' must be of the parameters .* got 'weight' in group 0"):
        MeZO(model).load_state_dict(MeZO(nn.Linear(2, 2)).state_dict())
    two = [{"params": [model.body.weight]}, {"params": [model.scale]}]
    with pytest.raises(ValueError, match="here 'scale' in group 0, got 'scale' in group 1"):
        MeZO(model, params=[model.body.weight, model.scale]).load_state_dict(MeZO(model, params=two).state_dict())
    with pytest.raises(ValueError, match="'state_dict' must hold 'two_sided' in 'ulr.settings', got probes"):
        MeZO(model).load_state_dict(FZOO(model).state_dict())
    with pytest.raises(ValueError, match="'state_dict' must be one of an optimiser of ulr.optim"):
        MeZO(model).load_state_dict(torch.optim.SGD(model.parameters()).state_dict())


@pytest.mark.parametrize("part", [("ulr",), ("ulr", "rule"), ("ulr", "settings"), ("param_groups", 0)])
def test_state_with_a_name_more_or_less_is_refused(part):
    """As another version may have written it."""
    model, _, _ = reader()
    optimizer = MeZO(model, seed=3)
    for change in ("more", "less"):
        state = copy.deepcopy(optimizer.state_dict())
        place = functools.reduce(operator.getitem, part, state)
        name = {"ulr": "steps", "rule": "rank", "settings": "probes", 0: "eps"}[part[-1]]
        if change == "less":
            del place[name]
        elif part[-1] != 0:  # torch's schedulers add names to groups
            name = place["nonsense"] = "nonsense"
        else:
            continue
        other = MeZO(model, lr=0.5)
        other.load_state_dict(other.state_dict())  # torch takes this for the time to add its own names
        with pytest.raises(ValueError, match=f"ulr.optim.MeZO: 'state_dict' must hold .*'?{name}'?"):
            other.load_state_dict(state)
        assert other.seed == 0 and other.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("ulr", "seed"), "3", r"'seed' must be an integer in \[-2\^63, 2\^64\), got '3'"),
        (("ulr", "steps"), -1, "'steps' must be an integer of at least 0, got -1"),
        (("ulr", "settings", "probes"), -3, "'probes' must be an integer of at least 1, got -3"),
        (("ulr", "settings", "two_sided"), "no", "'two_sided' must be True or False, got 'no'"),
        (("ulr", "settings"), None, "'state_dict' must hold a dict as 'ulr.settings', got NoneType"),
        (("ulr", "rule", "stochastic"), 1, "'stochastic' must be True or False, got 1"),
        (("ulr", "rule", "betas"), (0.9, "0.9"), "'betas' must be two numbers"),
        (("ulr", "rule", "adam_eps"), None, "'adam_eps' must be finite and at least 0, got None"),
        (("ulr", "rule", "names"), 3, "'state_dict' must hold a rule of this optimiser"),
        (("param_groups", 0, "lr"), "0.1", "'lr' must be finite and at least 0, got '0.1'"),
        (("param_groups", 0, "eps"), 0.0, "'eps' must be finite and above 0, got 0.0"),
        (("state", 0, "exp_avg"), torch.zeros(1), r"'exp_avg' in 'state\[0\]', got torch.float32 \[1\]"),
        (("state", 0), {"step": torch.zeros(())}, r"'state_dict' must hold 'exp_avg' in 'state\[0\]', got step"),
        (("state", 99), {}, "'state_dict' must number parameters from 0 to .*, got 99"),
    ],
    ids=str,
)
def test_a_state_with_a_value_that_breaks_its_rule_changes_nothing(place, value, message):
    model, tokens, targets = reader()
    optimizer = MeZO(model, betas=(0.9, 0.99), seed=3)
    optimizer.step(lambda: F.cross_entropy(model(tokens), targets))
    state = copy.deepcopy(optimizer.state_dict())
    functools.reduce(operator.getitem, place[:-1], state)[place[-1]] = value
    other = MeZO(model, lr=0.5)
    before = other.state_dict()
    with pytest.raises(ValueError, match=f"^ulr.optim.*{message}"):
        other.load_state_dict(state)
    assert other.state_dict() == before


def test_a_state_comes_back_from_json():
    model, tokens, targets = reader()
    optimizer = MeZO(model, lr=1e-2, probes=2, seed=3, params=[model.body.weight, model.scale])
    optimizer.step(lambda: F.cross_entropy(model(tokens), targets))
    resumed = MeZO(model, params=[model.body.weight, model.scale])
    resumed.load_state_dict(json.loads(json.dumps(optimizer.state_dict())))
    assert resumed.state_dict() == optimizer.state_dict()


def test_a_copied_optimiser_goes_on_with_its_own_model():
    model, tokens, targets = reader()
    optimizer = MeZO(model, lr=1e-2, probes=2, momentum=0.5)
    optimizer.step(lambda: F.cross_entropy(model(tokens), targets))
    start = copies(model)
    others = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    for other, its in others:
        its.step(lambda other=other: F.cross_entropy(other(tokens), targets))
    assert not moved(model, start).any()
    optimizer.step(lambda: F.cross_entropy(model(tokens), targets))
    for other, _ in others:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


BEYOND = [{"lr": 1e39}, {"eps": 1e-46}, {"eps": 1e39}, {"lr": 1e30, "eps": 1e-20}, {"weight_decay": 1e39}]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("numbers", BEYOND, ids=str)
def test_numbers_beyond_fp32_are_refused_before_anything_is_evaluated(numbers, rule):
    model, _, _ = reader()
    first = MeZO(model, lr=0.1, params=[model.body.weight], **RULES[rule])
    with pytest.raises(ValueError, match="ulr.optim: '.*' must be finite in fp32, got Group"):
        first.add_param_group({"params": [model.scale], **numbers})


def test_an_estimate_that_overflows_in_one_group_leaves_them_all():
    model, tokens, targets = reader()
    start = copies(model)
    groups = [{"params": [model.body.weight]}, {"params": [model.scale], "lr": 1e3}]
    optimizer = MeZO(model, lr=1e-2, params=groups)
    optimizer.step(lambda: F.cross_entropy(model(tokens), targets) * 3e37)
    assert not moved(model, start).any() and not optimizer.last_update.coefficients.any()


def test_random_rounding_of_fp16_is_refused_at_once():
    model, _, _ = reader()
    with pytest.raises(ValueError, match="'stochastic' must be False for float16, got True for body.weight"):
        MeZO(model, stochastic=True, params=[model.scale, model.body.half().weight])


def test_an_unknown_argument_is_the_optimisers():
    with pytest.raises(TypeError, match="ulr.optim.MeZO: got an unexpected argument 'momentun'"):
        MeZO(nn.Linear(2, 2), momentun=0.9)


def test_a_group_that_is_refused_leaves_no_trace():
    model, tokens, targets = reader()
    optimizer = MeZO(model, params=model.body.parameters())
    for bad, message in (
        ({"params": nn.Linear(2, 2).parameters()}, "'params' must be parameters of the model"),
        ({"params": model.norm.parameters(), "eps": 0.0}, "'eps' must be finite and above 0"),
        ({"params": model.norm.parameters(), "lr": None}, "'lr' must be finite and at least 0, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(bad)
    optimizer.step(lambda: F.cross_entropy(model(tokens), targets))
    assert optimizer.rule.names == (("body.weight", "body.bias"),)


@pytest.mark.parametrize("number, value", [("lr", float("inf")), ("eps", 0.0), ("weight_decay", -0.1)])
def test_numbers_that_were_spoilt_later_are_refused_before_anything_is_written(number, value):
    model, tokens, targets = reader()
    optimizer = MeZO(model, lr=0.1, params=[{"params": [p]} for p in (model.body.weight, model.scale)])
    start = copies(model)
    optimizer.param_groups[1][number] = value
    with pytest.raises(ValueError, match=f"ulr.optim.MeZO: '{number}' must be finite and .*, got {value}"):
        optimizer.step(lambda: F.cross_entropy(model(tokens), targets))
    assert not moved(model, start).any() and not optimizer._losses


@pytest.mark.parametrize("chunk", [0, -2, 1.5])
def test_a_chunk_is_a_number_of_probes(chunk):
    model, tokens, targets = reader()
    with pytest.raises(ValueError, match="'chunk' must be an integer of at least 1"):
        MeZO(model).step_batch(tokens, targets, cross_entropy, chunk)


def test_names_are_those_of_the_contract():
    model, _, _ = reader()
    rule = MeZO(torch.nn.DataParallel(model)).rule
    assert isinstance(rule, Rule) and rule.names == (tuple(parameter_names(model).values()),)
    assert "head.weight" not in rule.names[0] and "words.weight" in rule.names[0]


def test_mode_lets_questions_through():
    layer = nn.Linear(3, 2)
    with MeZO(layer)._perturbed(WeightDraws(), 1) as perturbed:
        assert layer.weight.shape == (2, 3) and layer.weight.dtype == torch.float32 and layer.weight.dim() == 2
        assert not perturbed.used
