"""The optimisers: their estimates and their noise, against formulas written out with the same noise."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from reader_model import Reader, copies, moved, needs, reader, shifted, site_noise
from small_models import cross_entropy, filled, modules_may_draw, v  # noqa: F401
from torch import Tensor, nn

import ulr_kernels as ulr
from ulr_kernels import noise_contract
from ulr_kernels.nn.perturbed import WeightDraws
from ulr_kernels.optim import EGGROLL, ES, FZOO, MeZO

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
    """The amount that a step subtracts at lr 1, without momentum and decay."""
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


@pytest.mark.parametrize("antithetic", [True, False])
def test_eggroll_moves_along_its_low_rank_noise(antithetic):
    model, tokens, targets = reader()
    sigma, population, rank, lr = 0.05, 6, 2, 1e-3
    step_key = ulr.fold_in(0, 0)

    def noise(draw):
        found = {}
        for name, p in model.named_parameters():
            key = ulr.fold_in(step_key, noise_contract.site_id(name))
            if p.dim() < 2:
                found[name] = ulr.noise_like(p, key, draw=draw)
                continue
            a, b = (ulr.noise((rank, n), ulr.fold_in(key, i), draw=draw) for i, n in ((1, len(p)), (2, p[0].numel())))
            found[name] = (a.T @ b / rank**0.5).view(p.shape)
        return found

    losses, noises = [], []
    for member in range(population):
        z, sign = (noise(member % 3), 1 if member < 3 else -1) if antithetic else (noise(member), 1)
        noises.append(sign * flat(z))
        losses.append(F.cross_entropy(shifted(model, z, sign * sigma, tokens), targets).double())
    scores = (torch.stack(losses) - sum(losses) / population) / torch.stack(losses).std(correction=0)
    expected = sum(s * z for s, z in zip(scores, noises, strict=True)) / (population * sigma)
    optimizer = EGGROLL(model, lr, sigma, population, rank, antithetic=antithetic)
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


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tables_are_read_by_indices_of_either_width(dtype):
    model, tokens, targets = reader()
    optimizer = ES(model, population=4)
    optimizer.accumulate(lambda: F.cross_entropy(model(tokens.to(dtype)), targets))
    one_by_one = optimizer._losses.pop()
    optimizer.accumulate_batch(tokens.to(dtype), targets, cross_entropy)
    torch.testing.assert_close(optimizer._losses.pop().mean(1, keepdim=True), one_by_one, rtol=2e-6, atol=2e-6)


class Recurrent(nn.Module):
    """With initial states of the samples' own."""

    def __init__(self, kind: str, packed: bool = False, **more) -> None:
        super().__init__()
        self.cells = getattr(nn, kind)(5, 4, 2, **more)
        self.packed = packed

    def forward(self, x):
        state = torch.stack([x[:, 0, :4]] * (4 if self.cells.bidirectional else 2))
        state = (state, 2 * state) if isinstance(self.cells, nn.LSTM) else state
        if self.packed:
            pack = nn.utils.rnn.pack_padded_sequence(x, torch.full((len(x),), x.shape[1]), batch_first=True)
            return self.cells(pack, state)[1].sum(0)
        out, last = self.cells(x if self.cells.batch_first else x.transpose(0, 1), state)
        last = last[0] if isinstance(last, tuple) else last
        return (out.mean(1) if self.cells.batch_first else out.mean(0)).sum(1, keepdim=True) + last.sum(0)


@pytest.mark.parametrize("more", [{"batch_first": True}, {}, {"batch_first": True, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_members_share_a_forward_of_recurrent_layers(kind, more):
    with torch.random.fork_rng(devices=[]):
        model = filled(Recurrent(kind, **more))
    x, targets = v(1, 3, 7, 5), torch.arange(3)
    optimizer = ES(model, population=4, sigma=0.1)
    optimizer.accumulate(lambda: F.cross_entropy(model(x), targets))
    one_by_one = optimizer._losses.pop()
    optimizer.accumulate_batch(x, targets, cross_entropy)
    torch.testing.assert_close(optimizer._losses.pop().mean(1, keepdim=True), one_by_one, rtol=1e-5, atol=1e-5)


def test_packed_sequences_are_probed_by_one_member_at_a_time():
    with torch.random.fork_rng(devices=[]):
        model = filled(Recurrent("GRU", packed=True, batch_first=True))
    x, targets = v(1, 3, 7, 5), torch.arange(3)
    optimizer = ES(model, population=4, sigma=0.1)
    with pytest.raises(ValueError, match=r"gru .* must have an input \[samples, time, features\] .* not packed"):
        optimizer.step_batch(x, targets, cross_entropy)
    assert optimizer.step(lambda: F.cross_entropy(model(x), targets)).isfinite()


@pytest.mark.parametrize("heads_see", ["the same", "their own"])
def test_members_share_a_forward_of_masked_attention(heads_see):
    """With as many keys as rows, and masks of samples beside one that all of them share; its weights are used too."""

    class Attention(nn.MultiheadAttention):
        def forward(self, x, lengths):
            past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            past = past if heads_see == "the same" else past.expand(2 * len(x), -1, -1)
            padding = torch.arange(x.shape[1]) >= lengths[:, None]
            out, weights = super().forward(x, x, x, key_padding_mask=padding, attn_mask=past)
            return (out * weights.square().sum(1)[..., None]).sum((1, 2))

    model = filled(Attention(4, 2, batch_first=True), 0.7)
    x, lengths = v(1, 2, 16, 4), torch.tensor([9, 16])
    optimizer = ES(model, population=8)
    optimizer.accumulate(lambda: model(x, lengths).mean())
    one_by_one = optimizer._losses.pop()
    optimizer.accumulate_batch((x, lengths), None, lambda out, _: out)
    torch.testing.assert_close(optimizer._losses.pop().mean(1, keepdim=True), one_by_one, rtol=1e-5, atol=1e-6)


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
        device = self.product.device
        eye = torch.eye(48, device=device)
        for layer in (self.linear, self.other):
            yield (layer(torch.zeros(1, 48, device=device))[0],)
            yield (F.linear(eye, layer.weight).T,)
        yield (self.table(torch.arange(37, device=device)),)
        yield (self.image(torch.eye(30, device=device).view(30, 3, 2, 5)).view(30, 20).T - self.image.bias[:, None],)
        yield (torch.eye(24, device=device) @ self.product,)
        yield (F.layer_norm(torch.zeros(1, 100, device=device), (100,), self.norm.weight, self.norm.bias)[0],)


NAMES = "linear.bias linear.weight other.bias other.weight table.weight image.weight product norm.bias".split()


def seen(model: Seen, optimizer, draw: int) -> dict[str, Tensor]:
    """The noise that a forward sees: the weights are 0 and its scale is 1."""
    with torch.no_grad(), optimizer._perturbed(WeightDraws(draw), 1):
        return {name: values.clone() for name, (values,) in zip(NAMES, model(), strict=True)}


def zeroed(device: str = "cpu") -> Seen:
    model = Seen().to(device)
    for p in model.parameters():
        p.data.zero_()
    return model


def test_update_moves_along_the_very_noise_of_the_forward(device):
    """With weights 0, scale 1 and coefficient 1 both are the noise itself, without rounding."""
    needs(device, "perturbed_linear", "perturbed_embedding", "perturbed_conv2d", "combine_")
    model = zeroed(device)
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


@pytest.mark.parametrize("shape", [(5, 4), (6, 4, 1, 1)], ids=["linear", "conv2d"])
def test_a_layers_input_may_be_a_parameter(shape):
    """As latents and queries are: it has noise as the weight has."""
    model = nn.ParameterDict({"x": torch.empty(3, *shape[1:]), "weight": torch.empty(shape)})
    filled(model, 0.7)
    layer = F.linear if len(shape) == 2 else F.conv2d
    z, outputs = site_noise(model, 0, 0, 0), []

    def closure():
        outputs.append(layer(model["x"], model["weight"]))
        return outputs[-1].sum()

    MeZO(model, eps=0.1).accumulate(closure)
    expected = layer(*(model[name] + 0.1 * z[name] for name in ("x", "weight")))
    torch.testing.assert_close(outputs[0], expected, rtol=1e-5, atol=1e-5)


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
        with torch.no_grad(), optimizer._perturbed(WeightDraws(draw), 1):
            noise = layer(torch.eye(96)).T.clone()
        if draw < 4:
            assert torch.linalg.matrix_rank(noise, rtol=1e-4) == rank
        squares.append(noise.square().mean())
    squares = torch.stack(squares) / sigma**2
    error = squares.std() / len(squares) ** 0.5
    assert error < 0.015
    assert abs(squares.mean() - 1) < 4 * error
