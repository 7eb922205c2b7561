"""Models and closures for which a step could be wrong without a word: it is right, or it is refused.

The right values come from weights that are moved by hand with the same noise.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import json
import random
import warnings

import numpy
import pytest
import torch
import torch.nn.functional as F
from reader_model import copies
from small_models import cross_entropy, filled, modules_may_draw, v  # noqa: F401
from torch import Tensor, nn

import ulr_kernels as ulr
from ulr_kernels import noise_contract
from ulr_kernels.optim import EGGROLL, ES, FZOO, MeZO

EPS = 1e-2


def at(model: nn.Module, draw: int, scale: float, names=None, step: int = 0) -> nn.Module:
    """A copy of the model whose weights are moved by hand."""
    moved = copy.deepcopy(model)
    for name, p in moved.named_parameters():
        if p.requires_grad and (names is None or name in names):
            key = torch.tensor([ulr.fold_in(ulr.fold_in(0, step), noise_contract.site_id(name))])
            ulr.ops.perturb_([p.data], key, torch.tensor(scale), draw=draw)
    return moved.eval()


def assert_both_steps_give(expected, model, x, y):
    """The coefficients of `step` and of `step_batch`, which leave the weights where they are."""
    optimizer = MeZO(model, lr=0.0, eps=EPS)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    torch.testing.assert_close(optimizer.last_update.coefficients, expected, rtol=2e-3, atol=2e-6)
    optimizer = MeZO(model, lr=0.0, eps=EPS)
    optimizer.step_batch(x, y, cross_entropy)
    torch.testing.assert_close(optimizer.last_update.coefficients, expected, rtol=2e-3, atol=2e-6)


def coefficients(model: nn.Module, loss, probes: int = 1, names=None, step: int = 0) -> Tensor:
    """MeZO's, from forwards of weights that are moved by hand."""
    with torch.no_grad():
        values = [[float(loss(at(model, draw, sign * EPS, names, step))) for draw in range(probes)] for sign in (1, -1)]
    plus, minus = torch.tensor(values, dtype=torch.float64)
    return ((plus - minus) / (2 * probes)).float()


def check_step(model: nn.Module, x: Tensor, y: Tensor, ways=("closure", "batch"), names=None, loss=cross_entropy):
    """Both forms of a step have the coefficients that moved weights give, and leave the weights moved."""
    expected = coefficients(fresh(model), lambda moved: loss(moved(x), y).mean(), 2, names)
    assert expected.abs().min() > 2e-5
    for way in ways:
        own = copy.deepcopy(model)
        optimizer = MeZO(own, lr=0.0, eps=EPS, probes=2)
        if way == "closure":
            optimizer.step(lambda own=own: loss(own(x), y).mean())
        else:
            optimizer.step_batch(x, y, loss)
        found = optimizer.last_update.coefficients
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-6, msg=lambda text, way=way: f"{way}: {text}")


def fresh(model: nn.Module) -> nn.Module:
    """A copy without caches: those of modules that have a reset."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "reset"):
            module.reset()
    return model


# --- caches ----------------------------------------------------------------------------------------------------------


class Biased(nn.Module):
    """Attention biases that a module looks up once in eval mode, in the ways of LeViT and its kin."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.biases, self.last = nn.Linear(4, 6), nn.Parameter(torch.empty(3)), nn.Linear(6, 3)
        self.register_buffer("places", torch.tensor([0, 2, 1, 1, 0, 2]), persistent=False)
        self.reset()

    def reset(self) -> None:
        self.kept = self.holder = None
        self.nested: dict = {"kept": {}}
        self.register_buffer("row", None)
        if self.kind == "object":
            self.holder = type("Holder", (), {})()
        if self.kind == "buffer in place":
            self.register_buffer("row", torch.zeros(6))
            self.register_buffer("ready", torch.tensor(False))
        if self.kind == "train":
            self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.kind == "train":
            if mode and hasattr(self, "ab"):
                del self.ab
            elif not mode:
                self.ab = self.biases.detach()[self.places]
        elif self.kind == "train dict" and mode:
            self.nested["kept"] = {}
        return self

    def row_of_biases(self) -> Tensor:
        if self.training:
            return self.biases.detach()[self.places]
        if self.kind == "train":
            return self.ab
        if self.kind == "attribute":
            if self.kept is None:
                self.kept = self.biases.detach()[self.places]
            return self.kept
        if self.kind == "object":
            if not hasattr(self.holder, "kept"):
                self.holder.kept = self.biases.detach()[self.places]
            return self.holder.kept
        if self.kind == "buffer":
            if self.row is None:
                self.row = self.biases.detach()[self.places]
            return self.row
        if self.kind == "buffer in place":
            if not self.ready:
                self.row.copy_(self.biases.detach()[self.places])
                self.ready.fill_(True)
            return self.row
        if "row" not in self.nested["kept"]:
            self.nested["kept"]["row"] = self.biases.detach()[self.places]
        return self.nested["kept"]["row"]

    def forward(self, x):
        return self.last(torch.tanh(self.first(x) + self.row_of_biases()))


KINDS = ["train", "train dict", "attribute", "dict", "object", "buffer", "buffer in place"]


def state_of(model: nn.Module) -> dict:
    nested = {name: list(value) for name, value in model.nested.items()}
    holder = None if model.holder is None else list(vars(model.holder))
    return {"names": list(vars(model)), "kept": model.kept, "nested": nested, "holder": holder, "row": model.row}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_caches_of_eval_mode_are_those_of_each_probe(kind, training):
    model = filled(Biased(kind)).train(training)
    x, y = v(1, 5, 4), torch.tensor([0, 2, 1, 1, 0])
    before = state_of(model)
    check_step(model, x, y)
    optimizer = MeZO(model, lr=0.0, eps=EPS)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    optimizer.step_batch(x, y, cross_entropy)
    assert state_of(model) == before and all(module.training is training for module in model.modules())
    assert kind != "buffer in place" or not model.row.any() and not model.ready


@pytest.mark.parametrize("kind", ["train", "train dict"])
def test_a_cache_of_an_earlier_forward_is_not_used(kind):
    model = filled(Biased(kind))
    x, y = v(1, 5, 4), torch.tensor([0, 2, 1, 1, 0])
    with torch.no_grad():
        model.eval()(x)
    kept = model.ab if kind == "train" else model.nested["kept"]["row"]
    model.biases.data.mul_(3.0)
    expected = coefficients(fresh(model), lambda moved: F.cross_entropy(moved.train().eval()(x), y))
    assert_both_steps_give(expected, model, x, y)
    assert kept is (model.ab if kind == "train" else model.nested["kept"]["row"])


class Merged(nn.Linear):
    """A low-rank adapter that is merged into the frozen weight in eval mode, as loralib's layers do."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.empty(2, 4)), nn.Parameter(torch.empty(3, 2))
        self.merged = False

    def train(self, mode: bool = True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.b @ self.a)
            self.merged = not mode
        return self

    def forward(self, x):
        return F.linear(x, self.weight if self.merged else self.weight + self.b @ self.a, self.bias)


@pytest.mark.parametrize("training", [True, False])
def test_adapters_that_eval_mode_merges(training):
    model, x, y = filled(Merged()), v(1, 5, 4), torch.tensor([0, 2, 1, 1, 0])
    expected = coefficients(model, lambda moved: F.cross_entropy(moved(x), y))
    model.train(training)
    start = copies(model)
    assert_both_steps_give(expected, model, x, y)
    assert model.merged is not training and all(torch.equal(p, start[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("where", ["attribute", "dict", "object"])
def test_a_cache_that_nothing_drops_is_refused(where):
    model = filled(Biased(where)).eval()
    x, y = v(1, 5, 4), torch.tensor([0, 2, 1, 1, 0])
    with torch.no_grad():
        model(x)
    with pytest.raises(ValueError, match="none of biases"):
        MeZO(model).step(lambda: F.cross_entropy(model(x), y))
    with pytest.raises(ValueError, match="none of biases"):
        MeZO(model).step_batch(x, y, cross_entropy)


def test_a_large_buffer_that_changes_late_is_an_error():
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.register_buffer("table", torch.zeros(2**18 + 1))
            self.counting = False

        def forward(self, x):
            if self.counting:
                self.table.add_(1.0)
            return super().forward(x) + self.table[0]

    model, x, y = filled(Counting()), v(1, 5, 4), torch.tensor([0, 2, 1, 1, 0])
    optimizer = MeZO(model, lr=0.0, eps=EPS)
    closure = lambda: F.cross_entropy(model(x), y)  # noqa: E731
    optimizer.step(closure)
    model.counting = True
    with pytest.raises(RuntimeError, match=r"must not change a buffer of \[262145\] in place"):
        optimizer.step(closure)
    model.table.zero_()
    optimizer.step(closure)
    assert not model.table.any()


def test_a_loss_may_read_what_the_forward_left():
    class Leaving(nn.Linear):
        left = None

        def forward(self, x):
            self.left = super().forward(x)
            return self.left

    model, x = filled(Leaving(4, 3)), v(1, 5, 4)
    expected = coefficients(model, lambda moved: moved(x).square().sum(1).mean())
    optimizer = MeZO(model, lr=0.0, eps=EPS)

    def closure():
        model(x)
        return model.left.square().sum(1).mean()

    optimizer.step(closure)
    torch.testing.assert_close(optimizer.last_update.coefficients, expected, rtol=2e-3, atol=2e-6)
    optimizer = MeZO(model, lr=0.0, eps=EPS)
    optimizer.step_batch(x, None, lambda out, _: model.left.square().sum(1))
    assert "left" not in vars(model)


# --- step_batch: what depends on the batch ---------------------------------------------------------------------------


class Learner(nn.Module):
    """Tokens `[samples, 8]` to classes; a subclass says what is made of its parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)
        self.more = nn.Parameter(torch.empty(8, 6))
        self.norm = nn.Parameter(torch.empty(6))

    def forward(self, tokens):
        return self.head(torch.tanh(self.mixed(self.words(tokens))).mean(1))


class Positions(Learner):
    """As nanoGPT's: a table that is looked up by `arange(T)`, where T is a multiple of the rows of all copies."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(8, 6)

    def mixed(self, h):
        return (h + self.places(torch.arange(h.shape[1]))) * (1 + self.norm) + self.more[: h.shape[1]]


class PositionsOfRows(Positions):
    def mixed(self, h):
        shared = torch.arange(h.shape[1])[None]
        kinds = torch.zeros(h.shape[:2], dtype=torch.long)
        return (
            h + self.places(shared) + self.places(shared.expand(len(h), -1)) + self.places(kinds)
        ) * self.norm + self.more


class ClassToken(Learner):
    def mixed(self, h):
        h = torch.cat((self.more[None, :1].expand(len(h), -1, -1), h, self.more[1:3].repeat(len(h), 1, 1)), 1)
        h = torch.cat((torch.stack([self.norm] * len(h)).unsqueeze(1), h), 1)
        return F.layer_norm(h, (6,), 1 + self.norm)


class Relative(Learner):
    """A bias of attention by a table of distances, as T5's; scores get it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.distances = nn.Embedding(15, 2)

    def mixed(self, h):
        places = torch.arange(h.shape[1])
        bias = self.distances(places[:, None] - places + 7).permute(2, 0, 1).unsqueeze(0)
        q = (h @ self.more.T @ (2.0 * self.more)).unflatten(2, (2, 3)).transpose(1, 2)
        scores = q @ q.transpose(2, 3)
        scores += bias
        return (scores.softmax(3) @ q).transpose(1, 2).flatten(2) * self.norm


class Normed(Learner):
    """Weight norm, a written constant, a buffer as long as the batch, batch normalisation of as many features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 8))
        self.batch = nn.BatchNorm1d(8)
        self.register_buffer("shift", v(3, 8))
        self.back = nn.Linear(8, 6)

    def mixed(self, h):
        table = torch.zeros(3, 6)
        table[1] = self.norm
        table[2].add_(self.norm * 2)
        h = h + table.sum(0) + torch.ones(len(h), 1, 1) * self.norm
        return self.back(self.batch((self.layer(h) + self.shift).transpose(1, 2)).transpose(1, 2)) + self.more


class Queries(Learner):
    """Learnt queries that attend to one another, and then to the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.cross = (nn.MultiheadAttention(6, 2, batch_first=True) for _ in range(2))

    def mixed(self, h):
        queries = self.more[None]
        queries = queries + self.own(queries, queries, queries, need_weights=False)[0]
        return self.cross(queries.expand(len(h), -1, -1), h, h, need_weights=False)[0] * self.norm


class Starts(Learner):
    """A recurrent layer with a learnt first state, and attention with samples on the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.start = nn.GRU(6, 6, batch_first=True), nn.Parameter(torch.empty(1, 1, 6))
        self.cross = nn.MultiheadAttention(6, 2)

    def mixed(self, h):
        h = self.cells(h, self.start.expand(-1, len(h), -1).contiguous())[0]
        queries = self.more.unsqueeze(1).repeat(1, len(h), 1)
        return self.cross(queries, h.transpose(0, 1), h.transpose(0, 1))[0].transpose(0, 1) * self.norm


@pytest.mark.parametrize("samples", [1, 2, 4])  # 4, 8 or 16 rows in one forward, of 8 tokens and 8 features
@pytest.mark.parametrize("kind", [Positions, PositionsOfRows, ClassToken, Relative, Normed, Queries, Starts])
def test_members_have_their_own_results_of_parameters_alone(kind, samples):
    with torch.random.fork_rng(devices=[]):
        model = filled(kind(), 0.7)
    tokens = torch.arange(8 * samples).view(samples, 8) * 7 % 11
    check_step(model, tokens, torch.arange(samples) % 3)


def test_a_loss_may_read_parameters_itself():
    model, x, y = filled(nn.Linear(4, 3)), v(1, 5, 4), torch.tensor([0, 2, 1, 1, 0])
    expected = coefficients(model, lambda own: F.cross_entropy(own(x), y) + own.weight.square().sum())
    optimizer = MeZO(model, lr=0.0, eps=EPS)
    optimizer.step_batch(x, y, lambda out, y: cross_entropy(out, y) + model.weight.square().sum())
    torch.testing.assert_close(optimizer.last_update.coefficients, expected, rtol=2e-3, atol=2e-6)


class Deciding(Learner):
    def mixed(self, h):
        return h * (1.0 + self.norm.sum().item()) + self.more


class Aliased(Learner):
    def mixed(self, h):
        table = torch.zeros(3, 6)
        row = table[0]
        table[0] = self.norm
        return h + row + self.more


class Outed(Learner):
    def mixed(self, h):
        out = torch.empty(6)
        torch.mul(self.norm, 2.0, out=out)
        return h + out + self.more


class TimeFirst(Learner):
    def mixed(self, h):
        return (h.transpose(0, 1) * self.norm).transpose(0, 1) + self.more


@pytest.mark.parametrize("kind", [Deciding, Aliased, Outed, TimeFirst])
def test_what_cannot_be_told_apart_is_refused(kind):
    model = filled(kind(), 0.7)
    tokens = torch.arange(24).view(3, 8) * 7 % 11
    with pytest.raises((ValueError, RuntimeError), match=r"ulr.optim.*step\(closure\) evaluates one"):
        MeZO(model, eps=EPS, probes=2).step_batch(tokens, torch.arange(3), cross_entropy)


# --- parameters that stay as they are --------------------------------------------------------------------------------


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads, self.head = nn.Linear(4, 5), nn.ModuleList(nn.Linear(5, 3) for _ in range(2)), 0

    def forward(self, x):
        return self.heads[self.head](torch.tanh(self.body(x)))


X, Y = v(1, 5, 4), torch.tensor([0, 2, 1, 1, 0])
RULES = [{}, {"momentum": 0.9}, {"betas": (0.9, 0.99)}]


def take(optimizer, way: str) -> None:
    model = optimizer.model
    if way == "closure":
        optimizer.step(lambda: F.cross_entropy(model(X), Y))
    else:
        optimizer.step_batch(X, Y, cross_entropy)


@pytest.mark.parametrize("way", ["closure", "batch"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_what_a_step_does_not_use_stays_still(rule, way):
    """And its state; after that it goes on as if those steps had not been, as torch's optimisers do."""
    model = filled(Heads())
    optimizer = MeZO(model, lr=0.1, eps=EPS, weight_decay=0.1, **rule)
    base, updates = copies(model), []
    with pytest.warns(UserWarning, match="step 0 has used heads.1.weight, heads.1.bias: they stay .*thread"):
        take(optimizer, way)
    updates.append(optimizer.last_update)
    for step, head in enumerate((0, 1, 0, 1), 1):
        model.head, start = head, copies(model)
        kept = copy.deepcopy({name: optimizer.state[p] for name, p in model.named_parameters()})
        expected = coefficients(model, lambda moved: F.cross_entropy(moved(X), Y), step=step)
        if step == 1:
            take(optimizer, way)
        else:
            with pytest.warns(UserWarning, match="heads.0.weight") if step == 2 else contextlib.nullcontext():
                take(optimizer, way)
        update = optimizer.last_update
        updates.append(update)
        torch.testing.assert_close(update.coefficients, expected, rtol=2e-3, atol=2e-6)
        assert update.still == (f"heads.{1 - head}.weight", f"heads.{1 - head}.bias")
        for name, p in model.named_parameters():
            assert torch.equal(p, start[name]) is (name in update.still)
            own = {kind: value for kind, value in optimizer.state[p].items() if kind != "skipped"}
            assert name not in update.still or all(torch.equal(own[kind], kept[name][kind]) for kind in own)
    state: dict = {}
    for update in updates:
        optimizer.rule.apply(update, base, state)
    assert all(torch.equal(base[name], p) for name, p in model.named_parameters())
    if rule.get("betas"):
        check_adam(optimizer, updates)
    resumed = MeZO(copy.deepcopy(model), **rule)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, resumed):
        each.model.head = 0
        with pytest.warns(UserWarning, match="heads.1") if each is resumed else contextlib.nullcontext():
            take(each, way)
    pairs = zip(optimizer.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def check_adam(optimizer, updates) -> None:
    """torch's Adam, with no gradients for what a step left out."""
    model = filled(Heads())
    adam = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.9, 0.99), weight_decay=0.1)
    for update in updates:
        for name, p in model.named_parameters():
            key = ulr.fold_in(update.key, noise_contract.site_id(name))
            p.grad = None if name in update.still else update.coefficients[0] / EPS * ulr.noise_like(p, key)
        adam.step()
    for ours, p in zip(optimizer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, p, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["closure", "batch"])
def test_parameters_frozen_later_stay_still(way):
    model = filled(Heads())
    optimizer = MeZO(model, lr=0.1, eps=EPS, weight_decay=0.1, momentum=0.9)
    with pytest.warns(UserWarning, match="heads.1"):
        take(optimizer, way)
    model.body.requires_grad_(False)
    start, kept = copies(model), optimizer.state[model.body.weight]["momentum_buffer"].clone()
    expected = coefficients(model, lambda moved: F.cross_entropy(moved(X), Y), step=1)
    take(optimizer, way)
    torch.testing.assert_close(optimizer.last_update.coefficients, expected, rtol=2e-3, atol=2e-6)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == {"heads.0.weight", "heads.0.bias"}
    assert torch.equal(optimizer.state[model.body.weight]["momentum_buffer"], kept)
    start = copies(model)
    optimizer.accumulate(lambda: F.cross_entropy(model(X), Y))
    model.heads[0].weight.requires_grad_(False)  # before the step that was to move it
    optimizer.step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, start[name])} == {"heads.0.bias"}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="'model' must have a trained parameter"):
        take(optimizer, way)


@pytest.mark.parametrize("way", ["closure", "batch"])
@pytest.mark.parametrize("how", ["layer", "assign", "parameter"])
def test_parameters_replaced_later_are_refused(how, way):
    model = filled(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)))
    optimizer = MeZO(model, lr=0.1, eps=EPS)
    take(optimizer, way)
    if how == "layer":
        model[1] = nn.Linear(4, 3)
    elif how == "assign":
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    else:
        model[1].weight = nn.Parameter(torch.zeros(3, 4))
    start = copies(model)
    with pytest.raises(ValueError, match="'model' must keep the parameters .*make a new one.* in the place of"):
        take(optimizer, way)
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())
    take(MeZO(model, lr=0.1, eps=EPS), way)


def test_a_step_that_uses_no_trained_parameter_is_an_error():
    model = filled(Heads())
    with pytest.raises(ValueError, match="'closure' must use trained parameters in the thread .*none of body.weight"):
        MeZO(model).step(lambda: X.sum())


def test_logs_hold_what_stayed_still(tmp_path):
    from ulr_kernels.finetune import trajectory

    model = filled(Heads())
    base = copies(model)
    optimizer = MeZO(model, lr=0.1, eps=EPS, momentum=0.9)
    writer = trajectory.Writer.create(tmp_path / "log", trajectory.Header(optimizer.rule, 1, "", {}))
    model.heads[1].requires_grad_(False)
    for step in range(4):
        model.heads[1].requires_grad_(step == 2)
        model.head = int(step == 2)
        with pytest.warns(UserWarning, match="heads.0") if step == 2 else contextlib.nullcontext():
            take(optimizer, "closure")
        writer.append(optimizer.last_update, 0.5)
    writer.close()
    log = trajectory.read(tmp_path / "log")
    assert [update.still for update in log.updates].count(("heads.1.weight", "heads.1.bias")) == 3
    log.replay(base)
    assert all(torch.equal(base[name], p) for name, p in model.named_parameters())
    content = (tmp_path / "log").read_bytes()
    (tmp_path / "log").write_bytes(content[:-3])
    assert len(trajectory.read(tmp_path / "log").updates) == 3
    (tmp_path / "log").write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    with pytest.raises(trajectory.JobError, match="in the record of step 3"):
        trajectory.read(tmp_path / "log")


class Padded(nn.Module):
    """Tables with a row for padding: tied to the head, of bags, read by other functions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.words = (nn.EmbeddingBag if kind == "bag" else nn.Embedding)(7, 4, padding_idx=2)
        self.head = nn.Linear(4, 7)
        if kind == "tied":
            self.head.weight = self.words.weight

    def forward(self, tokens):
        h = self.words.weight[tokens].mean(1) if self.kind == "indexed" else self.words(tokens)
        return self.head(torch.tanh(h if h.dim() == 2 else h.mean(1)))


TOKENS = torch.tensor([[0, 2, 2], [1, 2, 6], [5, 4, 2], [3, 3, 1]])


@pytest.mark.parametrize("make", [MeZO, ES, EGGROLL, FZOO], ids=lambda make: make.__name__)
@pytest.mark.parametrize("kind", ["table", "tied", "bag", "indexed"])
def test_the_row_of_padding_stays(kind, make):
    model, targets = filled(Padded(kind)), torch.tensor([6, 2, 0, 1])
    row = model.words.weight[2].detach().clone()
    seen = []

    def losses(out, y):
        seen.append(model.words.weight[2].clone())
        return cross_entropy(out, y)

    base, updates = copies(model), []
    rules = [{}, {"momentum": 0.5}, {"betas": (0.9, 0.99)}]
    for rule in rules:
        scale = {"eps": EPS} if make in (MeZO, FZOO) else {"sigma": EPS, "population": 4}
        optimizer = make(model, lr=0.1, weight_decay=0.1, **scale, **rule)
        optimizer.step(lambda: losses(model(TOKENS), targets).mean())
        optimizer.step_batch(TOKENS, targets, losses)
    assert all(torch.equal(each, row) for each in (*seen, model.words.weight[2]))
    others = torch.arange(7) != 2
    assert (model.words.weight != base["words.weight"])[others].all()
    model = filled(Padded(kind))
    optimizer = make(model, lr=0.1, weight_decay=0.1, **scale)
    for _ in range(2):
        optimizer.step_batch(TOKENS, targets, losses)
        updates.append(optimizer.last_update)
    rule = ulr.optim.Rule.of_fields(json.loads(json.dumps(dataclasses.asdict(optimizer.rule))))
    for update in updates:
        rule.apply(update, base, {})
    assert all(torch.equal(base[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", ["table", "tied", "bag", "indexed"])
def test_probes_with_padding(kind):
    model, targets = filled(Padded(kind)), torch.tensor([6, 2, 0, 1])

    def moved(sign, draw):
        other = at(model, draw, sign * EPS)
        other.words.weight.data[2] = model.words.weight.data[2]
        return float(F.cross_entropy(other(TOKENS), targets))

    with torch.no_grad():
        expected = torch.tensor([(moved(1, draw) - moved(-1, draw)) / 4 for draw in range(2)])
    for batch in (False, True):
        optimizer = MeZO(model, lr=0.0, eps=EPS, probes=2)
        if batch:
            optimizer.step_batch(TOKENS, targets, cross_entropy)
        else:
            optimizer.step(lambda: F.cross_entropy(model(TOKENS), targets))
        torch.testing.assert_close(optimizer.last_update.coefficients, expected, rtol=2e-3, atol=2e-6)


# --- closures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["new", "old", "part"])
def test_a_closure_in_other_threads_is_refused(pool):
    model = filled(Heads())
    model.heads[1].requires_grad_(False)
    optimizer = MeZO(model, eps=EPS)
    with concurrent.futures.ThreadPoolExecutor(2) as old:
        list(old.map(abs, range(4)))

        def closure():
            if pool == "new":
                with concurrent.futures.ThreadPoolExecutor(2) as new:
                    out = torch.cat(list(new.map(model, X.split(3))))
            elif pool == "old":
                out = torch.cat(list(old.map(model, X.split(3))))
            else:
                out = torch.cat([model(X[:3]), *old.map(model, X[3:].split(1))])
            return F.cross_entropy(out, Y)

        with pytest.raises(ValueError, match="ulr.optim.MeZO: 'closure' must .* thread"):
            optimizer.step(closure)
        optimizer.step(lambda: F.cross_entropy(model(X), Y))


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_gradients_are_refused(hook):
    model = filled(nn.Linear(4, 3))
    handle = getattr(model.weight, hook)(lambda g: None)
    optimizer = MeZO(model, eps=EPS)
    for way in ("closure", "batch"):
        with pytest.raises(ValueError, match=r"must have no hooks .*register_hook\), got one on weight"):
            take(optimizer, way)
    handle.remove()
    take(optimizer, "closure")


def test_a_closure_with_a_backward_pass_is_refused():
    model = filled(nn.Linear(4, 3))
    optimizer = MeZO(model, eps=EPS)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    with pytest.raises(ValueError, match=r"'closure' must run the forward alone .*without backward\(\)"):
        optimizer.step(closure)


def test_zero_grad_keeps_what_was_accumulated():
    model = filled(nn.Linear(4, 3))
    found = []
    for zeros in (False, True):
        optimizer = MeZO(model, lr=0.0, eps=EPS)
        for part in (slice(0, 2), slice(2, 4)):

            def closure(part=part, zeros=zeros, optimizer=optimizer):
                if zeros:
                    optimizer.zero_grad()
                return F.cross_entropy(model(X[part]), Y[part])

            optimizer.accumulate(closure)
            if zeros:
                optimizer.zero_grad()
        optimizer.step()
        found.append(optimizer.last_update.coefficients)
    assert torch.equal(*found)


DRAWS = {
    "randn_like": lambda h: h * torch.randn_like(h),
    "randn": lambda h: h * torch.randn(len(h), 1),
    "dropout": lambda h: F.dropout(h, 0.5),
    "bernoulli": lambda h: h * torch.bernoulli(torch.full_like(h, 0.5)),
    "in place": lambda h: h * torch.empty(h.shape).uniform_(),
    "randint": lambda h: h * torch.randint(0, 9, (len(h),))[:, None],
    "shared": lambda h: h * torch.randn(3),
}
GLOBAL_DRAWS = {
    "numpy": lambda h: h * float(numpy.random.randn()),
    "numpy uniform": lambda h: h * float(numpy.random.rand()),
    "python": lambda h: h * random.random(),
}


@pytest.mark.parametrize("draw", {**DRAWS, **GLOBAL_DRAWS})
def test_a_loss_that_draws_numbers_draws_the_same_in_every_probe(draw):
    model, function = filled(nn.Linear(4, 3)), {**DRAWS, **GLOBAL_DRAWS}[draw]

    def seed():
        torch.manual_seed(5)
        numpy.random.seed(5)
        random.seed(5)

    def loss(own):
        seed()
        return F.cross_entropy(function(own(X)), Y)

    expected = coefficients(model, loss, 2)
    for way in ("closure", "batch"):
        optimizer = MeZO(model, lr=0.0, eps=EPS, probes=2)
        seed()
        if way == "closure":
            optimizer.step(lambda: F.cross_entropy(function(model(X)), Y))
        else:
            optimizer.step_batch(X, Y, lambda out, y: cross_entropy(function(out), y))
        found = optimizer.last_update.coefficients
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-6, msg=lambda text, way=way: f"{way}: {text}")
        after = float(torch.rand(1)), float(numpy.random.rand()), random.random()
        seed()
        function(model(X))
        assert after == (float(torch.rand(1)), float(numpy.random.rand()), random.random())


@pytest.mark.parametrize("way", ["closure", "batch"])
def test_generators_that_a_loss_brings_along(way):
    model, generator = filled(nn.Linear(4, 3)), torch.Generator()

    def scaled(h):
        return h * torch.rand(len(h), 1, generator=generator)

    def loss(own):
        generator.manual_seed(5)
        return F.cross_entropy(scaled(own(X)), Y)

    expected = coefficients(model, loss, 2)
    after = generator.get_state()
    generator.manual_seed(5)
    optimizer = MeZO(model, lr=0.0, eps=EPS, probes=2)
    if way == "closure":
        optimizer.step(lambda: F.cross_entropy(scaled(model(X)), Y))
    else:
        optimizer.step_batch(X, Y, lambda out, y: cross_entropy(scaled(out), y))
    torch.testing.assert_close(optimizer.last_update.coefficients, expected, rtol=2e-3, atol=2e-6)
    assert torch.equal(generator.get_state(), after)


def test_micro_batches_and_steps_draw_anew():
    model, drawn = filled(nn.Linear(4, 3)), []

    def closure():
        drawn.append(float(torch.rand(1)))
        return F.cross_entropy(model(X) * drawn[-1], Y)

    optimizer = MeZO(model, lr=0.0, eps=EPS)
    for _ in range(2):
        optimizer.accumulate(closure)
        optimizer.accumulate(closure)
        optimizer.step()
    assert drawn[::2] == drawn[1::2] and len(set(drawn)) == 4
    before = torch.get_rng_state()
    optimizer.step(lambda: F.cross_entropy(model(X), Y))
    assert torch.equal(before, torch.get_rng_state())


# --- numbers, parameters and schedulers ------------------------------------------------------------------------------


def test_numbers_of_numpy_count():
    model = filled(nn.Linear(4, 3))
    numbers = {"lr": numpy.float32(0.125), "eps": numpy.float64(EPS), "weight_decay": numpy.float32(0.5)}
    more = {"probes": numpy.int64(2), "seed": numpy.int32(3), "rank": numpy.int64(1), "momentum": numpy.float32(0.5)}
    optimizer = MeZO(model, **numbers, **more)
    optimizer.step_batch(X, Y, cross_entropy, chunk=numpy.int64(2))
    same = filled(nn.Linear(4, 3))
    other = MeZO(same, 0.125, EPS, 2, seed=3, rank=1, weight_decay=0.5, momentum=0.5)
    other.step_batch(X, Y, cross_entropy, chunk=2)
    assert torch.equal(model.weight, same.weight)
    text = json.dumps({name: value for name, value in optimizer.state_dict().items() if name != "state"})
    assert text == json.dumps({name: value for name, value in other.state_dict().items() if name != "state"})
    betas = ES(model, population=numpy.int64(4), betas=[numpy.float32(0.5), 0.75]).rule.betas
    assert betas == (0.5, 0.75) and type(betas[0]) is float
    for make in (lambda: MeZO(model, lr=True), lambda: MeZO(model, probes=True), lambda: MeZO(model, momentum=True)):
        with pytest.raises(ValueError, match="'(lr|probes|momentum)' must be .*, got True"):
            make()


def test_parameters_of_other_kinds():
    for make, text in (
        (lambda: MeZO(nn.Linear(4, 3, dtype=torch.complex64)), "'weight' must be float32, .* got torch.complex64"),
        (lambda: MeZO(nn.Linear(4, 3).double()), "'weight' must be float32, bfloat16 or float16, got torch.float64"),
        (lambda: MeZO(nn.LazyLinear(3)), r"'model' must have parameters with shapes \(run one forward first\)"),
        (lambda: MeZO(nn.ReLU()), "'model' must have a trained parameter"),
        (lambda: MeZO(nn.Linear(2, 2).requires_grad_(False)), "'model' must have a trained parameter"),
        (lambda: MeZO(nn.Linear(2, 2), params=[{"params": []}]).step(lambda: 0.0), "'model' must have a trained"),
        (lambda: MeZO(m := nn.Linear(2, 2), params=[{"params": m.weight, "momentum": 0.9}]), "'momentum' must be an"),
        (lambda: MeZO(m := nn.Linear(2, 2), params=[{"params": m.weight, "betas": (0.9, 0.9)}]), "'betas' must be an"),
    ):
        with pytest.raises(ValueError, match=f"^ulr.optim.MeZO: {text}"):
            make()


def test_empty_parameters_work():
    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.none = nn.Linear(4, 3), nn.Linear(4, 0)
            self.rows, self.row = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.empty(0))

        def forward(self, x):
            return self.layer(x) + torch.cat((self.rows, torch.ones(1, 3))).sum(0) + self.row.sum() + self.none(x).sum()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        model = filled(Empty())
    check_step(model, X, Y)
    start = copies(model)
    take(MeZO(model, lr=0.1, eps=EPS, momentum=0.5), "batch")
    assert (model.layer.weight != start["layer.weight"]).all()


@pytest.mark.parametrize("scheduler", ["OneCycleLR", "CyclicLR"])
@pytest.mark.parametrize("rule", [{"momentum": 0.9}, {"betas": (0.9, 0.99)}], ids=str)
def test_schedulers_cycle_momentum(rule, scheduler, tmp_path):
    """As of SGD and Adam of torch; a log has each step's momentum."""
    from ulr_kernels.finetune import trajectory

    settings = {"OneCycleLR": {"total_steps": 6}, "CyclicLR": {"base_lr": 0.01, "step_size_up": 2}}[scheduler]
    schedule = functools.partial(getattr(torch.optim.lr_scheduler, scheduler), max_lr=0.1, **settings)
    model, theirs = filled(nn.Linear(4, 3)), filled(nn.Linear(4, 3))
    optimizer = MeZO(model, lr=0.1, eps=EPS, **rule)
    other = torch.optim.SGD if "momentum" in rule else torch.optim.Adam
    other = other(theirs.parameters(), lr=0.1, **rule)
    schedules, base, momenta = [schedule(optimizer), schedule(other)], copies(model), []
    writer = trajectory.Writer.create(tmp_path / "log", trajectory.Header(optimizer.rule, 1, "", {}))
    for _ in range(5):
        take(optimizer, "closure")
        update = optimizer.last_update
        momenta.append(update.groups[0].momentum)
        for name, p in theirs.named_parameters():
            noise = ulr.noise_like(p, ulr.fold_in(update.key, noise_contract.site_id(name)))
            p.grad = update.coefficients[0] / EPS * noise
        other.step()
        for each in schedules:
            each.step()
        writer.append(update, 0.0)
    writer.close()
    assert len(set(momenta)) > 2
    for ours, p in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, p, rtol=1e-4, atol=1e-5)
    trajectory.read(tmp_path / "log").replay(base)
    assert all(torch.equal(base[name], p) for name, p in model.named_parameters())
    resumed = MeZO(copy.deepcopy(model))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    schedule(resumed)
    for each in (optimizer, resumed):
        each.param_groups[0].update(optimizer.param_groups[0] | {"params": each.param_groups[0]["params"]})
        take(each, "closure")
    assert torch.equal(optimizer.model.weight, resumed.model.weight)
    group = optimizer.param_groups[0]
    group["momentum" if "momentum" in rule else "betas"] = 1.5 if "momentum" in rule else (1.5, 0.99)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got"):
        take(optimizer, "closure")


def test_schedulers_without_momentum_say_so():
    optimizer = MeZO(filled(nn.Linear(4, 3)), lr=0.1)
    with pytest.raises(ValueError, match="cycle_momentum"):
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=6)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=6, cycle_momentum=False)


def test_caches_in_objects_of_slots():
    class Holder:
        __slots__ = ("kept",)

    class Holding(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.holders = [Holder()]

        def forward(self, x):
            (holder,) = self.holders
            if not hasattr(holder, "kept"):
                holder.kept = self.weight.detach() * 2
            return x @ holder.kept.T + self.bias

    model = filled(Holding())
    check_step(model, X, Y)
    assert not hasattr(model.holders[0], "kept")


def test_results_kept_outside_the_model_are_named():
    class Outside(nn.Linear):
        def forward(self, x):
            if "weight" not in kept:
                kept["weight"] = self.weight.detach() * 2
            return x @ kept["weight"].T + self.bias

    kept: dict = {}
    model = filled(Outside(4, 3))
    optimizer = MeZO(model, eps=EPS)
    with pytest.warns(UserWarning, match="some forwards of step 0 have used weight and others have not"):
        optimizer.step(lambda: F.cross_entropy(model(X), Y))
    with pytest.warns(UserWarning, match="no function of step 1 has used weight"):
        optimizer.step(lambda: F.cross_entropy(model(X), Y))
    kept.clear()
    with pytest.raises(ValueError, match="other losses of a probe by itself"):
        MeZO(model, eps=EPS).step_batch(X, Y, cross_entropy)


def test_padding_that_only_a_call_names_is_refused():
    model = filled(nn.ParameterDict({"table": torch.empty(7, 4)}))
    for function, more in ((F.embedding, {}), (F.embedding_bag, {"mode": "sum"})):
        closure = lambda function=function, more=more: function(TOKENS, model["table"], padding_idx=2, **more).sum()  # noqa: E731
        with pytest.raises(ValueError, match="'padding_idx' must be that of an nn.Embedding .* got 2 in a call with"):
            MeZO(model, eps=EPS).step(closure)


def test_a_model_that_became_double_is_refused():
    model = filled(nn.Linear(4, 3))
    optimizer = MeZO(model, eps=EPS)
    model.double()
    with pytest.raises(ValueError, match="ulr.optim.MeZO: 'weight' must be float32, .* got torch.float64"):
        optimizer.step(lambda: model(X.double()).square().sum())


def test_noise_on_weights_leaves_the_row_of_padding():
    model, targets = filled(Padded("tied")), torch.tensor([6, 2, 0, 1])
    exact = torch.autograd.grad(F.cross_entropy(model(TOKENS), targets), model.words.weight)[0]
    estimator = ulr.ULR(model, sigma=0.01, copies=512, noise="weights", injection="joint")
    estimator.backward(TOKENS, targets, cross_entropy)
    found, others = model.words.weight.grad, torch.arange(7) != 2
    assert not found[2].any()
    assert F.cosine_similarity(found[others].flatten(), exact[others].flatten(), 0) > 0.9


@pytest.mark.parametrize("other", [[True, False, True], [False, False, False]], ids=["some", "none"])
def test_ranks_agree_on_what_stays_still(other):
    """What no rank has used; here a rank that hears from another one."""

    class Two(ulr.optim.Workers):
        def __init__(self) -> None:
            self.group, self.rank, self.size, self.probe_ranks, self.blocks, self.bytes_sent = None, 0, 2, 1, 2, 0

        def gather(self, mine, when):
            if mine.dtype == torch.int32:
                assert mine[1] == -1  # of one micro-batch; this rank has left some unused
                return [mine, mine * torch.tensor([1, 1 if any(other) else -1, 1, 1], dtype=torch.int32)]
            return [mine, torch.tensor(other, dtype=torch.uint8) if mine.dtype == torch.uint8 else mine]

    workers = Two()
    losses, unused = workers.exchange([torch.ones(2, 1)], [[0], [1]], 3, [True, True, False])
    assert losses.shape == (2, 2, 1) and unused == [all(pair) for pair in zip([True, True, False], other, strict=True)]
