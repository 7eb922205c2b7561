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

import collections
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree

from ulr_kernels import noise_contract, ops
from ulr_kernels.errors import fail
from ulr_kernels.estimators.data_parallel import DataParallelBatch
from ulr_kernels.nn.batch import Batch, LossFunction, repeat, tensors
from ulr_kernels.nn.call import Call
from ulr_kernels.nn.gates import Gates
from ulr_kernels.nn.interceptor import LayerInterceptor

Site = tuple[str, int]  # a layer and the number of its call
Name = tuple[str, int, int, int]  # of what is learnt: layer, number of the call, units and features of a sample
Features = Callable[[Any, Any], Tensor]  # of outputs and targets: [samples, features]

FORGETTING = 0.98  # of a step's share in the sums of later ones
RIDGE = 5e-3  # of the regression, times the trace of the features' second moments
FIT_FORGETTING = 0.9
MOST_FEATURES = 64  # more are projected on random signs
PROJECTED_AT_ONCE = 2**16  # so many features, to bound the memory of their signs
MOST_SHAPES = 8  # of a call's output that are remembered, as batches may have ever new lengths
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
    of_samples = [t for t in tensors(outputs) if t.is_floating_point() and t.dim() and t.shape[0] % samples == 0]
    leaves = {id(t): t.detach().requires_grad_() for t in of_samples}
    with torch.enable_grad():
        given = _pytree.tree_map(  # a clone, because the loss may write in place
            lambda each: leaves[id(each)].clone() if id(each) in leaves else each, outputs
        )
        losses = batch.losses(given, loss_fn, 1)[0]
        total = losses.sum()
    if features is not None:
        found = features(outputs, targets)
        if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[0] != samples:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            fail("guide", f"return [{samples}, features] of outputs and targets", got)
        return losses.detach(), found.detach().float()
    if total.requires_grad and leaves:
        derivatives = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        if parts := [g.detach().reshape(samples, -1) for g in derivatives if g is not None]:
            return losses.detach(), torch.cat(parts, 1).float()
    parts = [t.detach().reshape(samples, -1).float() for t in of_samples]
    for target in tensors(targets):
        if target.is_floating_point():
            parts.append(target.flatten(1).float())
        elif target.dim() == 1 and parts and parts[0].shape[1] > 1:  # classes
            parts.append(F.one_hot(target.long().clamp(0, parts[0].shape[1] - 1), parts[0].shape[1]).float())
    if not parts:
        fail("guide", "be a function of outputs and targets where the loss has no derivative in the outputs", "none")
    return losses.detach(), torch.cat([*parts, parts[0].new_ones(samples, 1)], 1)


def full_precision(like: Tensor) -> torch.autocast:
    """A block without autocast on a tensor's device, as the user may call `backward` with it."""
    return torch.autocast(like.device.type, enabled=False)


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

    @property
    def step(self) -> tuple[Tensor, ...]:
        """The sums of a step."""
        return self.step_cross, self.step_power, self.step_fit

    def end_step(self, values: Tensor, vectors: Tensor, ridge: Tensor, samples: Tensor) -> None:
        """Add the step's sums to those of earlier steps, and make the weight: the ridge regression.

        Args:
            values, vectors: the eigenvalues and vectors of the features' second moments.
            ridge: `[]`, of the regression.
            samples: fp64 `[]`, their decayed number.
        """
        self.cross.mul_(FORGETTING).add_(self.step_cross)
        self.power.mul_(FORGETTING).add_(self.step_power)
        self.fit.mul_(FIT_FORGETTING).add_(self.step_fit)
        share = (self.power / samples).float().unsqueeze(1)
        self.weight = ((self.cross @ vectors) / (share * values + ridge)) @ vectors.T
        self.clear()

    def coefficient(self) -> Tensor:
        dot, square = self.fit
        return (dot / square).nan_to_num(0.0, 0.0, 0.0).clamp(0, 1)


class Guides:
    """The guides of a model's layers.

    Outputs of other shapes, and batches of another number of features, are learnt apart.

    Args:
        seed: of the estimator, for the projection of many features.
        features: the user's function, or None.
    """

    def __init__(self, seed: int, features: Features | None) -> None:
        self._seed, self.features = seed, features
        self._learnt: dict[Name, _Learnt] = {}  # the one that was used last comes last
        self._moments: dict[int, tuple[Tensor, Tensor]] = {}  # by the number of features: of samples, see `finish`
        self._shifts: dict[tuple[str, ...], Tensor] = {}  # by pass: decayed sums of losses less clean ones, and count
        self._step_shifts: dict[tuple[str, ...], Tensor] = {}
        self._clean: CleanPass | None = None
        self._used: set[Name] = set()  # in this step

    def begin(self, clean: CleanPass) -> None:
        """Begin a step: the features and gates of its samples."""
        features = clean.features
        if features.shape[1] > MOST_FEATURES:
            with full_precision(features):
                features = self._projected(features)
        self._clean, self._used = clean._replace(features=features.nan_to_num(0.0, 0.0, 0.0)), set()

    def _projected(self, features: Tensor) -> Tensor:
        key = noise_contract.fold_in(self._seed, PROJECTION)
        total = features.new_zeros(len(features), MOST_FEATURES)
        for start in range(0, features.shape[1], PROJECTED_AT_ONCE):
            part = features[:, start : start + PROJECTED_AT_ONCE]
            shape = (part.shape[1], MOST_FEATURES)
            total += part @ ops.noise(shape, key, dist="rademacher", row_offset=start, device=features.device)
        return total * MOST_FEATURES**-0.5

    def _of(self, name: Name) -> _Learnt:
        assert self._clean is not None
        if name not in self._learnt:
            self._learnt[name] = _Learnt(*name[2:], self._clean.features.device)
        return self._learnt[name]

    def _gated(self, site: Site, rows: slice | Tensor, shape: torch.Size) -> tuple[Name, Tensor, Tensor | None]:
        """The name of what is learnt of a call; features `[samples, features]`, gate `[samples, units]` of some
        samples."""
        assert self._clean is not None
        features, gate = self._clean.features, self._clean.gates.get(site)
        samples = len(features)
        at = rows if isinstance(rows, slice) else rows.to(features.device)
        own = features[at]
        units = shape.numel() // len(own)  # of the rows that a sample may have one after the other, too
        gate = None if gate is None or gate.numel() != samples * units else gate.reshape(samples, units)[at]
        return (*site, units, own.shape[1]), own, gate

    def guess(self, site: Site, rows: slice | Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """gate * (B e) of some samples in a call's output of this shape, and the coefficient `[]`."""
        name, features, gate = self._gated(site, rows, shape)
        learnt = self._of(name)
        with full_precision(features):
            guess = features @ learnt.weight.T
        return (guess if gate is None else guess * gate).view(shape), learnt.coefficient()

    def learn(self, site: Site, rows: slice | Tensor, delta: Tensor) -> None:
        """Add the samples' estimates of their output's gradient, fp32 of the output's shape, to the step's sums."""
        name, features, gate = self._gated(site, rows, delta.shape)
        self._used.add(name)
        learnt, delta = self._of(name), delta.reshape(len(features), -1)
        if gate is None:
            learnt.step_power += len(delta)
        else:
            delta = delta * gate
            learnt.step_power += gate.square().sum(0)
        learnt.step_cross.addmm_(delta.T, features)

    def fit(self, site: Site, shape: torch.Size, losses: Tensor, dots: Tensor) -> None:
        """Add the losses, and the guess's share in them, fp32 `[copies, samples]`, less their means over copies."""
        assert self._clean is not None
        learnt = self._of((*site, shape.numel() // dots.shape[1], self._clean.features.shape[1]))
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

    def finish(self, ranks: DataParallelBatch | None) -> None:
        """End a step: make the weights that the next one uses.

        The decayed sum of e (outer) e over samples, fp64, and the decayed number of samples go with each number of
        features.
        """
        assert self._clean is not None
        features = self._clean.features.double()
        moments = {features.shape[1]: (features.T @ features, features.new_full((), float(len(features))))}
        used = sorted(self._used)
        if ranks is not None:
            used = sorted(ranks.union(used))  # lengths, and so shapes, may differ
            for count in sorted({name[-1] for name in used}):
                moments.setdefault(count, (features.new_zeros(count, count), features.new_zeros(())))
            parts = [part for _, of_features in sorted(moments.items()) for part in of_features]
            parts += (self._step_shifts[layers] for layers in sorted(self._step_shifts))
            ranks.sum_([*parts, *(part for name in used for part in self._of(name).step)])
        for count, (gram, samples) in moments.items():
            if count in self._moments:
                before = self._moments[count]
                gram, samples = FORGETTING * before[0] + gram, FORGETTING * before[1] + samples
            self._moments[count] = gram, samples
            values, vectors = torch.linalg.eigh(gram)
            values, vectors = values.clamp_min(0).float(), vectors.float()
            ridge = RIDGE * values.sum() + torch.finfo(torch.float32).tiny
            for name, learnt in self._learnt.items():
                if name[-1] == count:
                    with full_precision(gram):
                        learnt.end_step(values, vectors, ridge, samples)
        for name in used:
            self._learnt[name] = self._learnt.pop(name)
        self._forget_shapes()
        for layers, shift in self._step_shifts.items():
            self._shifts[layers] = FIT_FORGETTING * self._shifts.get(layers, torch.zeros_like(shift)) + shift
        self._step_shifts, self._clean = {}, None

    def _forget_shapes(self) -> None:
        """Keep those of each call's shapes that were used last."""
        kept: collections.Counter[Site] = collections.Counter()
        for name in list(self._learnt)[::-1]:
            kept[name[:2]] += 1
            if kept[name[:2]] > MOST_SHAPES:
                del self._learnt[name]

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The learnt weights, and the sums that they come from."""
        sites = [
            {"site": list(name), **{part: getattr(learnt, part).clone() for part in _Learnt.NAMES}}
            for name, learnt in self._learnt.items()
        ]
        shifts = {layers: shift.clone() for layers, shift in self._shifts.items()}
        return {"moments": dict(self._moments), "sites": sites, "shifts": shifts}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over a state."""
        self._moments = {count: (gram.to(device), n.to(device)) for count, (gram, n) in state["moments"].items()}
        self._shifts = {layers: shift.to(device).clone() for layers, shift in state["shifts"].items()}
        self._learnt = {}
        for each in state["sites"]:
            layer, number, units, features = each["site"]
            learnt = self._learnt[layer, number, units, features] = _Learnt(units, features, device)
            for part in _Learnt.NAMES:
                setattr(learnt, part, each[part].to(device).clone())

    def weights(self) -> Iterator[tuple[Site, Tensor]]:
        """B of each call's output, `[units, features]`."""
        for (layer, number, *_), learnt in self._learnt.items():
            yield (layer, number), learnt.weight
