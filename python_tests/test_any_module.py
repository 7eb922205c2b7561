"""ulr.ULR on every layer type, and on functions that are no layer's: unbiased, and as the formula says."""

import pytest
import small_models
import torch
import torch.nn.functional as F
from small_models import assert_same, filled, gradients, half_squares, v
from torch import nn
from z_test import assert_unbiased, estimates, flat

import ulr_kernels as ulr

modules_may_draw = small_models.modules_may_draw  # used by every test of this file


class Function(nn.Module):
    """Parameters in a function of torch's."""

    def __init__(self, function, **shapes):
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(self, x):
        return self.function(self, x)


class Attention(nn.Module):
    def __init__(self, own_keys, **settings):
        super().__init__()
        self.attention, self.own_keys = nn.MultiheadAttention(4, 2, batch_first=True, **settings), own_keys

    def forward(self, x):
        keys = x if self.own_keys else torch.tanh(x[:, :2])
        return self.attention(x, keys, keys, need_weights=False)[0]


class Tokens(nn.Module):
    """A class token and positions, as in a vision transformer; a position table that no sample enters."""

    def __init__(self):
        super().__init__()
        self.token, self.places = nn.Parameter(torch.empty(1, 1, 2)), nn.Parameter(torch.empty(1, 3, 2))
        self.table = nn.Embedding(4, 2)

    def forward(self, x):
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.places
        return x + self.table(torch.arange(3)[None])


class Indices(nn.Module):
    """A table that is read at the place of each row's largest number, which noise does not change."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, x):
        return self.table(x.argmax(-1)) + x.mean((1, 2))[:, None]


class Steps(nn.Module):
    """A recurrent layer, of whose output and last states all is used; `start`: from states that are trained."""

    def __init__(self, kind, start=0, **settings):
        super().__init__()
        self.layer = getattr(nn, kind)(4, 2, batch_first=True, **settings)
        self.start = nn.ParameterList(torch.empty(1, 1, 2) for _ in range(start))

    def forward(self, x):
        start = [each.expand(-1, len(x), -1) for each in self.start]
        out, last = self.layer(x, (start[0] if len(start) == 1 else tuple(start)) if start else None)
        return torch.cat([out.flatten(1), *(last if isinstance(last, tuple) else (last,))[-1]], 1)


class OwnSteps(nn.Module):
    """A cell in a loop."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        states = None
        for x_t in x.unbind(1):
            states = self.cell(x_t, states)
        return torch.cat(states, 1) if isinstance(states, tuple) else states


def in_place(self, x):
    h = x + 0
    h += self.shift
    h -= self.other
    return h


LAYERS = {
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), groups=2), (2, 3, 3)),
    "conv2d same": (lambda: nn.Conv2d(1, 2, 3, padding="same", bias=False), (1, 3, 2)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 2, 2)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(2, 2, 2, stride=2), (2, 3)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(2, 2, 2, stride=2, padding=1, output_padding=1), (2, 2, 2)),
    "layer norm": (lambda: nn.LayerNorm(4), (3, 4)),
    "layer norm of two axes": (lambda: nn.LayerNorm((3, 4)), (3, 4)),
    "rms norm": (lambda: nn.RMSNorm(4), (3, 4)),
    "batch norm": (lambda: nn.BatchNorm2d(3), (3, 2, 2)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(5), (5,)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "instance norm": (lambda: nn.InstanceNorm2d(2, affine=True), (2, 2, 3)),
    "self-attention": (lambda: Attention(True), (2, 4)),
    "attention": (lambda: Attention(False, add_bias_kv=True, add_zero_attn=True), (3, 4)),
    "tokens": (Tokens, (2, 2)),
    "gru cell": (lambda: nn.GRUCell(4, 3), (4,)),
    "rnn cell": (lambda: OwnSteps(nn.RNNCell(4, 2)), (2, 4)),
    "lstm cell": (lambda: OwnSteps(nn.LSTMCell(4, 2)), (2, 4)),
    "rnn": (lambda: Steps("RNN", nonlinearity="relu", bias=False), (3, 4)),
    "gru": (lambda: Steps("GRU", start=1), (3, 4)),
    "lstm": (lambda: Steps("LSTM", start=2), (3, 4)),
    "gru of two layers": (lambda: Steps("GRU", num_layers=2, bidirectional=True), (2, 4)),
    "lstm of two layers": (lambda: Steps("LSTM", num_layers=2, proj_size=1), (2, 4)),
    "embedding bag": (lambda: Indices(nn.EmbeddingBag(4, 2, padding_idx=1)), (3, 4)),
    "depthwise": (lambda: nn.Conv2d(2, 4, 2, groups=2, padding=1, padding_mode="circular"), (2, 2, 2)),
    "transposed, all": (
        lambda: nn.ConvTranspose2d(4, 2, (2, 1), stride=(2, 3), output_padding=(1, 0), groups=2, dilation=(2, 1)),
        (4, 2, 1),
    ),
    "prelu": (lambda: nn.PReLU(3), (3, 4)),
    "bilinear": (lambda: Function(lambda s, x: F.bilinear(x, x.sin(), s.weight), weight=(3, 4, 4)), (4,)),
    "einsum": (lambda: Function(lambda s, x: torch.einsum("bpk,kn->bpn", x, s.w), w=(4, 3)), (2, 4)),
    "gate": (lambda: Function(lambda s, x: x.tanh() / s.scale - s.shift, scale=(4,), shift=()), (4,)),
    "one number": (lambda: Function(lambda s, x: (s.gain * (x @ s.w) + s.b)[:, None], w=(4,), gain=(), b=()), (4,)),
    "in place": (lambda: Function(in_place, shift=(2, 4), other=(4,)), (2, 4)),
    "normalised weight": (lambda: Function(lambda s, x: x @ (s.w / s.w.norm()).T, w=(3, 4)), (4,)),
}  # fmt: skip


@pytest.mark.parametrize("injection", ["layerwise", "joint"])
@pytest.mark.parametrize("layer", LAYERS)
def test_unbiased(layer, injection):
    """Small noise: autograd of the clean loss is right to 0.1 per cent. The layer's input is noised too, jointly."""
    make, shape = LAYERS[layer]
    model = filled(nn.Sequential(Function(lambda s, x: x + s.before, before=(1,)), make()), 0.7).eval()
    x = v(1, *shape)
    target = v(2, *model(x[None]).shape[1:])
    exact = flat(torch.autograd.grad(half_squares(model(x[None]), target[None]).sum(), model.parameters()))
    sigma = dict.fromkeys(ulr.ULR(model).view.layers.values(), 0.01) | {"0.before": 0.001}
    samples = estimates(model, x, target, half_squares, sigma=sigma, injection=injection, copies=4, noised_rows=2**15)
    assert_unbiased(samples[:, 1:], exact[1:])


@pytest.mark.parametrize("layer", ["tokens", "group norm", "transposed 2d"])
def test_the_law_holds(layer):
    """Its Jacobian is each function's own, also that of rows made from a parameter."""
    make, shape = LAYERS[layer]
    model, x = filled(make(), 0.7), v(1, 2, *shape)
    report = ulr.check(model, x, v(2, *model(x).shape), half_squares, sigma=0.01, copies=32, steps=24)
    assert report.ok, report
    for each in report.layers:
        assert each.cosine == pytest.approx(each.predicted_cosine, abs=max(0.04, 4.5 * each.cosine_error))


class Gated(nn.Module):
    """A function of samples that have noise and of samples that have none."""

    def __init__(self):
        super().__init__()
        self.layer, self.gate = nn.Linear(3, 3), nn.Parameter(torch.empty(3))

    def forward(self, x):
        return torch.addcmul(x, torch.tanh(self.layer(x)), self.gate)


def test_samples_without_noise_meet_such_with_noise():
    model, x, target = filled(Gated(), 0.7), v(1, 3), v(2, 3)
    exact = flat(torch.autograd.grad(half_squares(model(x[None]), target[None]).sum(), model.parameters()))
    settings = {"sigma": 0.01, "injection": "joint", "copies": 4, "noised_rows": 2**15}
    assert_unbiased(estimates(model, x, target, half_squares, **settings), exact)


@pytest.mark.parametrize("injection", ["layerwise", "joint"])
@pytest.mark.parametrize(
    "make", [Tokens, lambda: Attention(True, add_bias_kv=True), lambda: nn.GRUCell(2, 3)], ids=["tokens", "keys", "gru"]
)
def test_parts_of_one_sample(make, injection):
    """A row that is made of a parameter looks like the parameter where a forward has one row."""
    model = filled(make(), 0.7)
    x = v(1, 3, 2) if isinstance(model, nn.GRUCell) else v(1, 3, 2, 2 if isinstance(model, Tokens) else 4)
    settings = {"batch": (x, v(2, *model(x).shape)), "loss_fn": half_squares, "injection": injection}
    _, expected = gradients(model, **settings)
    for rows in (2, 4):
        _, found = gradients(model, max_rows=rows, **settings)
        assert_same(expected, found, 1e-3)
