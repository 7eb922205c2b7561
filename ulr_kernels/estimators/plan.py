"""What a batch of given shapes asks of the estimator: its passes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ulr_kernels import contract
from ulr_kernels.estimators.batch import Batch, LossFunction, apply, repeat, tensors
from ulr_kernels.estimators.prefix import Prefix
from ulr_kernels.estimators.reach import Rows
from ulr_kernels.estimators.recording import Recording, Trace, fail_rows, same
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
        tried: the fields below are decided; `settle` does it just before the pass first runs.
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
    tried: bool = False
    cut: bool = False
    resumes: bool = False
    shared: bool = False
    apart: bool = False
    rows: int | None = None
    part: int | None = None


class Plan(NamedTuple):
    """What batches of one shape do.

    Attributes:
        passes: the noised forwards, each settled when it first runs.
        clean: the forward without noise, for the baseline.
        names: of the layers and parameters that have noise.
        sites: int64 `[len(names)]`, their site numbers, on the model's device.
        trace: what a forward of the shape's first batch has shown.
    """

    passes: list[Pass]
    clean: Pass
    names: tuple[str, ...]
    sites: Tensor
    trace: Trace


def make_plan(estimator: ULR, batch: Batch, loss_fn: LossFunction, known: Plan | None) -> Plan:
    """Plan the passes for batches of a shape, from one clean forward of two copies.

    Unless `known`, the plan of a batch that differs in its sizes alone, has the same outline, trials follow: a second
    clean forward, and one with noise on some samples in all layers at once (two or three with a reach). How each pass
    can run is found by `settle`, or taken over from `known`.

    Raises:
        ValueError: the model, the loss or a setting breaks a rule.
    """
    recording, losses = _watch(estimator, batch, loss_fn)
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
    sites = torch.tensor([contract.signed64(contract.site_id(name)) for name in names], device=device)
    keys = estimator.keys(names, sites)
    passes = list(_passes(layers, weights, riders, recording.rows, s))
    trace = recording.trace()
    known = known if known is not None and known.trace.outline == trace.outline else None
    noised = [item for item in passes if item.layers]

    def losses_with(items: Sequence[Pass], trial: Influence, noisy: bool = True) -> Tensor:
        item = Pass(tuple(layer for each in items for layer in each.layers), (), trial.copies, riders, recording.rows)

        def rows(layer: str, call: int) -> Tensor:
            marks = trial.noisy(layer, call, recording.rows, device)
            return marks if noisy else torch.zeros_like(marks)

        outputs = estimator.noised(item, keys, batch, trial.copies, keep=False, noisy=rows)[1]
        return torch.nan_to_num(batch.losses(outputs, loss_fn, trial.copies))

    if known is None:
        room = AT_ONCE if s.max_rows is None else min(AT_ONCE, max(2, s.max_rows // batch.samples // 2 * 2))
        trials = influences(batch, room)
        clean = losses_with(noised, trials[0], noisy=False)
        if not same(losses, clean[:2]):
            rule = "compute the same in every forward, as each pass runs its own"
            fail("model", rule, "other losses the second time")
        refuse_influence(trials if noised else (), noised, losses_with, clean)
        refuse_unused(estimator, passes, keys, batch)
    elif batch.reach is not None and noised:  # a matrix for each shape
        ends = Influence(batch, False, [0, batch.reach.losses - 1])
        refuse_influence([ends], noised, losses_with, torch.nan_to_num(losses))
    if known is not None:
        passes = [_like(item, other, batch) for item, other in zip(passes, known.passes, strict=True)]
        passes = [_bounded(item, trace, s, device) if item.tried else item for item in passes]
    without = _bounded(Pass((), (), 1, {}, {}, tried=True, shared=True), trace, s, device)
    return Plan(passes, without, names, sites, trace)


def _like(item: Pass, other: Pass, batch: Batch) -> Pass:
    """A pass that runs as another shape's does. A single row may be treated differently, as by `squeeze`."""
    many = batch.samples > 1
    return item._replace(
        tried=other.tried,
        cut=other.cut and many,
        resumes=other.resumes and many,
        shared=other.shared,
        apart=other.apart,
    )


def settle(estimator: ULR, plan: Plan, which: int, keys: Mapping[str, Tensor], batch: Batch) -> Pass:
    """A pass of a plan as it can run: found by running it with two copies when it is first wanted."""
    item = plan.passes[which]
    if not item.tried:
        item = _tried(estimator, item, keys, batch)._replace(tried=True)
        item = plan.passes[which] = _bounded(item, plan.trace, estimator.settings, estimator.device)
    return item


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


def _watch(estimator: ULR, batch: Batch, loss_fn: LossFunction) -> tuple[Recording, Tensor]:
    """A clean forward of two copies and its losses; whether the model and the loss keep the rules shows in it."""
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
    return recording, losses


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


class Influence:
    """Noise that some losses must not feel: on some rows in all layers, in one forward of several copies.

    In the first two copies half of the samples have noise, and the losses of the others must stay as they are. In each
    other copy all rows have noise that do not reach one loss, and this loss must stay as it is in all samples.

    Args:
        batch: the samples.
        samples: whether there are the first two copies.
        losses: of a sample, one for each other copy.
    """

    def __init__(self, batch: Batch, samples: bool, losses: Sequence[int]) -> None:
        self._batch, self._losses = batch, losses
        # Which samples get noise has no period (Thue and Morse's sequence), so it differs within pairs at any distance.
        marks = torch.tensor([sample.bit_count() % 2 == 1 for sample in range(batch.samples)])
        self._marks = torch.stack([marks, ~marks]) if samples else marks.new_zeros(0, batch.samples)
        self.copies = len(self._marks) + len(losses)

    def noisy(self, layer: str, call: int, rows: Rows, device: torch.device) -> Tensor:
        """Which rows of a call have noise: bool `[copies * samples * rows]`, or `[copies * samples]`."""
        marks = self._marks.to(device).flatten()
        if self._batch.reach is None:
            return marks
        marks = marks.repeat_interleave(rows[layer][call])
        if not self._losses:
            return marks
        return torch.cat([marks, self._batch.reach.beyond(layer, call, self._losses, self._batch.samples, rows)])

    def felt(self, change: Tensor, share: float, rounding: float) -> set[int | None]:
        """The losses that have felt it, None for those of the samples without noise in the first two copies.

        Args:
            change: of the losses, fp32 `[copies, samples]` or `[copies, samples, losses]`.
            share: of the change of the losses that may feel the noise, what others may change by.
            rounding: the norm of the change that one copy's losses may have in any case.
        """
        found: set[int | None] = set()
        if count := len(self._marks):
            noisy = self._marks.to(change.device)
            others, own = change[:count][~noisy].norm(), change[:count][noisy].norm()
            if others > share * own + math.sqrt(count) * rounding:
                found.add(None)
        for copy, loss in enumerate(self._losses, count):
            if change[copy, :, loss].norm() > (share * change[copy].norm() + rounding) / math.sqrt(change.shape[-1]):
                found.add(loss)
        return found


TRIED = 16  # losses of a sample of which it is tried whether they are out of reach as they are said to be
AT_ONCE = 10  # copies of a trial's forward, if max_rows allows so many


def influences(batch: Batch, at_once: int) -> list[Influence]:
    """The trials for a batch, with up to so many copies in a forward: an even number, the same in each."""
    if batch.reach is None:
        return [Influence(batch, True, ())]
    last = batch.reach.losses - 1
    count = min(TRIED, last + 1)
    losses = [last * which // max(1, count - 1) for which in range(count)]  # from the first to the last one
    forwards = -(-(count + 2) // at_once)
    copies = -(-(count + 2) // forwards)
    copies += copies % 2
    losses += [last] * (copies * forwards - 2 - count)
    first, rest = losses[: copies - 2], losses[copies - 2 :]
    others = [rest[start : start + copies] for start in range(0, len(rest), copies)]
    return [Influence(batch, True, first), *(Influence(batch, False, each) for each in others)]


def refuse_influence(
    trials: Sequence[Influence], passes: Sequence[Pass], losses_with: Callable[..., Tensor], clean: Tensor
) -> None:
    """Raise if noise on some samples changes the losses of others, or noise on rows a loss that they do not reach: the
    gradient would lack what it does there.

    Samples mix where they see one another (attention across the batch, its mean, a loss of pairs), and where a layer
    has its rows in another order than samples first, so that the noise goes to others than those it is counted for.

    A loss that must not feel the noise is computed by the same operations on the same numbers as without, so its change
    is held to a limit of rounding alone. A forward with noise in all layers then shows what one for each layer would
    show; these follow where something shows, with a limit that lets thresholds flip, and name the layer.

    Args:
        trials: of the batch, with the same number of copies each.
        passes: that have noise on outputs.
        losses_with: of some passes and a trial, the losses of a forward with the trial's noise in their layers.
        clean: fp32 `[copies, samples]` or `[copies, samples, losses]`, the losses without noise.
    """
    rounding = 1e-5 * float(clean[0].norm())
    for trial in trials:
        suspects = trial.felt(losses_with(passes, trial) - clean, 0.0, rounding)
        for item in passes if suspects else ():
            felt = suspects & trial.felt(losses_with([item], trial) - clean, 0.01, rounding)
            if None in felt:
                fail(
                    "model",
                    "compute each sample from its own alone, and give each layer its samples first: [samples, ...], or "
                    "rows of a sample one behind the other, [samples * rows, ...]",
                    f"losses that change with the noise of other samples ({', '.join(item.layers)})",
                )
            if felt:
                fail(
                    "reach",
                    "not be 0 where a row's noise changes a loss",
                    f"0 for rows whose noise changes loss {felt.pop()} ({', '.join(item.layers)})",
                )


def refuse_unused(estimator: ULR, passes: Sequence[Pass], keys: Mapping[str, Tensor], batch: Batch) -> None:
    """Raise if a parameter with noise is used by no torch function of the forward."""
    names = tuple(name for item in passes for name in item.weights)
    if not names:
        return
    item = passes[-1]._replace(layers=(), weights=names, apart=True)
    noised, _ = estimator.noised(item, keys, batch, 1, keep=False)
    assert noised.probing is not None
    unmet = [name for name in names if name not in noised.probing.met]
    if unmet:
        fail(
            "model", "use each trained parameter in its forward, through torch functions", f"none of {', '.join(unmet)}"
        )


def _tried(estimator: ULR, item: Pass, keys: Mapping[str, Tensor], batch: Batch) -> Pass:
    """A pass and how it can run, found by running it with two copies."""
    if item.weights:
        return _tried_weights(estimator, item, keys, batch)
    noised, outputs = estimator.noised(item, keys, batch, 2)
    item = item._replace(shared=all(kept.call.shared for kept in noised.calls))
    # Rows made of a parameter cannot be told from the parameter in a forward of one row, as a cut makes of one sample.
    if any(isinstance(kept.call, RowsCall) for kept in noised.calls):
        return item
    cut, resumes = can_cut(estimator, item._replace(cut=True), keys, batch, tensors(outputs))
    return item._replace(cut=cut, resumes=resumes)


def can_cut(
    estimator: ULR, item: Pass, keys: Mapping[str, Tensor], batch: Batch, expected: list[Tensor]
) -> tuple[bool, bool]:
    """Whether two copies made at the first noised layer give the outputs of two copies made at the input; and whether
    a forward that is given the results before the noise, instead of making them, does so too.

    The first is so where the layer's output is all that is used afterwards. Anything else that is alive there (a batch
    size read before) has the rows of one copy, and either fails or shows in the outputs. The second is not so where
    some results were written into tensors that are made anew each time, or were changed after the noise.
    """
    prefix = Prefix()
    cut = _equal(estimator, item, keys, batch, expected, prefix)
    return cut, cut and _equal(estimator, item, keys, batch, expected, prefix)


def _tried_weights(estimator: ULR, item: Pass, keys: Mapping[str, Tensor], batch: Batch) -> Pass:
    """A pass with noise on weights: its forwards have several copies if that gives what one for each copy gives."""
    apart = item._replace(layers=(), apart=True)
    _, outputs = estimator.noised(apart, keys, batch, 2)
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


def _bounded(item: Pass, trace: Trace, settings: Settings, device: torch.device) -> Pass:
    """A pass whose memory is bounded: by `max_rows`, or on a CPU so that a tensor has about `ACTIVATION` bytes."""
    together = min(settings.by_draw, item.copies)  # copies of a part that must share a forward
    if settings.max_rows is not None:
        rows = samples = settings.max_rows
    elif device.type != "cpu":
        return item
    else:
        begin = min(trace.begins[layer] for layer in item.layers) if item.cut else 0
        rows = max(2, together, ACTIVATION // max(1, *trace.sizes[begin:]))
        samples = max(1, ACTIVATION // max(1, *trace.sizes))
    if not item.shared and settings.memory == "keep":  # copies in several forwards would all be run once more
        rows = max(rows, item.copies) if settings.max_rows is None else rows
        together = item.copies if item.copies <= rows else together
    return item._replace(rows=rows, part=min(samples, rows // together))


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
