"""A plain MLP's whole step by one op, `noisy_mlp_step`, instead of layer by layer."""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulr_kernels import dispatch
from ulr_kernels.estimators.clean_pass import CleanPass, Site
from ulr_kernels.estimators.guides import Guides, error_features
from ulr_kernels.estimators.noised import Keys
from ulr_kernels.estimators.runner import PassRunner
from ulr_kernels.estimators.settings import Settings
from ulr_kernels.nn.batch import Batch, LossFunction
from ulr_kernels.nn.call import gradient_buffer
from ulr_kernels.nn.gates import MARGIN, Gate
from ulr_kernels.ops.noisy_mlp_step import DTYPES, MOST_LAYERS, noisy_mlp_step

_ACTIVATIONS = {nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CROSS_ENTROPY = {name: p.default for name, p in inspect.signature(F.cross_entropy).parameters.items()}


class _Mlp(NamedTuple):
    layers: list[nn.Linear]
    activation: str
    flattens: bool


def run_mlp_step(
    runner: PassRunner, keys: Keys, batch: Batch, loss_fn: LossFunction, guides: Guides | None = None
) -> Tensor | None:
    """Add a whole step's gradients to `.grad` by one op, if it computes this model, loss and settings.

    Noise and gradients are those of the passes, to rounding.

    Returns:
        The losses of the passes, fp32 `[passes, copies, samples]`; None, with nothing done, if the op does not apply.
    """
    smoothing, mlp = _label_smoothing(loss_fn), _mlp(runner.view.model)
    if smoothing is None or mlp is None or not _takes(mlp, batch):
        return None
    names, s = [runner.view.layers[id(layer.weight)] for layer in mlp.layers], runner.settings
    copies, sigmas = {s.copies_of(name) for name in names}, [s.sigma_of(name) for name in names]
    if len(copies) > 1 or s.sampler == "sobol" or s.allocation != "even" or s.learn_sigma or runner.view.noised:
        return None
    copies_of_all = copies.pop()
    sigma: float | Tensor = sigmas[0]
    if len(set(sigmas)) > 1:  # filled on the device: nothing is copied from the host
        sigma = torch.stack([torch.full((), each, dtype=torch.float32, device=batch.x.device) for each in sigmas])
    active = s.support == "active"
    if (guides is not None and (s.injection == "joint" or batch.x.device.type != "cpu")) or (active and not guides):
        return None
    weights = [layer.weight for layer in mlp.layers]
    biases = [layer.bias for layer in mlp.layers if layer.bias is not None]
    margins = [MARGIN * each for each in sigmas] if active else None
    guided = _Guided(guides, mlp, names, batch, loss_fn, copies_of_all, margins) if guides is not None else None
    losses = noisy_mlp_step(
        [gradient_buffer(weight) for weight in weights],
        [gradient_buffer(bias) for bias in biases],
        batch.x.flatten(1),
        batch.y,
        weights,
        biases,
        sigma,
        torch.stack([keys[name] for name in names]),
        copies=copies_of_all,
        antithetic=s.antithetic,
        injection=s.injection,
        activation=mlp.activation,
        label_smoothing=smoothing,
        baseline=s.baseline,
        dist=s.dist,
        row_offset=batch.first,
        sampler=s.sampler_of(len(names) if s.injection == "joint" else 1),
        **(guided.arguments if guided is not None else {}),
    )
    if guided is not None:
        guided.learn(losses, s)
    return losses


class _Guided:
    """The guides of a step: what the op gets, and what they learn of its results."""

    def __init__(
        self,
        guides: Guides,
        mlp: _Mlp,
        names: list[str],
        batch: Batch,
        loss_fn: LossFunction,
        copies: int,
        margins: list[float] | None,
    ) -> None:
        """`margins`: of the supports of the layers; None: they have none."""
        self._guides = guides
        self._sites = [(name, 0) for name in names]
        value = batch.x.flatten(1)
        gates: dict[Site, Gate] = {}
        supports: list[Tensor] = []
        for number, (site, layer) in enumerate(zip(self._sites, mlp.layers, strict=True)):
            v = layer(value)
            value, gate = _DERIVATIVES[mlp.activation](v)
            last = site == self._sites[-1]  # nothing reads it
            gates[site] = Gate(None if last else gate, None)
            if margins is not None:
                active = mlp.activation == "relu" and not last
                supports.append(v > -margins[number] if active else torch.ones_like(v, dtype=torch.bool))
        self._clean, features = error_features(v, batch, loss_fn, guides.features)
        guides.begin(CleanPass(self._clean, features, gates))
        self._features = [layer.out_features for layer in mlp.layers]
        grids, all_rows = ((batch.samples, count) for count in self._features), slice(0, batch.samples)
        found = [guides.guess(site, all_rows, grid, -1) for site, grid in zip(self._sites, grids, strict=True)]
        guesses, coefficients = torch.cat([guess for guess, _ in found], 1), [each for _, each in found]
        shifts = [guides.shift((name,), guesses.device) for name in names]
        self._deltas = torch.empty_like(guesses)
        self._dots = guesses.new_empty(len(mlp.layers), copies, batch.samples)
        self.arguments: dict[str, Any] = {
            "guides": guesses,
            "coefficients": torch.stack([torch.stack(each) for each in zip(coefficients, shifts, strict=True)]),
            "deltas": self._deltas,
            "dots": self._dots,
            "support": torch.cat(supports, 1) if supports else None,
        }

    def learn(self, losses: Tensor, settings: Settings) -> None:
        """`losses`: of the passes, fp32 `[layers, copies, samples]`."""
        deltas = self._deltas.split(self._features, 1)
        for site, of_pass, dots, delta in zip(self._sites, losses, self._dots, deltas, strict=True):
            if settings.baseline == "clean":
                self._guides.learn_shift(site[:1], of_pass - self._clean)
            self._guides.fit(site, of_pass, dots)
            self._guides.learn(site, delta)
        self._guides.finish(None)


def _relu(v: Tensor) -> tuple[Tensor, Tensor]:
    return v.relu(), (v > 0).float()


def _tanh(v: Tensor) -> tuple[Tensor, Tensor]:
    y = v.tanh()
    return y, 1 - y.float().square()


def _sigmoid(v: Tensor) -> tuple[Tensor, Tensor]:
    y = v.sigmoid()
    return y, (y * (1 - y)).float()


_DERIVATIVES = {"relu": _relu, "tanh": _tanh, "sigmoid": _sigmoid}
"""By activation: its value and its derivative."""


def _label_smoothing(loss_fn: LossFunction) -> float | None:
    """The label smoothing of torch's cross-entropy of each row, a partial function or a module; None: another loss."""
    if isinstance(loss_fn, functools.partial) and loss_fn.func is F.cross_entropy and not loss_fn.args:
        how = loss_fn.keywords
    elif type(loss_fn) is nn.CrossEntropyLoss and not _is_changed(loss_fn):
        how = {name: getattr(loss_fn, name) for name in ("weight", "ignore_index", "reduction", "label_smoothing")}
    else:
        return None
    smoothing = how.get("label_smoothing", 0.0)
    plain = _CROSS_ENTROPY | {"reduction": "none", "label_smoothing": smoothing}
    return smoothing if _CROSS_ENTROPY | how == plain else None


def _mlp(model: nn.Module) -> _Mlp | None:
    """The layers of a sequence of torch's linear layers with one kind of activation between them, possibly after an
    nn.Flatten, whose parameters are all trained; None: another model."""
    if type(model) is not nn.Sequential or any(map(_is_changed, (model, *model))):
        return None
    modules = list(model)
    head = modules[0] if modules else None
    flattens = type(head) is nn.Flatten and (head.start_dim, head.end_dim) == (1, -1)
    modules = modules[1:] if flattens else modules
    layers = [module for module in modules[::2] if type(module) is nn.Linear]
    between = {type(module) for module in modules[1::2]}
    if len(layers) != len(modules) - len(modules) // 2 or len(modules) % 2 == 0 or len(layers) > MOST_LAYERS:
        return None
    if len(between) > 1 or not between <= _ACTIVATIONS.keys():
        return None
    biases, parameters = [layer for layer in layers if layer.bias is not None], [*model.parameters()]
    if len(biases) not in (0, len(layers)) or len(parameters) != len(layers) + len(biases):
        return None  # a bias here and there, or weights that layers share
    if not all(type(p) is nn.Parameter and p.requires_grad for p in parameters):
        return None
    return _Mlp(layers, _ACTIVATIONS[between.pop()] if between else "relu", flattens)


def _is_changed(module: nn.Module) -> bool:
    """Whether something else than its class's forward runs."""
    return "forward" in module.__dict__ or any(getattr(module, hooks) for hooks in _HOOKS)


def _takes(mlp: _Mlp, batch: Batch) -> bool:
    """Whether the op has a kernel for these tensors, and computes the same as the model."""
    x, y = batch.x, batch.y
    if type(x) is not Tensor or type(y) is not Tensor or y.dtype != torch.int64 or y.dim() != 1 or batch.share != 1:
        return False
    if batch.affects is not None:
        return False
    if x.dim() != 2 and not (mlp.flattens and x.dim() > 2):
        return False
    parameters = [p for layer in mlp.layers for p in layer.parameters()]
    tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None)]
    if any((t.dtype, t.device) != (x.dtype, x.device) for t in tensors) or x.dtype not in DTYPES:
        return False
    if y.device != x.device or torch.is_autocast_enabled(x.device.type):
        return False
    if y.device.type == "cpu" and not 0 <= int(y.min()) <= int(y.max()) < mlp.layers[-1].out_features:
        return False  # torch's own loss raises the error
    return _has_kernel(x.device)


def _has_kernel(device: torch.device) -> bool:
    """Whether a back end with a kernel runs the op: torch's own way needs the memory of all copies at once."""
    try:
        provider = dispatch.lookup("noisy_mlp_step", device)
    except dispatch.BackendError:  # the one in force has no such op
        return False
    return provider is not dispatch.find("torch", "noisy_mlp_step", device)
