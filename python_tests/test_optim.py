"""The optimisers: their estimates against formulas written out with the same noise, and what must stay as it was."""

from __future__ import annotations

import functools
import io

import pytest
import torch
import torch.nn.functional as F
from small_models import cross_entropy, filled, modules_may_draw, v  # noqa: F401
from torch import Tensor, nn

import ulr_kernels as ulr
from ulr_kernels import backends, contract
from ulr_kernels.nn.names import parameter_names
from ulr_kernels.optim import EGGROLL, ES, FZOO, MeZO, Rule
from ulr_kernels.optim.probing import Draws


class Reader(nn.Module):
    """Tokens to classes: tables, a norm, attention, a convolution, a bare parameter, a head tied to the table."""

    def __init__(self, words: int = 11, width: int = 8, positions: int = 5) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.MultiheadAttention(width, 2, batch_first=True)
        self.patch = nn.Conv2d(1, 3, (2, 3), padding=1)
        self.scale = nn.Parameter(torch.empty(width))
        self.body = nn.Linear(3 * (positions + 1) * width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        h = self.norm(self.words(tokens) + self.places(torch.arange(tokens.shape[1])[None]))
        h = h + self.mix(h, h, h, need_weights=False)[0]
        h = torch.relu(self.patch((h * self.scale).unsqueeze(1))).flatten(1)
        return self.head(torch.tanh(self.body(h)))


def reader() -> tuple[nn.Module, Tensor, Tensor]:
    tokens = torch.arange(30).view(6, 5) * 7 % 11
    return filled(Reader(), 0.3).eval(), tokens, tokens[:, 0]


def site_noise(model: nn.Module, seed: int, step: int, draw: int, dist: str = "normal") -> dict[str, Tensor]:
    """The noise of each parameter, by the contract's words alone."""
    step_key = ulr.fold_in(seed, step)
    return {
        name: ulr.noise_like(p, ulr.fold_in(step_key, contract.site_id(name)), draw=draw, dist=dist)
        for name, p in model.named_parameters()
    }


def shifted(model: nn.Module, noise: dict[str, Tensor], scale: float, tokens: Tensor) -> Tensor:
    weights = {name: p.detach() + scale * noise[name] for name, p in model.named_parameters()}
    return torch.func.functional_call(model, weights, tokens)


def moved(model: nn.Module, start: dict[str, Tensor]) -> Tensor:
    return torch.cat([(p.detach() - start[name]).flatten() for name, p in model.named_parameters()])


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def needs(device: str, *names: str) -> None:
    for name in names:
        try:
            backends.lookup(name, device)
        except backends.BackendError as error:
            pytest.skip(str(error))


# --- the estimates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dist", ["normal", "rademacher"])
def test_mezo_is_textbook_spsa_over_50_steps(dist):
    """Spall's two-forward SPSA: theta -= lr * (L(theta + eps z) - L(theta - eps z)) / (2 eps) * z."""
    model, tokens, targets = reader()
    lr, eps, seed = 0.02, 1e-2, 5
    start = copies(model)
    theirs = filled(Reader(), 0.3).eval()
    optimizer = MeZO(model, lr=lr, eps=eps, dist=dist, seed=seed)
    for step in range(50):
        optimizer.step(lambda: F.cross_entropy(model(tokens), targets))
        z = site_noise(theirs, seed, step, 0, dist)
        plus, minus = (F.cross_entropy(shifted(theirs, z, s * eps, tokens), targets).item() for s in (1, -1))
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                p -= lr * (plus - minus) / (2 * eps) * z[name]
    ours, textbook = moved(model, start), moved(theirs, start)
    assert textbook.norm() > 0.5
    assert (ours - textbook).norm() < 1e-3 * textbook.norm()
    assert F.cross_entropy(model(tokens), targets) < F.cross_entropy(reader()[0](tokens), targets) - 0.05


def gradient(optimizer, model, tokens, targets, lr=1.0):
    """What a step subtracts at lr 1, less what momentum and decay would add."""
    start = copies(model)
    optimizer.step(lambda: F.cross_entropy(model(tokens), targets))
    return -moved(model, start) / lr


def flat(noise):
    return torch.cat([z.flatten() for z in noise.values()])


@pytest.mark.parametrize("two_sided", [True, False])
def test_many_probes_are_the_mean_of_their_estimates(two_sided):
    model, tokens, targets = reader()
    eps, probes = 1e-2, 3
    clean = F.cross_entropy(model(tokens), targets)
    expected = 0.0
    for draw in range(probes):
        z = site_noise(model, 0, 0, draw)
        plus, minus = (F.cross_entropy(shifted(model, z, s * eps, tokens), targets).item() for s in (1, -1))
        slope = (plus - minus) / (2 * eps) if two_sided else (plus - clean.item()) / eps
        expected = expected + slope * flat(z) / probes
    found = gradient(MeZO(model, lr=1.0, eps=eps, probes=probes, two_sided=two_sided), model, tokens, targets)
    assert (found - expected).norm() < 2e-3 * expected.norm()


def test_fzoo_divides_one_sided_differences_by_the_losses_deviation():
    model, tokens, targets = reader()
    eps, probes, lr = 1e-2, 6, 1e-3
    noises = [site_noise(model, 0, 0, draw, "rademacher") for draw in range(probes)]
    losses = torch.stack([F.cross_entropy(shifted(model, z, eps, tokens), targets) for z in noises]).double()
    clean = F.cross_entropy(model(tokens), targets).double()
    g = sum((loss - clean) / (eps * probes) * flat(z).double() for loss, z in zip(losses, noises, strict=True))
    deviation = ((losses - losses.mean()).square().sum() / (probes - 1)).sqrt()
    found = gradient(FZOO(model, lr=lr, eps=eps, probes=probes), model, tokens, targets, lr)
    assert (found - g / deviation).norm() < 2e-3 * (g / deviation).norm()


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_es_weighs_the_noise_of_members_by_ranks(antithetic, maximize):
    """Any fitness, here one that is no tensor and has ties: the number of right answers."""
    model, tokens, targets = reader()
    sigma, population, lr = 0.3, 8, 1e-3

    def right(outputs):
        return int((outputs.argmax(-1) == targets).sum())

    half = population // 2
    signed = [(m % half, 1 if m < half else -1) if antithetic else (m, 1) for m in range(population)]
    noises = [(site_noise(model, 0, 0, draw), sign) for draw, sign in signed]
    fitness = [right(shifted(model, z, sign * sigma, tokens)) * (-1 if maximize else 1) for z, sign in noises]
    assert len(set(fitness)) > 1
    ranks = [sum(f < own for f in fitness) + (sum(f == own for f in fitness) - 1) / 2 for own in fitness]
    expected = sum(
        (r / (population - 1) - 0.5) * sign * flat(z) / (population * sigma)
        for r, (z, sign) in zip(ranks, noises, strict=True)
    )
    optimizer = ES(model, lr, sigma, population, antithetic=antithetic, maximize=maximize)
    start = copies(model)
    optimizer.step(lambda: right(model(tokens)))
    assert (-moved(model, start) / lr - expected).norm() < 1e-3 * expected.norm()


def test_eggroll_moves_along_its_low_rank_noise():
    model, tokens, targets = reader()
    sigma, population, rank, lr = 0.05, 6, 2, 1e-3
    step_key = ulr.fold_in(0, 0)

    def noise(draw):
        found = {}
        for name, p in model.named_parameters():
            key = ulr.fold_in(step_key, contract.site_id(name))
            if p.dim() < 2:
                found[name] = ulr.noise_like(p, key, draw=draw)
                continue
            a, b = (ulr.noise((rank, n), ulr.fold_in(key, i), draw=draw) for i, n in ((1, len(p)), (2, p[0].numel())))
            found[name] = (a.T @ b / rank**0.5).view(p.shape)
        return found

    losses, noises = [], []
    for member in range(population):
        z, sign = noise(member % 3), 1 if member < 3 else -1
        noises.append(sign * flat(z))
        losses.append(F.cross_entropy(shifted(model, z, sign * sigma, tokens), targets).double())
    scores = (torch.stack(losses) - sum(losses) / population) / torch.stack(losses).std(correction=0)
    expected = sum(s * z for s, z in zip(scores, noises, strict=True)) / (population * sigma)
    optimizer = EGGROLL(model, lr, sigma, population, rank)
    start = copies(model)
    optimizer.step_batch(tokens, targets, cross_entropy)
    assert (-moved(model, start) / lr - expected).norm() < 2e-3 * expected.norm()


MANY = {
    "mezo": functools.partial(MeZO, probes=3),
    "fzoo": functools.partial(FZOO, probes=6),
    "eggroll": functools.partial(EGGROLL, population=8),
    "es": functools.partial(ES, population=6, antithetic=False),
}


@pytest.mark.parametrize("make", MANY.values(), ids=MANY)
def test_members_in_one_forward_lose_what_they_lose_one_by_one(make):
    model, tokens, targets = reader()
    optimizer = make(model)
    optimizer.accumulate(lambda: F.cross_entropy(model(tokens), targets))
    one_by_one = optimizer._losses.pop()
    for chunk in (None, 5, 1):
        optimizer.accumulate_batch(tokens, targets, cross_entropy, chunk)
        torch.testing.assert_close(optimizer._losses.pop().mean(1, keepdim=True), one_by_one, rtol=2e-6, atol=2e-6)


# --- the noise -------------------------------------------------------------------------------------------------------


class Seen(nn.Module):
    """Its outputs are its parameters, each by the way in which models use such."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = (nn.Linear(48, 40) for _ in range(2))
        self.table = nn.Embedding(37, 24)
        self.image = nn.Conv2d(3, 20, (2, 5))
        self.product = nn.Parameter(torch.empty(24, 50))
        self.norm = nn.LayerNorm(100)

    def forward(self):
        eye = torch.eye(48)
        for layer in (self.linear, self.other):
            yield (layer(torch.zeros(1, 48))[0],)
            yield (F.linear(eye, layer.weight).T,)
        yield (self.table(torch.arange(37)),)
        yield (self.image(torch.eye(30).view(30, 3, 2, 5)).view(30, 20).T - self.image.bias[:, None],)
        yield (torch.eye(24) @ self.product,)
        yield (F.layer_norm(torch.zeros(1, 100), (100,), self.norm.weight, self.norm.bias)[0],)


NAMES = "linear.bias linear.weight other.bias other.weight table.weight image.weight product norm.bias".split()


def seen(model: Seen, optimizer, draw: int) -> dict[str, Tensor]:
    """The noise that a forward sees: the weights are 0 and its scale is 1."""
    with torch.no_grad(), optimizer._probing(Draws(draw), 1):
        return {name: values.clone() for name, (values,) in zip(NAMES, model(), strict=True)}


def zeroed() -> Seen:
    model = Seen()
    for p in model.parameters():
        p.data.zero_()
    return model


def test_update_moves_along_the_very_noise_of_the_forward(device):
    """With weights 0, scale 1 and coefficient 1 both are the noise itself, without rounding."""
    needs(device, "perturbed_linear", "perturbed_embedding", "perturbed_conv2d", "combine_")
    model = zeroed()
    optimizer = MeZO(model, eps=1.0, lr=1.0)
    forward = seen(model, optimizer, 0)
    parameters = dict(model.named_parameters())
    update = ulr.optim.Update(0, ulr.fold_in(0, 0), torch.tensor([-1.0]), (ulr.optim.Group(1.0, 1.0),))
    optimizer.rule.apply(update, parameters, {})
    assert len(forward) == 8
    for name, noise in forward.items():
        if name == "image.weight":  # read as a sum with the bias, less the bias
            torch.testing.assert_close(noise, parameters[name].view(20, -1), rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(noise, parameters[name]), name
        assert noise.std() > 0.8


def test_noise_differs_between_layers_steps_and_probes():
    model = zeroed()
    optimizer = MeZO(model, eps=1.0)
    streams = [seen(model, optimizer, draw) for draw in (0, 1)]
    optimizer.steps = 1
    streams.append(seen(model, optimizer, 0))
    weights = [values[name].flatten() for values in streams for name in ("linear.weight", "other.weight")]
    correlations = torch.corrcoef(torch.stack(weights)) - torch.eye(len(weights))
    assert correlations.abs().max() < 4.5 / len(weights[0]) ** 0.5


def test_eggroll_noise_has_its_rank_and_variance():
    rank, sigma = 3, 0.1
    layer = nn.Linear(96, 80, bias=False)
    layer.weight.data.zero_()
    optimizer = EGGROLL(layer, sigma=sigma, rank=rank)
    squares = []
    for draw in range(200):
        with torch.no_grad(), optimizer._probing(Draws(draw), 1):
            noise = layer(torch.eye(96)).T.clone()
        if draw < 4:
            assert torch.linalg.matrix_rank(noise, rtol=1e-4) == rank
        squares.append(noise.square().mean())
    squares = torch.stack(squares) / sigma**2
    error = squares.std() / len(squares) ** 0.5
    assert error < 0.015
    assert abs(squares.mean() - 1) < 4 * error


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
    parts.zero_grad()
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
        (lambda: EGGROLL(model, population=5), "ulr.optim.EGGROLL: 'population' must be even"),
        (lambda: ES(model, shaping="none at all"), "'shaping' must be 'none' or 'zscore' or 'rank' or 'group'"),
        (lambda: EGGROLL(model, rank=0), "'rank' must be an integer above 0, or None, got 0"),
        (lambda: MeZO(model).step(), "'closure' must be given"),
        (lambda: MeZO(model).step(lambda: model(tokens)), "'closure' must return one loss"),
    ):
        with pytest.raises(ValueError, match=text.replace("(", r"\(").replace("[", r"\[")):
            make()


def test_a_parameter_that_no_call_meets_is_named():
    model, tokens, targets = reader()
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="none of unused.weight, unused.bias"):
        MeZO(model).step(lambda: F.cross_entropy(model(tokens), targets))


def test_a_forward_that_writes_its_weights_is_refused():
    layer = nn.Linear(3, 3)

    def closure():
        layer.weight.mul_(0.5)
        return layer(torch.ones(1, 3)).sum()

    with pytest.raises(RuntimeError, match="must not write a trained parameter, got mul_"):
        MeZO(layer).step(closure)


def test_rows_that_cannot_be_told_apart_are_refused():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x @ (self.scale * 2.0)

    with pytest.raises(ValueError, match="mul with a trained parameter must have an input with the 32 samples of 8"):
        ES(Shared(), population=8).step_batch(torch.ones(4, 3), None, lambda out, _: out)


def test_rows_that_depend_on_one_another_are_refused():
    class Running(nn.Linear):
        def forward(self, x):
            return super().forward(x + x.cumsum(0)).square().sum(1)

    model = filled(Running(3, 2))
    with pytest.raises(ValueError, match="'model' must compute each row from its own inputs"):
        ES(model, population=8).step_batch(v(1, 4, 3), None, lambda out, _: out)


def test_state_of_other_parameters_is_refused():
    model, _, _ = reader()
    with pytest.raises(ValueError, match="'state_dict' must be of the parameters"):
        MeZO(model).load_state_dict(MeZO(nn.Linear(2, 2)).state_dict())
    with pytest.raises(ValueError, match="'state_dict' must hold the settings"):
        MeZO(model).load_state_dict(FZOO(model).state_dict())


def test_names_are_those_of_the_contract():
    model, _, _ = reader()
    rule = MeZO(torch.nn.DataParallel(model)).rule
    assert isinstance(rule, Rule) and rule.names == (tuple(parameter_names(model).values()),)
    assert "head.weight" not in rule.names[0] and "words.weight" in rule.names[0]


def test_mode_lets_questions_through():
    layer = nn.Linear(3, 2)
    with MeZO(layer)._probing(Draws(), 1) as probing:
        assert layer.weight.shape == (2, 3) and layer.weight.dtype == torch.float32 and layer.weight.dim() == 2
        assert not probing.met
