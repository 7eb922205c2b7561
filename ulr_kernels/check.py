"""ulr.check: the quality of the estimator on a model and batch, and the causes where it is poor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulr_kernels import noise_contract, ops
from ulr_kernels.estimators.plan import Plan
from ulr_kernels.estimators.predicted_cosine import AutogradReference, predicted_cosine
from ulr_kernels.estimators.ulr import ULR
from ulr_kernels.nn.affects import Affects
from ulr_kernels.nn.batch import LossFunction

STREAMS, STREAM_SHAPE = 8, (64, 64)
SMALLER, LARGER = 0.1, 100.0  # other sigmas to try where something is wrong


@dataclasses.dataclass(frozen=True)
class LayerCheck:
    """A layer's estimates against autograd of the clean loss.

    Attributes:
        layer: its name.
        slope: mean over steps of <estimate, gradient> / |gradient|^2; 1 if unbiased and sigma is small.
        slope_error: the standard error of that mean.
        cosine: mean cosine of an estimate and the gradient.
        cosine_error: the standard error of that mean.
        predicted_cosine: the cosine that the numbers of copies and noise coordinates predict for small sigma; NaN with
            `affects`, a guide or a support, and where the allocation is not even.
        agreement: mean cosine of the estimates of two steps, the cosine's square if unbiased; needs no gradient.
        agreement_error: the standard error of that mean.

    Numbers that need a gradient are NaN where autograd has none.
    """

    layer: str
    slope: float
    slope_error: float
    cosine: float
    cosine_error: float
    predicted_cosine: float
    agreement: float
    agreement_error: float


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of `ulr.check`.

    Attributes:
        ok: nothing wrong was found.
        verdict: the problems, or that there are none, in words.
        layers: the trained layers in the order of their first call.
        correlations: between the noise of "layers", "steps", "copies": the greatest |correlation| of two streams, in
            its standard deviations under independence.
    """

    ok: bool
    verdict: str
    layers: tuple[LayerCheck, ...] = ()
    correlations: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        if self.layers:
            width = max(len(layer.layer) for layer in self.layers) + 2
            width = max(width, len("layer") + 2)
            lines.append(f"{'layer':<{width}}{'slope':>17}{'cosine':>17}{'predicted':>11}{'agreement':>12}")
            for it in self.layers:
                slope = f"{it.slope:.3f} +- {it.slope_error:.3f}"
                cosine = f"{it.cosine:.3f} +- {it.cosine_error:.3f}"
                predicted = "-" if math.isnan(it.predicted_cosine) else f"{it.predicted_cosine:.3f}"
                lines.append(f"{it.layer:<{width}}{slope:>17}{cosine:>17}{predicted:>11}{it.agreement:>12.3f}")
        if self.correlations:
            streams = ", ".join(f"{kind} {value:.1f}" for kind, value in self.correlations.items())
            lines.append(f"greatest correlation of noise streams, in standard deviations: {streams}")
        return "\n".join([*lines, self.verdict])


def check(
    model: nn.Module,
    x: Any,
    y: Any,
    loss_fn: LossFunction,
    *,
    affects: Affects = None,
    steps: int = 16,
    state: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Report:
    """Compare the estimator with autograd of the loss without noise, on one batch, and name the problems.

    The predicted cosine is (1 + V / (M |g|^2))^(-1/2), with g the gradient, M the independent directions per sample
    (copies, or half of them where antithetic) and V the summed variance of one direction; for one sample and d noise
    coordinates it is (1 + (d + 1) / M)^(-1/2). It assumes a loss that is linear over the noise, and independent copies.

    Args:
        model, x, y, loss_fn, affects: as for `ulr.ULR` and its `backward`. Gradients and training flags are left as
            they were.
        steps: estimates to make, at least 2; each has its own noise.
        state: `state_dict()` of the estimator to check, for what its guides and sigmas have learnt; None: a new one.
        settings: of `ulr.ULR`; noise on weights of some layers only layer-wise, as one pass of both kinds has no
            prediction.

    Returns:
        A report whose `str()` is a table and a verdict. Where the estimator refuses the model, the batch or the loss,
        its message is the verdict.

    Raises:
        ValueError: `steps` is below 2, or a setting is invalid.
    """
    if steps < 2:
        raise ValueError(f"ulr.check: 'steps' must be at least 2, got {steps}")
    estimator = ULR(model, **settings)
    if state is not None:
        estimator.load_state_dict({**state, "seed": estimator.seed, "step": 0})
    kinds = {estimator.settings.noise_of(layer) for layer in estimator.view.layers.values()}
    if len(kinds) > 1 and estimator.settings.injection == "joint":
        raise ValueError(
            "ulr.check: 'noise' must be the same for all layers, or injection 'layerwise', "
            f"got {estimator.settings.noise!r}"
        )
    saved: list[tuple[Tensor, Tensor | None]] = [(p, p.grad) for p in estimator.model.parameters()]
    try:
        plan = estimator.plan(x, y, loss_fn, affects)
        reference = AutogradReference(estimator.view, x, y, loss_fn)
        saved += [(p, p.grad) for p in reference.loss_parameters]
        for p in reference.loss_parameters:
            p.grad = None  # what is saved must not be added to
        predicted = _predicted(estimator, plan, reference, affects)
        estimates = _estimates(estimator, reference.parameters, x, y, loss_fn, affects, steps)
        layers = tuple(_compare(name, estimates[name], reference, predicted) for name in estimates)
        correlations = _correlations(estimator, plan.names)
        others = {}
        if any(_is_off(layer) or _is_noisy(layer) for layer in layers):
            for factor in (SMALLER, LARGER):
                other = ULR(model, **{**settings, "sigma": _scaled(estimator.settings.sigma, factor)})
                predicted = _predicted(other, plan, reference, affects)
                again = _estimates(other, reference.parameters, x, y, loss_fn, affects, steps)
                others[factor] = {name: _compare(name, again[name], reference, predicted) for name in again}
    except ValueError as error:
        return Report(False, str(error))
    finally:
        for parameter, grad in saved:
            parameter.grad = grad
    problems = [f"{note[0].upper()}{note[1:]}." for note in dict.fromkeys(plan.notes)] + _problems(
        layers, others, correlations
    )
    return Report(not problems, "\n".join(problems) or _praise(layers), layers, correlations)


def _predicted(estimator: ULR, plan: Plan, reference: AutogradReference, affects: Affects) -> dict[str, float]:
    """The predicted cosine of each layer that autograd has a gradient of; none if rows or samples count differently."""
    s = estimator.settings
    if affects is not None or s.allocation != "even" or s.guide or s.support != "all":
        return {}
    shared = plan.outline.shared_noise
    return {name: predicted_cosine(estimator, shared, name, reference) for name in reference.gradients}


def _estimates(
    estimator: ULR,
    parameters: Mapping[str, list[Tensor]],
    x: Any,
    y: Any,
    loss_fn: LossFunction,
    affects: Affects,
    steps: int,
) -> dict[str, Tensor]:
    """Each layer's estimates, fp64 `[steps, parameters]`."""
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for _ in range(steps):
        for parameter in estimator.model.parameters():
            parameter.grad = None
        estimator.backward(x, y, loss_fn, affects)
        for name in parameters:
            rows[name].append(torch.cat([p.grad.flatten().double() for p in parameters[name] if p.grad is not None]))
    return {name: torch.stack(row) for name, row in rows.items()}


def _scaled(sigma: float | Mapping[str, float], factor: float) -> float | dict[str, float]:
    return {name: value * factor for name, value in sigma.items()} if isinstance(sigma, Mapping) else sigma * factor


def _compare(name: str, estimates: Tensor, reference: AutogradReference, predicted: Mapping[str, float]) -> LayerCheck:
    units = F.normalize(estimates, dim=1)
    steps = len(units)
    agreement, error = _mean((units @ units.sum(0) - 1) / (steps - 1))  # of each with all others
    agreement_error = 2 * error  # as each is in the others' means too
    gradient = reference.gradients.get(name)
    if gradient is None:
        unknown = math.nan
        return LayerCheck(name, unknown, unknown, unknown, unknown, unknown, agreement, agreement_error)
    slope, slope_error = _mean(estimates @ gradient / gradient.square().sum())
    cosine, cosine_error = _mean(units @ F.normalize(gradient, dim=0))
    expected = predicted.get(name, math.nan)
    return LayerCheck(name, slope, slope_error, cosine, cosine_error, expected, agreement, agreement_error)


def _mean(values: Tensor) -> tuple[float, float]:
    """The mean and its standard error."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def _correlations(estimator: ULR, sites: tuple[str, ...]) -> dict[str, float]:
    """The greatest correlation among noise streams that should be independent, in standard deviations."""
    settings = estimator.settings

    def stream(site: str, step: int, copy: int) -> Tensor:
        key = noise_contract.fold_in(noise_contract.fold_in(estimator.seed, step), noise_contract.site_id(site))
        return ops.noise(STREAM_SHAPE, key, draw=copy, dist=settings.dist, sampler=settings.sampler_of(1)).flatten()

    kinds = {
        "layers": [stream(site, 0, 0) for site in sites],
        "steps": [stream(sites[0], step, 0) for step in range(STREAMS)],
        "copies": [stream(sites[0], 0, copy) for copy in range(STREAMS)] if settings.sampler == "iid" else [],
    }
    result = {}
    for kind, streams in kinds.items():
        if len(streams) > 1:
            correlation = torch.corrcoef(torch.stack(streams).double()).fill_diagonal_(0)
            result[kind] = float(correlation.abs().max() * math.sqrt(streams[0].numel()))
    return result


# --- words -----------------------------------------------------------------------------------------------------------


def _is_off(layer: LayerCheck) -> bool:
    return abs(layer.slope - 1) > max(4 * layer.slope_error, 0.1)


def _is_noisy(layer: LayerCheck) -> bool:
    """Whether estimates have less of the gradient than predicted, or more in common with one another than that."""
    common = layer.agreement - layer.cosine**2
    error = layer.agreement_error + 2 * abs(layer.cosine) * layer.cosine_error
    return layer.predicted_cosine - layer.cosine > max(
        4 * layer.cosine_error, 0.3 * layer.predicted_cosine
    ) or common > max(4 * error, 0.15)


def _distance(layer: LayerCheck) -> float:
    """The distance from the slope and cosine of an unbiased estimator without rounding."""
    return abs(layer.slope - 1) + (
        0 if math.isnan(layer.predicted_cosine) else max(layer.predicted_cosine - layer.cosine, 0)
    )


def _names(layers: list[LayerCheck]) -> str:
    return ", ".join(repr(layer.layer) for layer in layers)


def _problems(
    layers: tuple[LayerCheck, ...],
    others: Mapping[float, Mapping[str, LayerCheck]],
    correlations: Mapping[str, float],
) -> list[str]:
    """A sentence for each thing that is wrong.

    Args:
        layers: the checks.
        others: those at other sigmas, by factor and layer, if anything is wrong with `layers`.
        correlations: of the noise streams.
    """
    causes: dict[float | None, list[LayerCheck]] = {}  # the factor of sigma that helps -> the layers
    for layer in layers:
        if _is_off(layer) or _is_noisy(layer):
            # Rounding adds noise. Where there is none to explain, a larger sigma only smooths, which can hide a bias.
            factors = (SMALLER, LARGER) if _is_noisy(layer) else (SMALLER,)
            best = min(factors, key=lambda factor, name=layer.layer: _distance(others[factor][name]))
            helps = _distance(others[best][layer.layer]) < 0.8 * _distance(layer)
            causes.setdefault(best if helps else None, []).append(layer)
    problems = [
        f"The noise of two {kind} is correlated ({value:.0f} standard deviations): the random streams are broken."
        for kind, value in correlations.items()
        if value > 6
    ]
    if too_large := causes.get(SMALLER):
        problems.append(
            f"sigma is too large for {_names(too_large)}: the loss bends over the noise, and the gradient is that of a "
            f"smoother loss. {SMALLER:g} times sigma comes closer to autograd."
        )
    if too_small := causes.get(LARGER):
        problems.append(
            f"sigma is too small for {_names(too_small)}: the noise drowns in the rounding of the losses. {LARGER:g} "
            "times sigma comes closer to autograd."
        )
    if unexplained := causes.get(None):
        problems.append(
            f"The estimate is biased or too noisy for {_names(unexplained)}, and {SMALLER:g} times sigma does not "
            "help: the loss may be far from smooth, its rows may depend on one another, or the forward on a state."
        )
    return problems


def _praise(layers: tuple[LayerCheck, ...]) -> str:
    blind = [layer for layer in layers if math.isnan(layer.slope)]
    if len(blind) == len(layers):
        return (
            "Autograd has no gradient to compare with (the loss or an activation is not differentiable); the agreement "
            "of two steps is all that can be said."
        )
    vague = [layer for layer in layers if layer.slope_error > 0.25]
    sentences = []
    if len(vague) + len(blind) < len(layers):
        sentences.append("The estimates agree with autograd.")
    if vague:
        sentences.append(f"For {_names(vague)} more copies or steps are needed to tell.")
    if blind:
        sentences.append(f"Autograd has no gradient for {_names(blind)}: something after them is not differentiable.")
    return " ".join(sentences)
