"""Models and closures for which a step could be wrong without a word: it is right, or it is refused.

The right values come from weights that are moved by hand with the same noise.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from reader_model import copies
from small_models import cross_entropy, filled, modules_may_draw, v  # noqa: F401
from torch import Tensor, nn

import ulr_kernels as ulr
from ulr_kernels import noise_contract
from ulr_kernels.optim import MeZO

EPS = 1e-2


def at(model: nn.Module, draw: int, scale: float, names=None, step: int = 0) -> nn.Module:
    """A copy of the model whose weights are moved by hand."""
    moved = copy.deepcopy(model)
    for name, p in moved.named_parameters():
        if p.requires_grad and (names is None or name in names):
            key = torch.tensor([ulr.fold_in(ulr.fold_in(0, step), noise_contract.site_id(name))])
            ulr.ops.perturb_([p.data], key, torch.tensor(scale), draw=draw)
    return moved.eval()


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
    check_step(model, x, y, ways=("closure",))
    optimizer = MeZO(model, lr=0.0, eps=EPS)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
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
    optimizer = MeZO(model, lr=0.0, eps=EPS)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    torch.testing.assert_close(optimizer.last_update.coefficients, expected, rtol=2e-3, atol=2e-6)
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
    optimizer = MeZO(model, lr=0.0, eps=EPS)
    optimizer.step(lambda: F.cross_entropy(model(x), y))
    torch.testing.assert_close(optimizer.last_update.coefficients, expected, rtol=2e-3, atol=2e-6)
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


@pytest.mark.parametrize("samples", [1, 2, 4])  # 4, 8 or 16 rows in one forward, of 8 tokens and 8 features
@pytest.mark.parametrize("kind", [Positions, PositionsOfRows, ClassToken, Relative, Normed, Queries])
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
