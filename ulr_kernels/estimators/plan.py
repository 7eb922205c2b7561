"""What a batch of given shapes asks of the estimator: its passes."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ulr_kernels import noise_contract
from ulr_kernels.estimators.batch import Batch, LossFunction, apply, repeat, tensors
from ulr_kernels.estimators.meeting import Meeting
from ulr_kernels.estimators.prefix import Prefix
from ulr_kernels.estimators.reach import Rows
from ulr_kernels.estimators.recording import Recording, fail_rows, same
from ulr_kernels.estimators.settings import Settings, fail
from ulr_kernels.nn.local import RowsCall

if TYPE_CHECKING:
    from ulr_kernels.estimators.ulr import ULR


ACTIVATION = 4 * 2**20
"""Bytes of a tensor on a CPU: a few such stay in its caches; to run much smaller ones costs more than that saves."""


class Pass(NamedTuple):
    """One noised forward.

    Attributes:
        layers: those that get a gradient from noise on their outputs.
        weights: names of the parameters that have noise themselves.
        copies: of each sample.
        riders: layer -> the layer whose noise serves it too (`estimators/sums.py`).
        noise_rows: layer -> the rows of noise that a sample has in each of its calls.
        cut: the layers before the first noise run on one copy only.
        resumes: chunks of copies share what the layers before the first noise have made (`estimators/prefix.py`).
        shared: what the noised layers read is the same in all copies.
        apart: forwards have one copy each, as this model's functions of noised weights cannot be split by copy.
        rows: the most, copies times samples, that the model is given at once; None: all.
        part: the most samples at once, likewise.
    """

    layers: tuple[str, ...]
    weights: tuple[str, ...]
    copies: int
    riders: Mapping[str, str]
    noise_rows: Rows
    cut: bool = False
    resumes: bool = False
    shared: bool = False
    apart: bool = False
    rows: int | None = None
    part: int | None = None


class Plan(NamedTuple):
    """The passes; the clean one for the baseline; and what is noised, layers and parameters, with the site numbers."""

    passes: tuple[Pass, ...]
    clean: Pass
    names: tuple[str, ...]
    sites: Tensor


def make_plan(estimator: ULR, batch: Batch, loss_fn: LossFunction) -> Plan:
    """Watch a clean forward of two copies, then try for each pass whether noise keeps to its samples, and whether its
    prefix can run on one copy."""
    recording = _watch(estimator, batch, loss_fn)
    s = estimator.settings
    if s.sampler == "sobol" and s.baseline == "mean" and max(recording.calls.values(), default=0) > 1:
        fail("baseline", "be 'clean' where sampler is 'sobol' and a layer is called twice: a mean is biased", "'mean'")
    for layer, log_sigma in estimator.log_sigma.items():
        if log_sigma.dim() and (others := recording.columns.get(layer, set()) - {len(log_sigma)}):
            rule = f"be False where a layer's calls have different numbers of features, as those of {layer!r}"
            fail("learn_sigma", rule, f"{len(log_sigma)} and {', '.join(map(str, sorted(others)))}")
    layers, weights = tuple(recording.calls), {name: estimator.layers[id(p)] for name, p in estimator.weights.items()}
    for layer in (*layers, *weights.values()):  # both raise where a mapping has no entry
        s.copies_of(layer)
        s.sigma_of(layer)
    if batch.reach is not None:
        batch.reach.check(recording.rows)
    estimator.riders = riders = recording.riders()
    names = (*layers, *weights)
    device = estimator.device
    sites = torch.tensor([noise_contract.signed64(noise_contract.site_id(name)) for name in names], device=device)
    keys = estimator.keys(names, sites)
    passes = []
    for item in _passes(layers, weights, riders, recording.rows, s):
        if item.layers:
            _refuse_mixing(estimator, item, keys, batch, loss_fn)
            _refuse_reach(estimator, item, keys, batch, loss_fn)
        passes.append(_tried(estimator, item, keys, batch))
    clean, *bounded = (_bounded(item, recording, s, device) for item in (Pass((), (), 1, {}, {}, shared=True), *passes))
    return Plan(tuple(bounded), clean, names, sites)


def _passes(
    layers: tuple[str, ...], weights: Mapping[str, str], riders: Mapping[str, str], rows: Rows, settings: Settings
) -> Iterator[Pass]:
    """`layers` have noise on their outputs; `weights`: name of a parameter with noise -> its layer."""
    if settings.injection == "joint":
        yield Pass(layers, tuple(weights), settings.copies_of(""), riders, rows)
        return
    for lead in layers:
        if lead not in riders:
            group = (lead, *(layer for layer in riders if riders[layer] == lead))
            yield Pass(group, (), settings.copies_of(lead), riders, rows)
    for layer in dict.fromkeys(weights.values()):
        own = tuple(name for name in weights if weights[name] == layer)
        yield Pass((), own, settings.copies_of(layer), riders, rows)


def _watch(estimator: ULR, batch: Batch, loss_fn: LossFunction) -> Recording:
    """A clean forward of two copies; whether the model and the loss keep the rules shows in it."""
    inputs = repeat(batch.x, 2)
    recording = Recording(estimator.layers, estimator.followed, inputs, batch.samples)
    with _rows_are_samples("model", lambda: apply(estimator.model, repeat(batch.x, 1))), recording:
        outputs = apply(estimator.model, inputs)
    for call in recording.met_calls:
        call.check_unchanged()
    with _rows_are_samples("loss_fn", lambda: batch.losses(apply(estimator.model, repeat(batch.x, 1)), loss_fn, 1)):
        losses = batch.losses(outputs, loss_fn, 2)
    if not same(losses[0], losses[1]):
        fail_rows("the loss")
    refuse_unreached(estimator.followed, estimator.names, recording)
    if not recording.calls and not estimator.weights:
        fail("model", "have a trained parameter", "none")
    with Meeting({}, (), ()):  # watched, as in all passes: torch's transformers do other things where nobody looks
        outputs = apply(estimator.model, repeat(batch.x, 2))
    again = batch.losses(outputs, loss_fn, 2)
    if not same(losses, again):
        fail("model", "compute the same in every forward, as each pass runs its own", "other losses the second time")
    return recording


@contextlib.contextmanager
def _rows_are_samples(argument: str, on_one_copy: Callable[[], Any]) -> Iterator[None]:
    """What torch says of the rows of two copies, in words where one copy has no such trouble."""
    try:
        yield
    except (RuntimeError, IndexError, ValueError) as error:
        if str(error).startswith("ulr"):
            raise
        try:
            on_one_copy()
        except Exception:
            raise error from None
        fail(
            argument,
            "take any number of rows, copies times samples, without a state from earlier forwards or anything else of "
            "a fixed number of rows (a graph is one sample, [graphs, nodes, ...], its nodes' losses have a reach; "
            "ulr.optim's step(closure) trains any model)",
            f"in a forward of two copies: {error}",
        )


def _refuse_mixing(estimator: ULR, item: Pass, keys: Mapping[str, Tensor], batch: Batch, loss_fn: LossFunction) -> None:
    """Raise if noise on some samples changes the losses of others: the gradient would lack what it does there.

    That is so where samples see one another (attention across the batch, its mean, a loss of pairs), and where a layer
    has its rows in another order than samples first, so that the noise goes to others than those it is counted for.
    """
    # Which samples get noise has no period (Thue and Morse's sequence), so it differs within pairs at any distance.
    marks = [sample.bit_count() % 2 == 1 for sample in range(batch.samples)]
    noisy = torch.tensor([marks, [not mark for mark in marks]], device=estimator.device)
    silent = _losses(estimator, item, keys, batch, loss_fn, lambda *_: torch.zeros_like(noisy).flatten())
    change = _losses(estimator, item, keys, batch, loss_fn, lambda *_: noisy.flatten()) - silent
    noisy = noisy.to(change.device)
    if change[~noisy].norm() > 0.01 * change[noisy].norm() + 1e-5 * silent.norm():
        fail(
            "model",
            "compute each sample from its own alone, and give each layer its samples first: [samples, ...], or rows of "
            "a sample one behind the other, [samples * rows, ...]",
            f"losses that change with the noise of other samples ({', '.join(item.layers)})",
        )


TRIED = 16  # losses of a sample of which it is tried whether they are out of reach as they are said to be


def _refuse_reach(estimator: ULR, item: Pass, keys: Mapping[str, Tensor], batch: Batch, loss_fn: LossFunction) -> None:
    """Raise if noise on all rows that do not reach some loss changes it: the gradient would lack what it does there."""
    reach = batch.reach
    if reach is None:
        return
    nothing = torch.zeros(2 * batch.samples, dtype=torch.bool, device=estimator.device)
    silent = _losses(estimator, item, keys, batch, loss_fn, lambda *_: nothing)
    limit = 1e-5 * silent[0].norm() / math.sqrt(reach.losses)
    count = min(TRIED, reach.losses + reach.losses % 2)  # from the first to the last one, two copies at a time
    tried = [(reach.losses - 1) * which // (count - 1) for which in range(count)]
    for losses in zip(tried[::2], tried[1::2], strict=True):
        noisy = functools.partial(reach.beyond, losses=losses, samples=batch.samples, rows=item.noise_rows)
        change = _losses(estimator, item, keys, batch, loss_fn, noisy) - silent
        for copy, loss in enumerate(losses):
            if change[copy, :, loss].norm() > 0.01 * change[copy].norm() / math.sqrt(reach.losses) + limit:
                fail(
                    "reach",
                    "not be 0 where a row's noise changes a loss",
                    f"0 for rows whose noise changes loss {loss} ({', '.join(item.layers)})",
                )


def _losses(
    estimator: ULR,
    item: Pass,
    keys: Mapping[str, Tensor],
    batch: Batch,
    loss_fn: LossFunction,
    noisy: Callable[[str, int], Tensor],
) -> Tensor:
    """The losses of two copies, of whose layers some rows have noise."""
    outputs = estimator.noised(item._replace(weights=()), keys, batch, 2, keep=False, noisy=noisy)[1]
    return torch.nan_to_num(batch.losses(outputs, loss_fn, 2))


def _tried(estimator: ULR, item: Pass, keys: Mapping[str, Tensor], batch: Batch) -> Pass:
    """A pass and how it can run, found by running it with two copies."""
    if item.weights:
        return _tried_weights(estimator, item, keys, batch)
    noised, outputs = estimator.noised(item, keys, batch, 2)
    # Rows made of a parameter cannot be told from the parameter in a forward of one row, as a cut makes of one sample.
    rowed = any(isinstance(kept.call, RowsCall) for kept in noised.calls)
    cut = not rowed and can_cut(estimator, item, keys, batch, tensors(outputs))
    item = item._replace(cut=cut, shared=all(kept.call.shared for kept in noised.calls))
    return item._replace(resumes=cut and can_resume(estimator, item, keys, batch))


def can_resume(estimator: ULR, item: Pass, keys: Mapping[str, Tensor], batch: Batch) -> bool:
    """Whether a forward that is handed the results in front of the noise gives what the forward gave that made them.

    Not where some of these were written into tensors that are made anew each time, or were changed behind the noise.
    """
    prefix = Prefix()
    _, outputs = estimator.noised(item, keys, batch, 2, prefix=prefix)
    expected = [output.clone() for output in tensors(outputs)]
    return _equal(estimator, item, keys, batch, expected, prefix)


def _tried_weights(estimator: ULR, item: Pass, keys: Mapping[str, Tensor], batch: Batch) -> Pass:
    """A pass with noise on weights: its forwards have several copies if that gives what one for each copy gives."""
    apart = item._replace(layers=(), apart=True)
    noised, outputs = estimator.noised(apart, keys, batch, 2)
    assert noised.probing is not None
    unmet = [name for name in item.weights if name not in noised.probing.met]
    if unmet:
        fail(
            "model", "use each trained parameter in its forward, through torch functions", f"none of {', '.join(unmet)}"
        )
    if not _equal(estimator, item._replace(layers=()), keys, batch, tensors(outputs)):
        if item.layers:
            rule = "be the same for all layers, or injection 'layerwise': some weights are used where no samples are"
            fail("noise", rule, estimator.settings.noise)
        return apart._replace(shared=True)
    noised, _ = estimator.noised(item, keys, batch, 2)
    if set(noised.order) != set(item.layers):
        missing = ", ".join(sorted(set(item.layers) - set(noised.order)))
        fail("noise", f"be the same for all parameters of a function, also for {missing}", estimator.settings.noise)
    return item._replace(shared=all(kept.call.shared for kept in noised.calls))


def _bounded(item: Pass, recording: Recording, settings: Settings, device: torch.device) -> Pass:
    """A pass whose memory is bounded: by `max_rows`, or on a CPU so that a tensor has about `ACTIVATION` bytes."""
    together = min(settings.by_draw, item.copies)  # copies of a part that must share a forward
    if settings.max_rows is not None:
        rows = samples = settings.max_rows
    elif device.type != "cpu":
        return item
    else:
        begin = min(recording.begins[layer] for layer in item.layers) if item.cut else 0
        rows = max(2, together, ACTIVATION // max(1, *recording.sizes[begin:]))
        samples = max(1, ACTIVATION // max(1, *recording.sizes))
    if not item.shared and settings.memory == "keep":  # copies in several forwards would all be run once more
        rows = max(rows, item.copies) if settings.max_rows is None else rows
        together = item.copies if item.copies <= rows else together
    return item._replace(rows=rows, part=min(samples, rows // together))


def can_cut(estimator: ULR, item: Pass, keys: Mapping[str, Tensor], batch: Batch, expected: list[Tensor]) -> bool:
    """Whether two copies made at the first noised layer give the outputs of two copies made at the input.

    They do where the layer's output is all that is used afterwards. Anything else that is alive there (a residual
    branch, a batch size read before) has the rows of one copy, and either fails or shows in the outputs.
    """
    return _equal(estimator, item._replace(cut=True), keys, batch, expected)


def _equal(
    estimator: ULR,
    item: Pass,
    keys: Mapping[str, Tensor],
    batch: Batch,
    expected: list[Tensor],
    prefix: Prefix | None = None,
) -> bool:
    """Whether a pass gives these outputs for two copies."""
    try:
        outputs = tensors(estimator.noised(item, keys, batch, 2, prefix=prefix)[1])
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
            "bring each trained parameter together with the samples in a function with one output, samples first, each "
            "from its own alone, and a derivative in the parameter. Those that it does not can be frozen "
            "(requires_grad_(False)), or trained by noise on the weights (noise={name: 'weights'}, ulr.optim), or left "
            "out of the model",
            ", ".join(problems),
        )
