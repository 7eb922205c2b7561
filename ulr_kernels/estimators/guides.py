"""Guides: guesses of the gradients of layers' outputs, which take away the part of the estimate's error they explain.

A guide g is a guess of the gradient of a sample's loss in a layer's output that does not depend on this step's noise.
With L_c - sigma <eps_c, g> in the place of the loss and g added to the estimate, the estimate is unbiased whatever g is
(a control variate: arXiv 1511.05176), and its squared error falls by |delta|^2 / |delta - g|^2, delta the gradient.

Here g = a * gate * (B e). e are features of a sample's error at the model's outputs, gate is the derivative of the
elementwise functions that read the layer's output, and B is the regression of earlier estimates on gate * e. It has a
row for each feature of the output and each part of its positions: each axis is cut into at most four parts, because
rows of single positions learn too slowly from estimates that are mostly noise. The coefficient a, 0 to 1, is the
regression of earlier losses on sigma <eps_c, gate * (B e)>, so that a bad guide does no harm. Where the baseline is the
loss without noise, the mean that noise has added to it in earlier steps is subtracted, too: a pair of copies would
cancel it, single copies do not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree

from ulr_kernels import noise_contract, ops
from ulr_kernels.errors import fail
from ulr_kernels.estimators.clean_pass import CleanPass, Rows, Site, of_rows
from ulr_kernels.estimators.data_parallel import DataParallelBatch
from ulr_kernels.nn.batch import Batch, LossFunction, repeat, tensors

Name = tuple[str, int, int, int]  # of what is learnt: layer, number of the call, units and features of a sample
Features = Callable[[Any, Any], Tensor]  # of outputs and targets: [samples, features]

FORGETTING = 0.98  # of a step's share in the sums of later ones
RIDGE = 5e-3  # of the regression, times the trace of the features' second moments
FIT_FORGETTING = 0.9
MOST_FEATURES = 64  # more are projected on random signs
PROJECTED_AT_ONCE = 2**16  # so many features, to bound the memory of their signs
MOST_PARTS = 4  # of an axis of positions that have weights of their own
PROJECTION = noise_contract.site_id("ulr_kernels.guides.projection")


def error_features(
    outputs: Any, batch: Batch, loss_fn: LossFunction, features: Features | None
) -> tuple[Tensor, Tensor]:
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


class Parts:
    """The parts of an output's positions that share weights, and its features: its units.

    Args:
        grid: the output's shape, `[samples or their rows, ...]`.
        feature_dim: its axis of features.
        samples: how many it has.
    """

    def __init__(self, grid: Sequence[int], feature_dim: int, samples: int, device: torch.device) -> None:
        self.shape = (samples, grid[0] // samples, *grid[1:])
        features = (feature_dim if feature_dim >= 0 else len(grid) + feature_dim) + 1
        self._of_axes: dict[int, Tensor] = {}  # by axis: fp32 `[size, parts]`, 1 where a position is in a part
        sizes = list(self.shape)
        for axis, size in enumerate(self.shape):
            if axis not in (0, features) and size > 1:
                sizes[axis] = min(size, MOST_PARTS)
                part = torch.arange(size, device=device) * sizes[axis] // size
                self._of_axes[axis] = F.one_hot(part, sizes[axis]).float()
        self._parts = sizes
        self.units = math.prod(sizes[1:])

    def means(self, x: Tensor) -> Tensor:
        """The means over each part, `[samples, units]`, of values for each position."""
        x = x.reshape(self.shape)
        for axis, parts in self._of_axes.items():
            x = (x.movedim(axis, -1) @ (parts / parts.sum(0))).movedim(-1, axis)
        return x.reshape(self.shape[0], self.units)

    def spread(self, x: Tensor) -> Tensor:
        """The value of each position, `[samples, rows, ...]`, of values `[samples, units]`."""
        x = x.reshape(self._parts)
        for axis, parts in self._of_axes.items():
            x = (x.movedim(axis, -1) @ parts.T).movedim(-1, axis)
        return x


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

    Calls with other parts, and batches of another number of features, are learnt apart.

    Args:
        seed: of the estimator, for the projection of many features.
        features: the user's function, or None.
    """

    def __init__(self, seed: int, features: Features | None) -> None:
        self._seed, self.features = seed, features
        self._learnt: dict[Name, _Learnt] = {}
        self._moments: dict[int, tuple[Tensor, Tensor]] = {}  # by the number of features: of samples, see `finish`
        self._shifts: dict[tuple[str, ...], Tensor] = {}  # by pass: decayed sums of losses less clean ones, and count
        self._step_shifts: dict[tuple[str, ...], Tensor] = {}
        self._clean: CleanPass | None = None
        self._used: set[Name] = set()  # in this step
        # Of each call, as it was last guessed: the name, the parts, the samples' features and gate.
        self._calls: dict[Site, tuple[Name, Parts, Tensor, Tensor | None]] = {}

    def begin(self, clean: CleanPass) -> None:
        """Begin a step: the features and gates of its samples."""
        features = clean.features
        assert features is not None
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
            self._learnt[name] = _Learnt(*name[2:], self._clean.losses.device)
        return self._learnt[name]

    def guess(self, site: Site, rows: Rows, grid: Sequence[int], feature_dim: int) -> tuple[Tensor, Tensor]:
        """gate * (B e) of some samples in a call's output of this shape, and the coefficient `[]`.

        What follows for this call, until the next guess, is of the same samples.
        """
        assert self._clean is not None
        features = self._clean.features
        assert features is not None
        own = of_rows(features, rows)
        parts = Parts(grid, feature_dim, len(own), features.device)
        gate = self._clean.gate(site, rows).derivative
        gate = gate.view(parts.shape) if gate is not None and gate.numel() == math.prod(parts.shape) else None
        name = (*site, parts.units, features.shape[1])
        self._calls[site] = name, parts, own, gate
        learnt = self._of(name)
        with full_precision(features):
            guess = parts.spread(own @ learnt.weight.T)
        return (guess if gate is None else guess * gate).reshape(tuple(grid)), learnt.coefficient()

    def learn(self, site: Site, delta: Tensor) -> None:
        """Add the samples' estimates of their output's gradient, fp32 of the output's shape, to the step's sums."""
        name, parts, features, gate = self._calls[site]
        self._used.add(name)
        learnt, delta = self._of(name), delta.reshape(parts.shape)
        with full_precision(features):
            if gate is None:
                learnt.step_power += len(features)
            else:
                delta = delta * gate
                learnt.step_power += parts.means(gate.square()).sum(0)
            learnt.step_cross.addmm_(parts.means(delta).T, features)

    def fit(self, site: Site, losses: Tensor, dots: Tensor) -> None:
        """Add the losses, and the guess's share in them, fp32 `[copies, samples]`, less their means over copies."""
        learnt = self._of(self._calls[site][0])
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
        assert self._clean is not None and self._clean.features is not None
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
        self._learnt = dict(sorted(self._learnt.items()))  # ranks meet shapes in orders of their own
        for layers, shift in self._step_shifts.items():
            self._shifts[layers] = FIT_FORGETTING * self._shifts.get(layers, torch.zeros_like(shift)) + shift
        self._step_shifts, self._clean, self._calls = {}, None, {}

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The learnt weights, and the sums that they come from."""
        sites = [
            {"site": list(name), **{part: getattr(learnt, part).clone() for part in _Learnt.NAMES}}
            for name, learnt in self._learnt.items()
        ]
        shifts = [{"layers": list(layers), "sums": shift.clone()} for layers, shift in self._shifts.items()]
        return {"moments": dict(self._moments), "sites": sites, "shifts": shifts}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over a state."""
        self._moments = {count: (gram.to(device), n.to(device)) for count, (gram, n) in state["moments"].items()}
        self._shifts = {tuple(each["layers"]): each["sums"].to(device).clone() for each in state["shifts"]}
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
