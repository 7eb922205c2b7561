"""What a batch of given shapes asks of the estimator: its passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ulr_kernels import contract
from ulr_kernels.estimators.batch import Batch, LossFunction, apply, repeat, tensors
from ulr_kernels.estimators.recording import Recording, fail_rows, same
from ulr_kernels.estimators.settings import Settings, fail
from ulr_kernels.nn.names import parameter_names

if TYPE_CHECKING:
    from ulr_kernels.estimators.ulr import ULR


ACTIVATION = (
    4 * 2**20
)  # bytes: on a CPU a few such tensors stay in the caches; much smaller ones cost more than that saves


class Pass(NamedTuple):
    """One noised forward.

    Attributes:
        layers: those that get a gradient.
        riders: layer -> the layer whose noise serves it too (`estimators/sums.py`).
        cut: the layers before the first noise run on one copy only.
        shared: what the noised layers read is the same in all copies.
        rows: the most, copies times samples, that the model is given at once; None: all.
        part: the most samples at once, likewise.
    """

    layers: tuple[str, ...]
    riders: Mapping[str, str]
    cut: bool = False
    shared: bool = False
    rows: int | None = None
    part: int | None = None


class Plan(NamedTuple):
    """The passes; the clean one for the baseline; and the noised layers with their site numbers."""

    passes: tuple[Pass, ...]
    clean: Pass
    layers: tuple[str, ...]
    sites: Tensor


def make_plan(estimator: ULR, batch: Batch, loss_fn: LossFunction) -> Plan:
    """Watch a clean forward of two copies, then try for each pass whether its prefix can run on one copy."""
    recording = _watch(estimator, batch, loss_fn)
    s = estimator.settings
    if s.sampler == "sobol" and s.baseline == "mean" and max(recording.calls.values()) > 1:
        fail("baseline", "be 'clean' where sampler is 'sobol' and a layer is called twice: a mean is biased", "'mean'")
    layers = tuple(recording.calls)
    for layer in layers:  # both raise where a mapping has no entry
        s.copies_of(layer)
        s.sigma_of(layer)
    estimator.riders = riders = recording.riders()
    groups = [layers]
    if s.injection == "layerwise":
        leads = [layer for layer in layers if layer not in riders]
        groups = [(lead, *(layer for layer in riders if riders[layer] == lead)) for lead in leads]
    device = estimator.device
    sites = torch.tensor([contract.signed64(contract.site_id(layer)) for layer in layers], device=device)
    keys = estimator.keys(layers, sites)
    passes = [_tried(estimator, Pass(group, riders), keys, batch) for group in groups]
    clean, *bounded = (_bounded(item, recording, s, device) for item in (Pass((), {}, shared=True), *passes))
    return Plan(tuple(bounded), clean, layers, sites)


def _watch(estimator: ULR, batch: Batch, loss_fn: LossFunction) -> Recording:
    """A clean forward of two copies; whether the model and the loss keep the rules shows in it."""
    inputs = repeat(batch.x, 2)
    recording = Recording(estimator.layers, estimator.model_parameters, inputs, batch.samples)
    with recording:
        outputs = apply(estimator.model, inputs)
    for call in recording.met_calls:
        call.check_unchanged()
    losses = batch.losses(outputs, loss_fn, 2)
    if not same(losses[0], losses[1]):
        fail_rows("the loss")
    refuse_unreached(estimator.model_parameters, parameter_names(estimator.model), recording)
    again = batch.losses(apply(estimator.model, repeat(batch.x, 2)), loss_fn, 2)
    if not same(losses, again):
        fail("model", "compute the same in every forward, as each pass runs its own", "other losses the second time")
    return recording


def _tried(estimator: ULR, item: Pass, keys: Mapping[str, Tensor], batch: Batch) -> Pass:
    """A pass and how it can run, found by running it with two copies."""
    noised, outputs = estimator.noised(item, keys, batch, 2)
    cut = can_cut(estimator, item, keys, batch, tensors(outputs))
    return item._replace(cut=cut, shared=all(call.shared for _, call in noised.calls))


def _bounded(item: Pass, recording: Recording, settings: Settings, device: torch.device) -> Pass:
    """A pass whose memory is bounded: by `max_rows`, or on a CPU so that a tensor has about `ACTIVATION` bytes."""
    together = settings.by_draw if item.layers else 1  # copies of a part that must share a forward
    if settings.max_rows is not None:
        rows = samples = settings.max_rows
    elif device.type != "cpu":
        return item
    else:
        begin = min(recording.begins[layer] for layer in item.layers) if item.cut else 0
        rows = max(together, ACTIVATION // max(1, *recording.sizes[begin:]))
        samples = max(1, ACTIVATION // max(1, *recording.sizes))
    if not item.shared and settings.memory == "keep":  # copies in several forwards would all be run once more
        copies = settings.copies_of(item.layers[0])
        rows = max(rows, copies) if settings.max_rows is None else rows
        together = copies if copies <= rows else together
    return item._replace(rows=rows, part=min(samples, rows // together))


def can_cut(estimator: ULR, item: Pass, keys: Mapping[str, Tensor], batch: Batch, expected: list[Tensor]) -> bool:
    """Whether two copies made at the first noised layer give the outputs of two copies made at the input.

    They do where the layer's output is all that is used afterwards. Anything else that is alive there (a residual
    branch, a batch size read before) has the rows of one copy, and either fails or shows in the outputs.
    """
    try:
        outputs = tensors(estimator.noised(item._replace(cut=True), keys, batch, 2)[1])
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):  # rows that do not fit
        return False
    return len(outputs) == len(expected) and all(
        a.shape == b.shape and same(a, b, a.float() - a.float().roll(batch.samples, 0))
        for a, b in zip(expected, outputs, strict=True)
    )


def refuse_unreached(parameters: Sequence[Tensor], names: Mapping[int, str], recording: Recording) -> None:
    """Raise if a trained parameter gets no gradient, or not all of it."""
    problems = []
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if id(parameter) in recording.elsewhere:
            problems.append(f"{names[id(parameter)]} (used by {recording.elsewhere[id(parameter)]})")
        elif id(parameter) not in recording.reached:
            problems.append(f"{names[id(parameter)]} (met in no call)")
    if problems:
        fail(
            "model",
            "bring each trained parameter together with the samples in a function with one output, samples first, and "
            "a derivative in the parameter. Those that it does not can be frozen (requires_grad_(False)), or trained "
            "by noise on the weights (ulr.optim.MeZO), or left out of the model",
            ", ".join(problems),
        )
    if not recording.calls:
        fail("model", "have a trained parameter", "none")
