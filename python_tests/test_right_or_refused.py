"""Situations that users of such estimators report: ulr.ULR's gradient is right in them, or it refuses by name.

A right slope, <estimate, gradient> / |gradient|^2, is 1; the gradient is autograd's, of the same model or of one that
computes the same openly.
"""

import copy
import functools
import io
import itertools
import pickle
import threading
import warnings
from collections import UserDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import small_models
import torch
import torch.nn.functional as F
from small_models import filled, v
from torch import nn

import ulr_kernels as ulr

modules_may_draw = small_models.modules_may_draw  # used by every test of this file

X, Y = v(1, 6, 5), v(2, 6, 4)
MANY = {"sigma": 0.01, "copies": 2048}
WAYS = ({}, {"injection": "joint"}, {"injection": "joint", "memory": "recompute"}, {"max_rows": 6000})


def squares(outputs, targets):
    return (outputs - targets).square().mean(-1)


class Net(nn.Module):
    """`function(model, x)` with some modules and parameters."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def net(function, **parts):
    made = {name: nn.Parameter(torch.empty(part)) if isinstance(part, tuple) else part for name, part in parts.items()}
    return filled(Net(function, **made))


def linear(inputs=5, outputs=4, **more):
    return nn.Linear(inputs, outputs, **more)


def autograd(model, x, y, loss_fn):
    model.zero_grad()
    outputs = model.eval()(**x) if isinstance(x, dict) else model.eval()(x)
    loss_fn(outputs, y).mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_right(model, loss_fn=squares, x=X, y=Y, openly=None, tolerance=0.2, steps=1, **settings):
    expected = autograd(openly or model, x, y, openly_of(loss_fn, model, openly))
    estimator = ulr.ULR(model, **{**MANY, **settings})
    for _ in range(steps):
        estimator.backward(x, y, loss_fn)
    for name, p in model.named_parameters():
        if name in expected and expected[name].any():
            assert p.grad is not None, name
            g, found = expected[name].double(), p.grad.double() / steps
            slope = float((found * g).sum() / g.square().sum())
            assert slope == pytest.approx(1, abs=tolerance), (name, slope, settings)
    model.zero_grad()


def openly_of(loss_fn, model, openly):
    return loss_fn if openly is None else getattr(loss_fn, "openly", loss_fn)


def refused(message, model, loss_fn=squares, x=X, y=Y, **settings):
    with pytest.raises(ValueError, match=message):
        ulr.ULR(model, **{"sigma": 0.1, "copies": 4, **settings}).backward(x, y, loss_fn)
    assert all(p.grad is None for p in model.parameters())
    report = ulr.check(model, x, y, loss_fn, steps=2, **{"sigma": 0.1, "copies": 4, **settings})
    assert not report.ok and ulr.check.__name__ == "check"


# --- sums of layers' outputs with a term that is seen elsewhere ------------------------------------------------------


def of_both(outputs, targets):
    first, second = outputs
    return squares(first, targets) + squares(second.sin(), targets)


def returned(m, x):
    h = m.a(x)
    return h, h + m.b(x)


def three(m, x):
    h = m.a(x)
    g = h + m.b(x)
    return g, g + m.c(x)


def hidden_reader(m, x):
    h = m.a(x)
    return h, h + m.b(x + torch.from_numpy(h.detach().numpy() * 0))


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_a_term_of_a_sum_that_is_returned_has_its_own_noise(settings):
    assert_right(net(returned, a=linear(), b=linear()), of_both, **settings)
    assert_right(net(three, a=linear(), b=linear(), c=linear()), of_both, **settings)


@pytest.mark.parametrize("keep", ["attribute", "hook"])
def test_a_term_that_the_model_keeps_has_its_own_noise(keep):
    def forward(m, x):
        h = m.a(x)
        if keep == "attribute":
            m.kept = h
        return h + m.b(x)

    model = net(forward, a=linear(), b=linear())
    if keep == "hook":
        model.a.register_forward_hook(lambda module, args, output: setattr(model, "kept", output))
    assert_right(model, lambda outputs, y: squares(outputs.sin(), y) + squares(model.kept, y))


# --- functions that torch's overrides do not show --------------------------------------------------------------------


class Signs(torch.autograd.Function):
    """Signs with a straight-through derivative."""

    @staticmethod
    def forward(ctx, w):
        return w.sign() * w.abs().mean()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient @ w, gradient.T @ x


@pytest.mark.parametrize("settings", WAYS[:3], ids=str)
def test_custom_autograd_functions(settings):
    signs = Signs.apply
    for forward, bias in (
        (lambda m, x: F.linear(x, signs(m.l.weight), m.l.bias), True),
        (lambda m, x: F.linear(x, signs(m.l.weight)), False),
        (lambda m, x: F.linear(x, signs(m.l.weight), m.l.bias) + F.linear(x.sin(), m.l.weight), True),
        (lambda m, x: Product.apply(x, m.l.weight) + m.l.bias, True),
    ):
        assert_right(net(forward, l=linear(bias=bias)), **settings)
    reentrant = net(lambda m, x: torch.utils.checkpoint.checkpoint(m.l, x, use_reentrant=True), l=linear())
    assert_right(reentrant, openly=net(lambda m, x: m.l(x), l=linear()), **settings)
    assert ulr.check(net(lambda m, x: F.linear(x, signs(m.l.weight)), l=linear(bias=False)), X, Y, squares, **MANY).ok


@torch.jit.script
def scripted(h):
    return 2 * torch.tanh(h)


HIDDEN = {
    "script": (scripted, lambda h: 2 * torch.tanh(h)),
    "numpy": (lambda h: torch.from_numpy(np.tanh(h.detach().numpy())), torch.tanh),
    "list": (lambda h: torch.tensor(h.tolist()), lambda h: h),
}


@pytest.mark.parametrize("settings", WAYS, ids=str)
@pytest.mark.parametrize("kind", HIDDEN)
def test_a_hidden_function_of_noised_tensors_is_followed_by_values(kind, settings):
    of_model, openly = HIDDEN[kind]
    make = [lambda m, x, f=f: m.b(x + f(m.a(x))) for f in (of_model, openly)]
    model, twin = (net(forward, a=linear(5, 5), b=linear()) for forward in make)
    assert_right(model, openly=twin, **settings)
    refused(
        "hide that a result depends on samples", net(lambda m, x: m.b(of_model(m.a(x))), a=linear(5, 5), b=linear())
    )


def in_threads(m, x):
    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(lambda layer: layer(x), [m.a, m.b]))


def in_a_thread_too(m, x):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(m.a, x).result() + m.a(x.sin())


def by_vmap(m, x):
    return torch.vmap(lambda w: x @ w)(m.w).sum(0)


def by_vmap_too(m, x):
    return torch.vmap(lambda row: row @ m.w[0])(x) + x @ m.w[0]


def an_ensemble(m, x):
    base = linear()

    def one(weight, bias):
        return torch.func.functional_call(base, {"weight": weight, "bias": bias}, (x,))

    return torch.vmap(one)(m.w, m.b).mean(0)


def test_hidden_parameters_are_named():
    refused("thread", net(in_threads, a=linear(), b=linear()))
    refused("thread", net(in_a_thread_too, a=linear()))
    refused("vmap", net(by_vmap, w=(3, 5, 4)))
    refused("vmap", net(by_vmap_too, w=(3, 5, 4)))
    refused("vmap", net(an_ensemble, w=(3, 4, 5), b=(3, 4)))
    body = filled(nn.Sequential(linear(), nn.Tanh(), linear(4, 4)))
    for module in (
        torch.jit.script(body),
        torch.jit.trace(body, X),
        nn.Sequential(torch.jit.script(body), linear(4, 4)),
    ):
        refused("torch.jit", module)


def forces(m, x):
    train = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(m.b(torch.tanh(m.a(x))).sum(), x, create_graph=train)[0]


def test_derivatives_inside_a_forward_are_refused():
    model = net(forces, a=linear(bias=False), b=linear(4, 1, bias=False))
    refused("'noise' must be 'weights' for a model that differentiates", model, y=X)
    assert_right(model, y=X, noise="weights")
    assert_right(model, y=X, noise="weights", injection="joint")


# --- parameters that the loss depends on past all layers -------------------------------------------------------------


@pytest.mark.parametrize("settings", WAYS, ids=str)
def test_the_gradient_past_all_layers_is_added(settings):
    model = net(lambda m, x: m.l(x), l=linear(), head=linear(4, 4, bias=False))
    model.head.requires_grad_(False)
    assert_right(model, lambda outputs, y: squares(outputs, y) + model.l.weight.square().sum(), **settings)
    model.head.requires_grad_(True)
    assert_right(model, lambda outputs, y: squares(outputs @ model.head.weight, y), **settings)
    model = net(lambda m, x: (m.l(x), m.l.weight.square().sum()), l=linear())
    assert_right(model, lambda outputs, y: squares(outputs[0], y) + outputs[1], **settings)


@pytest.mark.parametrize("injection", ["layerwise", "joint"])
def test_outputs_of_noised_weights_alone(injection):
    """Each copy's penalty is that of its own weights."""
    model = net(lambda m, x: (m.l(x), m.l.weight.square().mean()), l=linear())
    assert_right(model, lambda outputs, y: squares(outputs[0], y) + outputs[1], noise="weights", injection=injection)

    def left(m, x):
        m.penalty = m.l.weight.square().mean()
        return m.l(x)

    model = net(left, l=linear())
    openly = net(lambda m, x: (m.l(x), m.l.weight.square().mean()), l=linear())

    def loss_fn(outputs, y):
        return squares(outputs, y) + model.penalty

    loss_fn.openly = lambda outputs, y: squares(outputs[0], y) + outputs[1]
    assert_right(model, loss_fn, openly=openly)


def test_the_gradient_past_all_layers_counts_once_in_parts_of_a_batch():
    model = net(lambda m, x: m.b(m.a(x)), a=linear(), b=linear(4, 4))

    def loss_fn(outputs, targets):
        return 0 * squares(outputs, targets) + model.a.weight.square().sum()

    for settings in ({"max_rows": 4}, {"allocation": "neyman"}, {"injection": "joint", "max_rows": 6}):
        model.zero_grad()
        ulr.ULR(model, copies=4, **settings).backward(X, Y, loss_fn)
        torch.testing.assert_close(model.a.weight.grad, 2 * model.a.weight.detach())


# --- parameters on their way into layers -----------------------------------------------------------------------------


def written(m, x):
    buffer = torch.zeros(4)
    buffer[torch.arange(4)] = m.p
    return m.l(x) * m.p + buffer


def stacked(m, x):
    parts = [torch.zeros(4) for _ in range(3)]
    for number, part in enumerate(parts):
        part[1:3] = m.p[:2] * number
    return m.l(x) * m.p + torch.stack(parts).sum(0)


def a_factory(m, x):
    return m.l(x) * m.p + torch.zeros(4).fill_(m.p[0]) + torch.empty(4).copy_(m.p)


def a_stopped_scale(m, x):
    with torch.no_grad():
        scale = m.l.weight.abs().max()
    return F.linear(x, m.l.weight / scale, m.l.bias)


@pytest.mark.parametrize("settings", WAYS[:3], ids=str)
@pytest.mark.parametrize("forward", [written, stacked, a_factory, a_stopped_scale], ids=lambda f: f.__name__)
def test_parameters_that_are_written_into_tensors(forward, settings):
    assert_right(
        net(forward, l=linear(), p=(4,)) if forward is not a_stopped_scale else net(forward, l=linear()), **settings
    )


def test_a_softmax_of_weights_is_no_step():
    model = net(lambda m, x: F.linear(x, torch.softmax(m.l.weight, 1), m.l.bias), l=linear())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(model)


def test_numbers_read_from_parameters_are_said_to_be_constants():
    model = net(lambda m, x: m.l(x) * m.p + torch.full((4,), m.p[0].item()), l=linear(), p=(4,))
    with pytest.warns(UserWarning, match="item reads numbers of p: they are constants"):
        assert_right(model)


@pytest.mark.parametrize(
    "function", [torch.sign, torch.round, lambda w: (w > 0).float() + 0 * w], ids=["sign", "round", "step"]
)
def test_a_derivative_of_zero_is_named(function):
    model = net(lambda m, x: F.linear(x, function(m.l.weight), m.l.bias), l=linear())
    with pytest.warns(UserWarning, match=r"the derivative of \w+ in l.weight is 0.*noise=\{'l': 'weights'\}"):
        report = ulr.check(model, X, Y, squares, **MANY)
    assert not report.ok and "derivative" in report.verdict and "'l'" in report.verdict


@pytest.mark.parametrize("noise", ["outputs", "weights"])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_row_of_padding_stays(kind, noise):
    def forward(m, x):
        return m.e(x) if kind is nn.EmbeddingBag else m.e(x).mean(1)

    ids = torch.tensor([[0, 1, 2], [3, 0, 1], [2, 4, 0], [1, 1, 3], [4, 2, 0], [0, 3, 3]])
    model = net(forward, e=kind(5, 4, padding_idx=0))
    assert_right(model, x=ids, noise=noise, sigma=0.05)
    ulr.ULR(model, copies=4, noise=noise).backward(ids, Y, squares)
    assert not model.e.weight.grad[0].any() and model.e.weight.grad[1:].any()


def standardised(m, x):
    weight = F.batch_norm(m.c.weight.reshape(1, 4, -1), None, None, training=True, momentum=0.0)
    return F.conv2d(x, weight.reshape_as(m.c.weight), m.c.bias).mean((2, 3)).exp()


def test_standardised_weights():
    assert_right(net(standardised, c=nn.Conv2d(2, 4, 3)), x=v(1, 6, 2, 5, 5))


# --- trials that must see what the loss does not ---------------------------------------------------------------------


def mixing(m, x):
    h = m.l(x)
    return m.head(h + h.mean(0))


def of_a_gate(m, x):
    h = m.l(x)
    return m.head(x + m.gate * (h + h.mean(0)))


def first_only(m, x):
    h = m.a(x)
    return m.head(h[torch.arange(m.rows)] + 0 * h)


@pytest.mark.parametrize("samples", [1, 6])
@pytest.mark.parametrize("sigma", [1e-4, 0.1])
def test_mixing_shows_where_the_loss_is_blind(samples, sigma):
    x, y, settings = v(1, samples, 5), torch.zeros(samples, dtype=torch.long), {"sigma": sigma}
    message = "each made from its own sample only|noise of other samples|in every forward"

    def errors(outputs, targets):
        return (outputs.argmax(1) != targets).float()

    zero, gate = net(mixing, l=linear(5, 5), head=linear()), net(of_a_gate, l=linear(5, 5), head=linear(), gate=(1,))
    nn.init.zeros_(zero.head.weight)
    nn.init.zeros_(gate.gate)
    refused(message, zero, lambda outputs, _: outputs.sum(1), x, y, **settings)
    refused(message, gate, lambda outputs, _: outputs.sum(1), x, y, **settings)
    refused(message, net(mixing, l=linear(5, 5), head=linear()), errors, x, y, **settings)
    refused(
        message, net(lambda m, x: m.l(x.repeat(4, 1)).view(4, len(x), -1).mean(0), l=linear()), errors, x, y, **settings
    )


def test_a_row_of_one_copy_alone_is_seen_behind_a_head_of_zeros():
    """The last token's place is taken for the samples of one copy: late copies would all read the first one's."""

    def last_token(m, x):
        rows = torch.arange(len(x))
        h = m.a(x)
        return m.head(h[rows, torch.full((len(h),), 2)])

    for samples in (1, 6):
        model = net(last_token, a=linear(5, 4), head=linear(4, 4))
        x, y = v(3, samples, 3, 5), v(2, samples, 4)
        start = copy.deepcopy(model.head.state_dict())
        nn.init.zeros_(model.head.weight)
        estimator = ulr.ULR(model, **MANY)
        estimator.backward(x, y, squares)
        model.head.load_state_dict(start)
        expected = autograd(model, x, y, squares)
        estimator.backward(x, y, squares)
        for name, p in model.a.named_parameters():
            g = expected[f"a.{name}"]
            assert float((p.grad * g).sum() / g.square().sum()) == pytest.approx(1, abs=0.12), name


# --- state of modules ------------------------------------------------------------------------------------------------


class Integrator(nn.Module):
    """A state over time steps, which the forward puts back at its end if it `resets`, else nobody does."""

    def __init__(self, resets):
        super().__init__()
        self.a, self.b, self.v, self.resets = linear(5, 5), linear(), 0.0, resets

    def forward(self, x):
        for _ in range(2):
            self.v = self.v * 0.5 + self.a(x)
        outputs = self.b(self.v.tanh())
        if self.resets:
            self.v = 0.0
        return outputs


class Twin(Integrator):
    def forward(self, x):
        self.v = 0.0
        return super().forward(x)


@pytest.mark.parametrize("settings", [*WAYS, {"memory": "recompute"}], ids=str)
@pytest.mark.parametrize("resets", [True, False])
def test_a_state_is_put_back(resets, settings):
    model = filled(Integrator(resets))
    assert_right(model, openly=filled(Twin(True)), steps=2, **settings)
    assert model.v == 0.0


def test_a_state_of_a_forward_of_the_users_own_is_refused():
    model = filled(Integrator(False))
    with torch.no_grad():
        model(X)
    refused("reset it first", model)  # it has too few rows for copies; test_spiking.py has those that begin anew


def test_hooks_after_a_recomputed_layer_run():
    model, ends = net(lambda m, x: m.b(m.a(x).tanh()), a=linear(), b=linear(4, 4)), []
    model.register_forward_hook(lambda *_: ends.append(1))
    starts = []
    model.register_forward_pre_hook(lambda *_: starts.append(1))
    ulr.ULR(model, copies=4, memory="recompute").backward(X, Y, squares)
    assert len(starts) == len(ends)


class CachesInEval(nn.Module):
    """Computes its bias once in eval mode, as LeViT's attention does."""

    def __init__(self):
        super().__init__()
        self.l, self.p, self.cache = linear(), nn.Parameter(torch.empty(4)), {}

    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def forward(self, x):
        if self.training:
            return self.l(x) + 2 * self.p
        if "bias" not in self.cache:
            self.cache["bias"] = 2 * self.p
        return self.l(x) + self.cache["bias"]


def test_caches_of_eval_mode():
    model = filled(CachesInEval())
    openly = net(lambda m, x: m.l(x) + 2 * m.p, l=linear(), p=(4,))
    openly.load_state_dict(model.state_dict())
    assert_right(model.train(), openly=openly)
    assert model.cache == {}
    with torch.no_grad():
        model.eval()(X)
    kept = model.cache["bias"]
    assert_right(model, openly=openly)
    assert model.cache["bias"] is kept


@pytest.mark.parametrize("max_rows", [None, 6000])
def test_a_loss_may_read_what_the_forward_left(max_rows):
    def forward(m, x):
        m.left = m.a(x)
        return m.b(m.left.tanh())

    model = net(forward, a=linear(), b=linear(4, 4))
    assert_right(model, lambda outputs, y: squares(outputs, y) + model.left.square().mean(1), max_rows=max_rows)


# --- gradients as torch leaves them ----------------------------------------------------------------------------------


def test_narrow_gradients_are_summed_in_fp32():
    model = linear().to(torch.bfloat16)
    filled(model)
    x, y = X.bfloat16().repeat(16, 1), Y.repeat(16, 1)
    exact = copy.deepcopy(model).float()

    def loss_fn(outputs, targets):
        return squares(outputs.float(), targets)

    for settings in ({"max_rows": 2}, {"injection": "joint", "max_rows": 8}):
        for each, inputs in ((model, x), (exact, x.float())):
            each.zero_grad()
            ulr.ULR(each, sigma=0.1, copies=32, **settings).backward(inputs, y, loss_fn)
        assert model.weight.grad.dtype == torch.bfloat16
        error = (model.weight.grad.float() - exact.weight.grad).norm() / exact.weight.grad.norm()
        assert error < 0.05, settings


@pytest.mark.parametrize("fused", [True, False])
def test_hooks_of_parameters_get_the_finished_gradient(fused):
    model, calls = filled(nn.Sequential(linear(), nn.Tanh() if fused else nn.ELU(), linear(4, 4))), []
    loss_fn = functools.partial(F.cross_entropy, reduction="none")
    y = torch.arange(6) % 4
    plain = copy.deepcopy(model)
    ulr.ULR(plain, copies=8, max_rows=12).backward(X, y, loss_fn)
    mask = torch.eye(4, 5)
    model[0].weight.register_hook(lambda gradient: calls.append(gradient.clone()) or gradient * mask)
    model[2].bias.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.clone()))
    estimator = ulr.ULR(model, copies=8, max_rows=12)
    estimator.backward(X, y, loss_fn)
    torch.testing.assert_close(calls[0], plain[0].weight.grad)
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad * mask)
    torch.testing.assert_close(calls[1], plain[2].bias.grad)
    estimator.backward(X, y, loss_fn)  # hooks get the new part alone
    assert len(calls) == 4 and not torch.equal(calls[2], calls[0])


@pytest.mark.parametrize("settings", [{"max_rows": 12}, {"memory": "recompute"}, {"injection": "joint"}], ids=str)
def test_hooks_run_once_whatever_reads_the_parameter(settings):
    """Also where torch's own derivative takes a score to the parameter, or the loss reads it."""
    model, calls = net(lambda m, x: m.l(x) * m.p, l=linear(), p=(4,)), []

    def loss_fn(outputs, y):
        return squares(outputs, y) + model.p.square().sum()

    ulr.ULR(model, copies=8, **settings).backward(X, Y, loss_fn)
    plain = model.p.grad.clone()
    model.zero_grad()
    handle = model.p.register_hook(lambda gradient: calls.append(1) or 2 * gradient)
    ulr.ULR(model, copies=8, **settings).backward(X, Y, loss_fn)
    assert len(calls) == 1
    torch.testing.assert_close(model.p.grad, 2 * plain)
    handle.remove()
    ulr.ULR(model, copies=8, **settings).backward(X, Y, loss_fn)
    torch.testing.assert_close(model.p.grad, 3 * plain)


# --- batches ---------------------------------------------------------------------------------------------------------


def lengths(outputs, texts):
    return outputs[:, 0] * torch.tensor([float(len(text)) for text in texts])


@pytest.mark.parametrize(
    "settings", [{}, {"max_rows": 4}, {"max_rows": 1, "antithetic": False}, {"allocation": "neyman"}]
)
def test_entries_of_samples_are_split_like_tensors(settings):
    texts = ["a", "bcd", "ef", "ghij", "k", "lmnop"]
    found = []
    for y in (texts, tuple(texts), np.array(texts), {"text": texts}, torch.tensor([float(len(t)) for t in texts])):
        model = filled(linear())

        def loss_fn(outputs, y):
            y = y["text"] if isinstance(y, dict) else y
            return outputs[:, 0] * y if isinstance(y, torch.Tensor) else lengths(outputs, y)

        ulr.ULR(model, copies=4, **settings).backward(X, y, loss_fn)
        found.append(model.weight.grad)
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=0, atol=0)


def test_mappings_and_numbers_of_numpy():
    class Encoding(UserDict):
        """As tokenizers return it."""

    model = net(lambda m, x: m.l(x), l=linear())
    plain, other = [], []
    for x, y, loss_fn, found in (
        (X, Y, squares, plain),
        (Encoding(x=X), Encoding(y=Y), lambda outputs, y: squares(outputs, y["y"]), other),
    ):
        model.zero_grad()
        kind = {"sigma": 0.5, "copies": 8, "seed": 3} if found is plain else {}
        numbers = {"sigma": np.float32(0.5), "copies": np.int64(8), "seed": np.int32(3), "max_rows": np.int64(64)}
        ulr.ULR(model, **(kind or numbers)).backward(x, y, loss_fn)
        found.append(model.l.weight.grad)
    torch.testing.assert_close(plain, other)
    model.zero_grad()
    refused("tuple of as many numbers may be either", model, x={"x": X, "size": (1, 2, 3, 4, 5, 6)})
    refused("dense tensors", model, x=X.to_sparse())


def test_forwards_that_call_other_functions_before_the_noise():
    """Chunks of copies share results from before the noise only while they call the same functions."""
    turns = itertools.cycle([False] * 5 + [True])

    def forward(m, x):
        h = m.a(x)
        if next(turns):
            h = (h + 1) - 1
        if (h > 100).any():
            h = 2 * h
        return m.c(m.b(h.sin()).tanh())

    model = net(forward, a=linear(5, 5), b=linear(5, 5), c=linear())
    openly = net(lambda m, x: m.c(m.b(m.a(x).sin()).tanh()), a=linear(5, 5), b=linear(5, 5), c=linear())
    assert_right(model, openly=openly, steps=2, max_rows=2000)


def test_windows_folded_into_the_batch():
    def windows(m, x):
        samples = x.shape[0]
        h = m.a(x).view(samples * 8, 8, 2)
        h = m.b(h).tanh().reshape(len(h) // 8, 8, 8, 2)
        return m.c(h.flatten(1).view(len(h), -1))

    for copies in (2, 4, 8, 16):
        model = net(windows, a=linear(2, 2), b=linear(2, 2), c=linear(128, 4))
        x, y = v(1, 4, 64, 2), v(2, 4, 4)
        ulr.ULR(model, copies=copies).backward(x, y, squares)
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        late = ulr.ULR(model, copies=copies)
        late.plan(x, y, squares)
        for each in late._plans.values():
            each.passes[:] = [item._replace(settled=True, expand_late=False) for item in each.passes]
        late.backward(x, y, squares)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, found[name], rtol=1e-3, atol=1e-4)


# --- numbers, copies, precision --------------------------------------------------------------------------------------


def test_copies_and_pickles_go_on_with_their_own_model():
    estimator = ulr.ULR(filled(nn.Sequential(linear(), nn.ELU(), linear(4, 4))), copies=4, learn_sigma=True)
    estimator.backward(X, Y, squares)
    file = io.BytesIO()
    torch.save(estimator, file)
    file.seek(0)
    estimator.model.zero_grad()
    others = copy.deepcopy(estimator), pickle.loads(pickle.dumps(estimator)), torch.load(file, weights_only=False)
    losses = [each.backward(X, Y, squares) for each in (estimator, *others)]
    assert all(loss == losses[0] for loss in losses) and estimator.step == others[0].step == 2
    torch.testing.assert_close(others[0].model[0].weight.grad, estimator.model[0].weight.grad)


def test_models_without_what_a_gradient_needs_are_named():
    for message, model in (
        ("have a parameter, got none", nn.ReLU()),
        ("have run once.* no weight yet", nn.LazyLinear(4)),
        ("float32, bfloat16 or float16.* weight of torch.float64", linear().double()),
        (
            "got p of torch.complex64",
            net(lambda m, x: (x + m.p).abs(), p=nn.Parameter(torch.ones(5, dtype=torch.complex64))),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ulr.ULR(model)


def test_empty_parameters_have_no_gradient():
    assert_right(net(lambda m, x: m.l(x), l=linear(), empty=(0, 3)))


AUTOCAST = {
    "gru": (lambda m, x: m.a(x)[0][:, -1], nn.GRU(5, 4, batch_first=True), (6, 3, 5)),
    "conv3d": (lambda m, x: m.a(x).mean((2, 3, 4)), nn.Conv3d(1, 4, 2), (6, 1, 3, 3, 3)),
    "einsum": (lambda m, x: torch.einsum("bi,oi->bo", x, m.a.weight), linear(bias=False), (6, 5)),
    "prelu": (lambda m, x: m.b(m.a(x)), linear(), (6, 5)),
    "norm": (lambda m, x: m.b(m.a(x)), linear(), (6, 5)),
}


@pytest.mark.parametrize("injection", ["layerwise", "joint"])
@pytest.mark.parametrize("kind", AUTOCAST)
def test_autocast_inside_a_forward(kind, injection):
    forward, part, shape = AUTOCAST[kind]
    more = {"b": nn.PReLU(4)} if kind == "prelu" else {"b": nn.LayerNorm(4)} if kind == "norm" else {}

    def cast(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return forward(m, x).float()

    assert_right(
        net(cast, a=part, **more), x=v(1, *shape), openly=net(forward, a=part, **more), sigma=0.2, injection=injection
    )


def test_threads_may_run_estimators_of_their_own():
    """The sums of a step belong to the thread that runs it."""
    models = [filled(linear()).to(torch.bfloat16) for _ in range(2)]

    def loss_fn(outputs, targets):
        return squares(outputs.float(), targets)

    def run(model):
        ulr.ULR(model, copies=8).backward(X.bfloat16(), Y, loss_fn)

    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(models[0].weight.grad, models[1].weight.grad)


# --- more of these kinds ----------------------------------------------------------------------------------------------


def test_a_loss_that_counts_rows_is_refused():
    refused("whatever the number of rows", filled(linear()), lambda outputs, y: squares(outputs, y) / len(outputs))
    refused("whatever the number of rows", net(lambda m, x: m.l(x) / x.shape[0], l=linear()), injection="joint")


def test_a_small_share_of_the_batch_is_seen():
    def forward(m, x):
        h = m.a(x)
        return m.b(h + 0.4 * h.mean(0)), m.b(h).softmax(1).mean(0).square().sum().expand(len(x))

    def loss_fn(outputs, y):
        return squares(outputs[0], y) + 0.3 * outputs[1]

    for samples in (6, 1024):
        x, y = v(1, samples, 5), v(2, samples, 4)
        for injection in ("layerwise", "joint"):
            refused("sample", net(forward, a=linear(5, 5), b=linear()), loss_fn, x, y, injection=injection)


def test_derivatives_by_other_functions_are_refused():
    def energy(m, x):
        return m.b(torch.tanh(m.a(x))).sum()

    def by_vjp(m, x):
        return torch.autograd.functional.vjp(lambda x: energy(m, x), x)[1]

    def guarded(m, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            e = energy(m, x)
            return torch.autograd.grad(e, x)[0] if e.requires_grad else torch.zeros_like(x)

    for forward in (by_vjp, guarded):
        refused("'noise' must be 'weights'", net(forward, a=linear(), b=linear(4, 1)), y=X)


def test_a_hidden_reader_of_a_term():
    def forward(m, x, read=scripted):
        h = m.a(x)
        return read(h), h + m.b(x)

    openly = net(functools.partial(forward, read=HIDDEN["script"][1]), a=linear(), b=linear())
    for settings in WAYS[:3]:
        assert_right(net(forward, a=linear(), b=linear()), of_both, openly=openly, **settings)


@pytest.mark.parametrize("noised", ["a", "b"])
def test_a_penalty_with_noise_of_both_kinds_counts_once(noised):
    def forward(m, x):
        return m.b(m.a(x).tanh()), m.a.weight.square().sum() + m.b.weight.square().sum()

    model = net(forward, a=linear(), b=linear(4, 4))
    more = {"noise": {noised: "weights"}, "copies": 4096}
    assert_right(model, lambda outputs, y: squares(outputs[0], y) + outputs[1], tolerance=0.35, **more)


def test_noise_on_weights_refuses_hidden_uses():
    refused("thread", net(in_a_thread_too, a=linear()), noise="weights")


def test_masks_of_huge_numbers():
    def forward(m, x):
        bias = m.bias[torch.arange(4)[:, None] + torch.arange(4)[None]].expand(len(x), 4, 4)
        scores = m.q(x) @ x.transpose(1, 2) + bias + torch.finfo(torch.float32).min * (torch.arange(4) == 3)
        return (scores.softmax(-1) @ x).mean(1)

    ulr.ULR(net(forward, q=linear(4, 4), bias=(7,)), copies=4).backward(v(1, 6, 4, 4), Y, squares)


# --- parameters of the loss -------------------------------------------------------------------------------------------


class Centres(nn.Module):
    """A learnt temperature and the centres of classes, which only the loss reads."""

    def __init__(self):
        super().__init__()
        self.centres, self.heat = nn.Parameter(v(8, 3, 4)), nn.Parameter(torch.tensor(0.5))

    def forward(self, outputs, y):
        return F.cross_entropy(outputs @ self.centres.T * self.heat.exp(), y, reduction="none")

    def of_outputs(self, scale, outputs, y):
        return scale * self(outputs, y)


CLASSES = torch.arange(6) % 3
FORMS = {
    "module": lambda loss: loss,
    "method": lambda loss: functools.partial(loss.of_outputs, 1.0),
    "closure": lambda loss: lambda outputs, y: loss(outputs, y),
}


@pytest.mark.parametrize("settings", [*WAYS, {"noise": "weights"}, {"guide": "feedback"}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_trained_parameters_of_the_loss_get_their_gradient(form, settings):
    model, loss = net(lambda m, x: m.l(x), l=linear()), Centres()
    loss_fn = FORMS[form](loss)
    with torch.enable_grad():
        expected = torch.autograd.grad(loss_fn(model(X), CLASSES).mean(), list(loss.parameters()))
    estimator = ulr.ULR(model, **{"sigma": 1e-3, "copies": 64, **settings})
    for steps in (1, 2):  # it adds up
        estimator.backward(X, CLASSES, loss_fn)
        for p, g in zip(loss.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, steps * g, rtol=0.05, atol=0.01)


def test_gradients_of_the_loss_end_as_those_of_the_model():
    loss, model, calls = Centres().bfloat16(), linear(), []
    loss.heat.register_hook(lambda gradient: calls.append(gradient) or 2 * gradient)

    def loss_fn(outputs, y):
        return loss(outputs.bfloat16(), y).float()

    ulr.ULR(filled(model), sigma=1e-3, copies=8, max_rows=4).backward(X, CLASSES, loss_fn)
    assert len(calls) == 1 and loss.heat.grad == 2 * calls[0] and loss.centres.grad.dtype == torch.bfloat16
    before = loss.heat.grad.clone()
    assert ulr.check(model, X, CLASSES, loss_fn, steps=2, sigma=0.1, copies=4).layers
    assert torch.equal(loss.heat.grad, before)


def test_parameters_of_a_loss_without_derivative_are_named():
    loss, model = Centres(), filled(linear())
    loss.forward = lambda outputs, y: (outputs.argmax(1) != y).float() * loss.heat.detach()
    for each in (loss, loss.__call__, functools.partial(lambda outputs, y, given: given(outputs, y), given=loss)):
        with pytest.warns(UserWarning, match="no derivative in centres, heat of 'loss_fn': they get no gradient"):
            ulr.ULR(model, copies=4).backward(X, CLASSES, each)
    loss.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ulr.ULR(model, copies=4).backward(X, CLASSES, loss)


def test_a_tensor_of_the_loss_that_is_no_parameter_is_named():
    scale = torch.ones((), requires_grad=True)
    with pytest.warns(
        UserWarning, match=r"tensor \[\] that requires a gradient and gets none: make it an nn.Parameter"
    ):
        ulr.ULR(filled(linear()), copies=4).backward(X, Y, lambda outputs, y: squares(outputs * scale, y))
    assert scale.grad is None


# --- options of embeddings --------------------------------------------------------------------------------------------

IDS = torch.tensor([[0, 1, 2], [3, 0, 1], [2, 4, 0], [1, 1, 3], [4, 2, 0], [0, 3, 3]])


def looked_up(kind, by_position=False, **options):
    def forward(m, x):
        if by_position:
            return m.l(x.float()) + m.e(torch.tensor([[1, 1, 2]])).mean(1)
        return m.e(x) if kind is nn.EmbeddingBag else m.e(x).mean(1)

    return net(forward, e=kind(5, 4, **options), **({"l": linear(3, 4)} if by_position else {}))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_gradients_scaled_by_frequencies_are_refused(kind):
    model = looked_up(kind, scale_grad_by_freq=True)
    refused("scale_grad_by_freq", model, x=IDS)
    refused("scale_grad_by_freq", model, x=IDS, noise="weights")
    if kind is nn.Embedding:  # of constants
        by_position = looked_up(kind, True, scale_grad_by_freq=True)
        refused("'scale_grad_by_freq' must be False", by_position, x=IDS, noise="weights")
    for step in (
        lambda opt: opt.step(lambda: squares(model(IDS), Y).mean()),
        lambda opt: opt.step_batch(IDS, Y, squares),
    ):
        with pytest.raises(ValueError, match="'scale_grad_by_freq' must be False"):
            step(ulr.optim.MeZO(model))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_rows_of_a_largest_norm(kind):
    """The forward shortens rows that are too long, as torch's does; noise on weights is refused."""
    model = looked_up(kind, max_norm=0.7)
    assert_right(model, x=IDS, sigma=0.05)
    assert model.e.weight.norm(dim=1).max() < 0.71
    model = looked_up(kind, max_norm=0.7)
    start = model.e.weight.detach().clone()
    with pytest.raises(ValueError, match="'max_norm' must be None for a table with noise"):
        ulr.optim.MeZO(model).step(lambda: squares(model(IDS), Y).mean())
    with pytest.raises(ValueError, match="'max_norm' must be None for a table with noise"):
        ulr.optim.MeZO(model).step_batch(IDS, Y, squares)
    assert torch.equal(model.e.weight, start)
    refused("'max_norm' must be None for a table with noise", model, x=IDS, noise="weights")


# --- later batches ----------------------------------------------------------------------------------------------------


class LaterMixing(nn.Module):
    """Mixes samples once `epoch` is 1, by functions that it has called before or by others."""

    def __init__(self, known=True):
        super().__init__()
        self.a, self.b, self.known, self.epoch = linear(5, 5), linear(), known, 0

    def forward(self, x):
        h = self.a(x)
        if not self.known:
            return self.b((h - h.mean(0, keepdim=True)) if self.epoch else h)
        return self.b(h - h.mean(0 if self.epoch else 1, keepdim=True))


def test_samples_that_mix_in_later_batches_are_seen():
    """At once where the branch calls functions that no forward has called; else after at most twice as many steps."""
    for known, steps in ((False, 1), (True, 9)):
        model = filled(LaterMixing(known))
        estimator = ulr.ULR(model, copies=16)
        for _ in range(17):
            estimator.backward(X, Y, squares)
        model.epoch = 1
        for _ in range(steps - 1):
            estimator.backward(X, Y, squares)
        before = [p.grad.clone() for p in model.parameters()]
        with pytest.raises(ValueError, match="change with the noise of other samples"):
            estimator.backward(X, Y, squares)
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_looks_cost_a_hundredth_of_all_steps_at_most():
    """In copies of a sample: a look has four."""
    for copies in (2, 16):
        model, rows = filled(LaterMixing()), []
        model.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(len(args[0]) / len(X)))
        estimator, by_step = ulr.ULR(model, copies=copies), []
        for _ in range(300):
            rows.clear()
            estimator.backward(X, Y, squares)
            by_step.append(sum(rows))
        looks = [step for step, own in enumerate(by_step, 1) if own > by_step[1]][1:]
        assert looks and all(by_step[step - 1] - by_step[1] == 4 for step in looks)
        for number, step in enumerate(looks, 1):
            assert 4 * number <= 0.01 * 2 * copies * step, (copies, step)  # two layers


def test_samples_that_mix_before_the_first_layer_are_refused_where_they_are_split():
    def errors(outputs, _):
        return (outputs.argmax(1) != 0).float()

    model = net(lambda m, x: m.l((x - x.mean(0)).sin()), l=linear())
    assert_right(model)
    refused("whatever samples share the forward", model, errors, max_rows=4)
    for settings in ({"max_rows": 4}, {"allocation": "neyman"}, {"max_rows": 4, "noise": "weights"}):
        refused("whatever samples share the forward", model, **settings)


# --- errors that are torch's own --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"noise": "weights"}, {"guide": "feedback"}, {"memory": "recompute"}], ids=str
)
def test_a_buffer_of_the_largest_batch_limits_the_rows(settings):
    model = net(lambda m, x: m.l(x) + m.places[: len(x)].mean(1, keepdim=True), l=linear())
    model.register_buffer("places", torch.ones(20, 3))
    refused("'max_rows' must be at most the rows.*a forward of 192: The size of tensor a", model, copies=32, **settings)
    with pytest.raises(ValueError) as failure:
        ulr.ULR(model, copies=32, **settings).backward(X, Y, squares)
    assert isinstance(failure.value.__cause__, RuntimeError)
    assert_right(model, **{"copies": 256, "max_rows": 20, "tolerance": 0.4, "sigma": 0.1, **settings})


def test_an_error_of_a_batch_stays_as_it_is():
    """Also where a forward of many copies raises it."""
    estimator, y = ulr.ULR(filled(nn.Sequential(linear(), nn.ELU(), linear(4, 4))), copies=32), torch.arange(6) % 4
    loss_fn = nn.CrossEntropyLoss(reduction="none")
    estimator.backward(X, y, loss_fn)
    with pytest.raises(IndexError, match="Target . is out of bounds"):
        estimator.backward(X, y + 6, loss_fn)


def by_dual_numbers(m, x):
    with torch.autograd.forward_ad.dual_level():
        outputs = m.b(m.a(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))).tanh())
        return torch.autograd.forward_ad.unpack_dual(outputs).tangent


def by_jvp(m, x):
    return torch.func.jvp(lambda x: m.b(m.a(x).tanh()), (x,), (torch.ones_like(x),))[1]


@pytest.mark.parametrize("forward", [by_dual_numbers, by_jvp], ids=lambda f: f.__name__)
def test_forward_mode_derivatives(forward):
    model = net(forward, a=linear(bias=False), b=linear(4, 4, bias=False))
    refused("'noise' must be 'weights'.*forward-mode derivatives", model)
    assert_right(model, noise="weights", openly=model)
    expected = squares(model(X), Y).mean()
    loss = ulr.optim.MeZO(model, lr=0.0, eps=1e-3, probes=4).step(lambda: squares(model(X), Y).mean())
    torch.testing.assert_close(loss, expected.detach(), rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"noise": "weights"}, {"injection": "joint"}], ids=str)
def test_hooks_on_tensors_of_samples_do_nothing(settings):
    def forward(m, x):
        h = m.a(x)
        handle = h.register_hook(lambda gradient: 2 * gradient)
        h.retain_grad()
        handle.remove()
        return m.b(h.tanh())

    model = net(forward, a=linear(), b=linear(4, 4))
    assert_right(model, **settings)
    ulr.optim.MeZO(model).step(lambda: squares(model(X), Y).mean())


def test_a_loss_that_differentiates_its_outputs_is_refused():
    def penalised(outputs, y):
        losses = squares(outputs, y)
        return losses + torch.autograd.grad(losses.sum(), outputs, create_graph=True)[0].square().sum(1)

    def backward(outputs, y):
        squares(outputs, y).mean().backward()
        return squares(outputs, y)

    model = filled(linear())
    for loss_fn in (penalised, backward):
        refused(r"'loss_fn' must need no graph of the outputs.*requires_grad_\(\)", model, loss_fn)
        with pytest.raises(ValueError) as failure:
            ulr.ULR(model, copies=4).backward(X, Y, loss_fn)
        assert isinstance(failure.value.__cause__, RuntimeError)
        with pytest.raises(ValueError, match="'loss_fn' must need no graph"):
            ulr.optim.MeZO(model).step_batch(X, Y, loss_fn)

    @torch.enable_grad()
    def openly(outputs, y):
        own = outputs if outputs.requires_grad else outputs.detach().requires_grad_()
        return penalised(own, y)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(model, openly)
