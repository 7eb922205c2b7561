"""Guides: guesses of the gradients of layers' outputs, which take away the part of the estimate's error they explain.

A guide g is a guess of the gradient of a sample's loss in a layer's output that does not depend on this step's noise.
With L_c - sigma <eps_c, g> in the place of the loss and g added to the estimate, the estimate is unbiased whatever g is
(a control variate: arXiv 1511.05176), and its squared error falls by |delta|^2 / |delta - g|^2, delta the gradient.

Here g = a * gate * (B e). e are features of a sample's error at the model's outputs, gate is the derivative of the
elementwise functions that read the layer's output, and B, a row for each unit of the output, is the regression of
earlier estimates on gate * e. The coefficient a, 0 to 1, is the regression of earlier losses on sigma <eps_c, gate *
(B e)>, so that a bad guide does no harm. Where the baseline is the loss without noise, the mean that noise has added to
it in earlier steps is subtracted, too: a pair of copies would cancel it, single copies do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree

from ulr_kernels import noise_contract, ops
from ulr_kernels.errors import fail
from ulr_kernels.nn.batch import Batch, LossFunction, repeat, tensors
from ulr_kernels.nn.call import Call
from ulr_kernels.nn.gates import Gates
from ulr_kernels.nn.interceptor import LayerInterceptor

Site = tuple[str, int]  # a layer and the number of its call
Features = Callable[[Any, Any], Tensor]  # of outputs and targets: [samples, features]

FORGETTING = 0.98  # of a step's share in the sums of later ones
RIDGE = 5e-3  # of the regression, times the trace of the features' second moments
FIT_FORGETTING = 0.9
MOST_FEATURES = 64  # more are projected on random signs
PROJECTION = noise_contract.site_id("ulr_kernels.guides.projection")


class CleanPass(NamedTuple):
    """The result of a forward without noise."""

    losses: Tensor  # fp32 `[samples]`
    features: Tensor  # fp32 `[samples, features]`
    gates: Mapping[Site, Tensor | None]  # of each noised call's output; None: 1


class GuideForward(LayerInterceptor):
    """A forward without noise that finds the gates of the layers' outputs."""

    def __init__(self, layers: Mapping[int, str], parameters: Any, inputs: Any) -> None:
        super().__init__(layers, parameters, inputs)
        self._numbers: dict[str, int] = {}
        self._gates = Gates()

    def on_layer_call(self, call: Call) -> tuple[Tensor, int]:
        with torch.no_grad():
            output = call.clean()
        self._gates.follow_call(call, output)
        layer = self.trained_layer(call)
        if layer is not None:
            number = self._numbers.get(layer, 0)
            self._numbers[layer] = number + 1
            self._gates.begin((layer, number), output)
        return output, 0

    def after_call(self, func: Callable, args: tuple, kwargs: dict[str, Any], marks: list, result: Any) -> None:
        self._gates.follow(func, args, kwargs, result)

    def gates(self) -> dict[Site, Tensor | None]:
        """The gate of each call, of the shape of its output."""
        return self._gates.found()


def error_features(outputs: Any, batch: Batch, loss_fn: LossFunction, features: Features | None) -> tuple:
    """The losses without noise, and the features of the samples' errors.

    They are what `features` returns, or else the derivatives of the losses in the outputs, or where the loss has none,
    the outputs and the targets.

    Returns:
        fp32 `[samples]` and `[samples, features]`.
    """
    targets, samples = repeat(batch.y, 1), batch.samples
    leaves = [t for t in tensors(outputs) if t.is_floating_point() and t.dim() and t.shape[0] == samples]
    with torch.enable_grad():
        own = {id(t): t.detach().requires_grad_() for t in leaves}
        given = _pytree.tree_map(lambda leaf: own.get(id(leaf), leaf), outputs)
        losses = batch.losses(given, loss_fn, 1)[0]
        total = losses.sum()
    if features is not None:
        found = features(outputs, targets)
        if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[0] != samples:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            fail("guide", f"return [{samples}, features] of outputs and targets", got)
        return losses.detach(), found.detach().float()
    if total.requires_grad and own:
        derivatives = torch.autograd.grad(total, list(own.values()), allow_unused=True)
        parts = [g.detach().flatten(1) for g in derivatives if g is not None]
        return losses.detach(), torch.cat(parts, 1).float()
    parts = [t.detach().flatten(1).float() for t in leaves]
    for target in tensors(targets):
        if target.is_floating_point():
            parts.append(target.flatten(1).float())
        elif target.dim() == 1 and parts and parts[0].shape[1] > 1:  # classes
            parts.append(F.one_hot(target.clamp(0, parts[0].shape[1] - 1), parts[0].shape[1]).float())
    if not parts:
        fail("guide", "be a function of outputs and targets where the loss has no derivative in the outputs", "none")
    return losses.detach(), torch.cat([*parts, parts[0].new_ones(samples, 1)], 1)


class _Learnt:
    """What is known of one call's output: decayed sums over steps, and the weight made of them."""

    NAMES = ("weight", "cross", "power", "fit")

    def __init__(self, units: int, features: int, device: torch.device) -> None:
        self.weight = torch.zeros(units, features, device=device)
        self.cross = torch.zeros_like(self.weight)  # sum of gate * estimate (outer) e
        self.power = torch.zeros(units, device=device)  # sum of gate^2
        self.fit = torch.zeros(2, device=device)  # sums of loss * dot, and of dot^2
        self.clear()

    def clear(self) -> None:
        """Begin the sums of a step."""
        self.step_cross, self.step_power = torch.zeros_like(self.cross), torch.zeros_like(self.power)
        self.step_fit = torch.zeros_like(self.fit)

    def coefficient(self) -> Tensor:
        dot, square = self.fit
        return (dot / square).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)


class Guides:
    """The guides of a model's layers.

    Args:
        seed: of the estimator, for the projection of many features.
        features: the user's function, or None.
    """

    def __init__(self, seed: int, features: Features | None) -> None:
        self._seed, self.features = seed, features
        self._learnt: dict[tuple[str, int, int], _Learnt] = {}  # by layer, call and units
        self._gram: Tensor | None = None  # fp64: the decayed sum of e (outer) e
        self._count = torch.zeros((), dtype=torch.float64)  # of the samples in it
        self._shifts: dict[
            tuple[str, ...], Tensor
        ] = {}  # by pass: decayed sums of losses less the clean one, and count
        self._step_shifts: dict[tuple[str, ...], Tensor] = {}
        self._clean: CleanPass | None = None

    def begin(self, clean: CleanPass) -> None:
        """Begin a step: the features and gates of its samples."""
        features = clean.features
        if features.shape[1] > MOST_FEATURES:
            key = noise_contract.fold_in(self._seed, PROJECTION)
            shape = (features.shape[1], MOST_FEATURES)
            signs = ops.noise(shape, key, dist="rademacher", device=features.device)
            features = features @ signs * MOST_FEATURES**-0.5
        if self._gram is not None and self._gram.shape[0] != features.shape[1]:
            fail("guide", f"have {self._gram.shape[0]} features of a sample, as before", features.shape[1])
        self._clean = clean._replace(features=features.nan_to_num(0.0, 0.0, 0.0))

    def _of(self, site: Site, units: int, device: torch.device) -> _Learnt:
        assert self._clean is not None
        name = (*site, units)
        if name not in self._learnt:
            self._learnt[name] = _Learnt(units, self._clean.features.shape[1], device)
        return self._learnt[name]

    def _gated(self, site: Site, rows: slice | Tensor, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
        """Features `[samples, features]` and gate `[samples, units]` of some samples."""
        assert self._clean is not None
        gate = self._clean.gates.get(site)
        if gate is not None and gate.shape[1:] != shape[1:]:
            gate = None
        at = rows if isinstance(rows, slice) else rows.to(self._clean.features.device)
        return self._clean.features[at], None if gate is None else gate[at].flatten(1)

    def guess(self, site: Site, rows: slice | Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """gate * (B e) of some samples in a call's output of this shape, and the coefficient `[]`."""
        features, gate = self._gated(site, rows, shape)
        learnt = self._of(site, shape[1:].numel(), features.device)
        guess = features @ learnt.weight.T
        return (guess if gate is None else guess * gate).view(shape), learnt.coefficient()

    def learn(self, site: Site, rows: slice | Tensor, delta: Tensor) -> None:
        """Add the samples' estimates of their output's gradient, fp32 of the output's shape, to the step's sums."""
        features, gate = self._gated(site, rows, delta.shape)
        learnt = self._of(site, delta.shape[1:].numel(), features.device)
        delta = delta.flatten(1)
        if gate is None:
            learnt.step_power += len(delta)
        else:
            delta = delta * gate
            learnt.step_power += gate.square().sum(0)
        learnt.step_cross.addmm_(delta.T, features)

    def fit(self, site: Site, shape: torch.Size, losses: Tensor, dots: Tensor) -> None:
        """Add the losses, and the guess's share in them, fp32 `[copies, samples]`, less their means over copies."""
        learnt = self._of(site, shape[1:].numel(), dots.device)
        losses, dots = losses - losses.mean(0), dots - dots.mean(0)
        learnt.step_fit += torch.stack([(losses * dots).sum(), dots.square().sum()]).nan_to_num(0.0, 0.0, 0.0)

    def shift(self, layers: tuple[str, ...], device: torch.device) -> Tensor:
        """The mean that noise in these layers has added to a loss, fp32 `[]`."""
        total, count = self._shifts.get(layers, torch.zeros(2, device=device))
        return (total / count).nan_to_num(0.0, 0.0, 0.0)

    def learn_shift(self, layers: tuple[str, ...], change: Tensor) -> None:
        """Add losses less those without noise, fp32 `[copies, samples]`."""
        step = torch.stack([change.sum(), change.new_full((), change.numel())]).nan_to_num(0.0, 0.0, 0.0)
        self._step_shifts[layers] = self._step_shifts.get(layers, torch.zeros_like(step)) + step

    def finish(self, sum_over_ranks: Callable[[list[Tensor]], None] | None) -> None:
        """End a step: make the weights that the next one uses."""
        assert self._clean is not None
        features = self._clean.features.double()
        gram, count = features.T @ features, features.new_full((), float(len(features)))
        parts = [gram, count]
        for learnt in self._learnt.values():
            parts += (learnt.step_cross, learnt.step_power, learnt.step_fit)
        parts += self._step_shifts.values()
        if sum_over_ranks is not None:
            sum_over_ranks(parts)
        self._gram = gram if self._gram is None else FORGETTING * self._gram + gram
        self._count = FORGETTING * self._count.to(count.device) + count
        values, vectors = torch.linalg.eigh(self._gram)
        values, vectors = values.clamp_min(0).float(), vectors.float()
        ridge = RIDGE * values.sum() + torch.finfo(torch.float32).tiny
        for learnt in self._learnt.values():
            learnt.cross.mul_(FORGETTING).add_(learnt.step_cross)
            learnt.power.mul_(FORGETTING).add_(learnt.step_power)
            learnt.fit.mul_(FIT_FORGETTING).add_(learnt.step_fit)
            share = (learnt.power / self._count).float().unsqueeze(1)
            learnt.weight = ((learnt.cross @ vectors) / (share * values + ridge)) @ vectors.T
            learnt.clear()
        for layers, shift in self._step_shifts.items():
            self._shifts[layers] = FIT_FORGETTING * self._shifts.get(layers, torch.zeros_like(shift)) + shift
        self._step_shifts, self._clean = {}, None

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The learnt weights, and the sums that they come from."""
        sites = [
            {"site": list(name), **{part: getattr(learnt, part).clone() for part in _Learnt.NAMES}}
            for name, learnt in self._learnt.items()
        ]
        shifts = {layers: shift.clone() for layers, shift in self._shifts.items()}
        return {"gram": self._gram, "count": self._count, "sites": sites, "shifts": shifts}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over a state."""
        gram = state["gram"]
        self._gram, self._count = None if gram is None else gram.to(device), state["count"].to(device)
        self._shifts = {layers: shift.to(device).clone() for layers, shift in state["shifts"].items()}
        self._learnt = {}
        for each in state["sites"]:
            layer, number, units = each["site"]
            learnt = _Learnt(units, each["weight"].shape[1], device)
            for part in _Learnt.NAMES:
                setattr(learnt, part, each[part].to(device).clone())
            self._learnt[(layer, number, units)] = learnt

    def weights(self) -> Iterator[tuple[Site, Tensor]]:
        """B of each call's output, `[units, features]`."""
        for (layer, number, _), learnt in self._learnt.items():
            yield (layer, number), learnt.weight
