"""The passes for batches of one shape: found from a watched forward and a few trials with two copies."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ulr_kernels import noise_contract
from ulr_kernels.backends.capture import capturing
from ulr_kernels.errors import RuleError, fail
from ulr_kernels.estimators.clean_prefix import CleanPrefixCache
from ulr_kernels.estimators.influence import Trial, TrialResult, refuse_influence, trials
from ulr_kernels.estimators.noised import CannotExpandLate, ForwardSpec, Keys, NoisedForward
from ulr_kernels.estimators.record import Record, alike, hidden, most_alike, other_outputs, same_outputs
from ulr_kernels.estimators.runner import PassRunner
from ulr_kernels.estimators.schedule import Pass
from ulr_kernels.estimators.settings import Settings
from ulr_kernels.estimators.step_keys import StepKeys
from ulr_kernels.estimators.trace import ModelTrace, Outline, fail_rows, same, two_copies
from ulr_kernels.estimators.view import ModelView
from ulr_kernels.nn.autograd_function import overridable_autograd_functions
from ulr_kernels.nn.batch import Batch, LossFunction, apply, tensors
from ulr_kernels.nn.carried_state import CarriedState, Readers
from ulr_kernels.nn.marks import SAMPLE

CPU_ACTIVATION_BYTES = 4 * 2**20
"""Bytes of a tensor on a CPU: a few of this size stay in its caches; much smaller ones cost more than that saves."""
CPU_CALL_BYTES = 2**19
"""Bytes of the median result on a CPU, where a layer is called more than once: its calls are small, and many."""


@dataclasses.dataclass
class History:
    """The steps that batches of one kind have had, and what their forwards called."""

    steps: int = 0
    looked: int = 1  # the step that last looked whether samples mix
    functions: set[Callable] = dataclasses.field(default_factory=set)  # of samples
    at_new_shape: bool = True  # the next step is the first one of its shape, which runs forwards of its own

    def is_due(self, copies: int) -> bool:
        """Whether a step of so many copies of a sample has to look again whether samples mix.

        Looks come after twice as many steps each. A look takes about four copies in forwards of two, and begins where
        this is 1 % of all steps so far. It waits while shapes are new, but not for ever.
        """
        times = 16 if self.at_new_shape else 2
        return self.steps >= times * self.looked and self.steps * copies >= 400


class Plan(NamedTuple):
    """The passes for batches of one shape."""

    passes: list[Pass]  # each is settled when it first runs
    clean: Pass  # the forward without noise, for the baseline
    names: tuple[str, ...]  # of the layers and parameters that have noise
    sites: Tensor  # int64 `[len(names)]`, their site numbers, on the model's device
    outline: Outline  # of a forward without noise
    form: tuple  # of the outline, as traced
    notes: tuple[str, ...]  # sentences on what the gradient leaves out
    history: History  # shared by plans that differ in sizes alone
    carried: CarriedState  # of the modules, likewise


def make_plan(runner: PassRunner, step_keys: StepKeys, batch: Batch, loss_fn: LossFunction, known: Plan | None) -> Plan:
    """Plan the passes for batches of a shape, from a watched forward of two copies without noise.

    Trials follow: a second forward without noise, and one with noise on some samples in all layers at once (two with
    `affects`). They are left out if `known`, the plan of a batch that differs in its sizes alone, has an outline of the
    same form; its passes are taken over. How other passes can run is found by `settle`.

    Raises:
        RuleError: the model, the loss or a setting breaks a rule.
    """
    view, s = runner.view, runner.settings
    outline, losses, trace = _trace_clean_forward(runner, batch, loss_fn)
    form, weights = outline.form, view.noised_layers
    is_known = known is not None and known.form == form
    carried = known.carried if known is not None and is_known else _carried_state(runner, trace, batch)
    runner.state.restore()
    carried.refuse_leftovers()
    _check_settings(runner, outline, weights)
    if batch.affects is not None:
        batch.affects.check(outline.noise_rows)
    names = (*outline.calls, *weights)
    sites = torch.tensor([noise_contract.signed64(noise_contract.site_id(name)) for name in names], device=view.device)
    keys = step_keys.of_sites(names, sites)
    if known is not None and is_known:
        outline = outline._replace(hidden=known.outline.hidden, shared_noise=known.outline.shared_noise)

    tried = _trying(runner, keys, batch, loss_fn, outline)
    passes = list(_passes(outline, view, s))
    if known is not None and is_known:
        on_outputs = [pass_ for pass_ in passes if pass_.layers]
        if batch.affects is not None and on_outputs:  # each shape has a matrix of its own
            ends = Trial(batch, False, [0, batch.affects.losses - 1])
            refuse_influence([ends], on_outputs, tried, TrialResult(torch.nan_to_num(losses), trace.record))
        taken = zip(passes, known.passes, strict=True)
        passes = [_bounded(_like(pass_, other, batch), outline, s, view.device) for pass_, other in taken]
    else:
        on_outputs = [pass_ for pass_ in passes if pass_.layers]
        to_try = trials(batch, s.max_rows)
        clean = tried(on_outputs, to_try[0], noisy=False)
        if not same(losses, clean.losses[:2]):
            rule = "compute the same in every forward, as each pass runs its own"
            fail("model", rule, "other losses the second time")
        if _splits(passes, batch, outline, s, view.device):
            _refuse_dependence_on_part(runner, keys, batch, loss_fn, clean)
        elif not weights and to_try[0].copies == 2:  # others compare forwards of different numbers of rows anyway
            _refuse_row_counting(runner, keys, batch, loss_fn, clean)
        if on_outputs:
            noisy = refuse_influence(to_try, on_outputs, tried, clean)
            for other in (trace.record, noisy):
                _refuse_hidden_samples(clean.record, other)
            if hidden(noisy, clean.record):
                outline = outline._replace(hidden=True, shared_noise={})
                passes = list(_passes(outline, view, s))
        if weights and len(passes) > 1:  # a single pass finds it when it is settled
            every = passes[-1]._replace(weights=tuple(weights), one_copy_per_forward=True)
            _refuse_unused(every.weights, runner.run_pass(ForwardSpec(every, keys, batch, 1))[0])
    clean_pass = _bounded(Pass((), (), 1, {}, {}, settled=True, shared_inputs=True), outline, s, view.device)
    history = known.history if known is not None and is_known else History()
    history.at_new_shape = True
    return Plan(passes, clean_pass, names, sites, outline, form, tuple(trace.notes), history, carried)


def look_again(runner: PassRunner, plan: Plan, keys: Keys, batch: Batch, loss_fn: LossFunction) -> None:
    """Repeat the trial of the first batch on a later one, as a model may have other branches by now.

    Not while a CUDA graph is captured, which must not synchronise.

    Raises:
        RuleError: samples mix.
    """
    if capturing(runner.view.device):
        return
    plan.history.looked = plan.history.steps
    on_outputs = [pass_ for pass_ in plan.passes if pass_.layers]
    if not on_outputs:
        return  # all samples share noise on weights
    tried = _trying(runner, keys, batch, loss_fn, plan.outline)
    to_try = trials(batch, runner.settings.max_rows)
    clean = tried(on_outputs, to_try[0], noisy=False)
    if _splits(plan.passes, batch, plan.outline, runner.settings, runner.view.device):
        _refuse_dependence_on_part(runner, keys, batch, loss_fn, clean)
    refuse_influence(to_try, on_outputs, tried, clean)


def _trying(
    runner: PassRunner, keys: Keys, batch: Batch, loss_fn: LossFunction, outline: Outline
) -> Callable[..., TrialResult]:
    """`tried(passes, trial, noisy=True)`: a forward with the noise of a trial in the layers of some passes, or none."""

    def tried(passes: Sequence[Pass], trial: Trial, noisy: bool = True) -> TrialResult:
        layers = tuple(layer for pass_ in passes for layer in pass_.layers)
        together = Pass(layers, (), trial.copies, outline.shared_noise, outline.noise_rows)

        def noisy_rows(layer: str, call: int) -> Tensor:
            marks = trial.noisy_rows(layer, call, outline.noise_rows, runner.view.device)
            return marks if noisy else torch.zeros_like(marks)

        record = Record(trial.copies * batch.samples)
        spec = ForwardSpec(together, keys, batch, trial.copies, noisy_rows=noisy_rows, record=record)
        return TrialResult(torch.nan_to_num(runner.run_losses(spec, loss_fn)[1]), record)

    return tried


def _splits(passes: Sequence[Pass], batch: Batch, outline: Outline, s: Settings, device: torch.device) -> bool:
    """Whether a forward may have some of the samples alone. With few samples none is tried: a model may treat a single
    row differently, as `squeeze` does."""
    most = min(_bounded(pass_, outline, s, device).max_samples or batch.samples for pass_ in passes)
    return batch.samples > 3 and (s.allocation != "even" or most < batch.samples)


def _refuse_dependence_on_part(
    runner: PassRunner, keys: Keys, batch: Batch, loss_fn: LossFunction, clean: TrialResult
) -> None:
    """Raise if half of the samples alone have other losses or outputs than among all."""
    samples = batch.samples // 2
    part, record = batch.part(slice(0, samples), 0), Record(samples)
    spec = ForwardSpec(Pass((), (), 1, {}, {}), keys, part, 1, record=record)
    found = torch.nan_to_num(runner.run_losses(spec, loss_fn)[1][0])
    same_losses = most_alike(found.reshape(samples, -1), clean.losses[0, :samples].reshape(samples, -1))
    if not same_losses or other_outputs(record, clean.record, samples):
        fail(
            "model",
            "compute each sample from its own alone, whatever samples share the forward (max_rows, the caches of a CPU "
            "or the allocation split them up)",
            f"other values of {samples} samples in a forward of their own than in one of {batch.samples}",
        )


def _refuse_row_counting(
    runner: PassRunner, keys: Keys, batch: Batch, loss_fn: LossFunction, clean: TrialResult
) -> None:
    """Raise if a forward of another number of copies than two has other outputs or losses."""
    copies = 1 if batch.many else 3  # a model may treat a single row differently, as `squeeze` does
    record = Record(copies * batch.samples)
    pass_ = Pass((), (), copies, {}, {})
    losses = runner.run_losses(ForwardSpec(pass_, keys, batch, copies, record=record), loss_fn)[1]
    if not (same(clean.losses[0], torch.nan_to_num(losses[0])) and same_outputs(record, clean.record, batch.samples)):
        fail(
            "model",
            "compute each row from its sample, whatever the number of rows, and 'loss_fn' its loss",
            f"other values in a forward of {copies} copies than in one of two",
        )


def _refuse_hidden_samples(clean: Record, other: Record) -> None:
    """Raise if a function of parameters and constants has another result for other samples, or with noise."""
    if function := clean.changed_constant(other):
        fail(
            "model",
            "compute everything from its samples by torch functions of the thread that runs the forward; torch.jit, "
            "NumPy and other threads hide that a result depends on samples",
            f"{function} and of a constant that changes with the samples",
        )


def _check_settings(runner: PassRunner, outline: Outline, weights: dict[str, str]) -> None:
    """Raise `RuleError` if a setting does not fit the layers of a model."""
    s = runner.settings
    if s.sampler not in ("iid", "auto") and s.baseline == "mean" and max(outline.calls.values(), default=0) > 1:
        rule = f"be 'clean' where sampler is {s.sampler!r} and a layer is called twice: a mean is biased"
        fail("baseline", rule, "'mean'")
    for layer, log_sigma in runner.log_sigma.items():
        if log_sigma.dim() and (others := outline.columns.get(layer, set()) - {len(log_sigma)}):
            rule = f"be False where a layer's calls have different numbers of features, as those of {layer!r}"
            fail("learn_sigma", rule, f"{len(log_sigma)} and {', '.join(map(str, sorted(others)))}")
    for layer in (*outline.calls, *weights.values()):  # both raise where a mapping has no entry
        s.copies_of(layer)
        s.sigma_of(layer)


def _passes(outline: Outline, view: ModelView, settings: Settings) -> Iterator[Pass]:
    layers, shared, weights = tuple(outline.calls), outline.shared_noise, view.noised_layers

    def noised(layers: tuple[str, ...], weights: tuple[str, ...], copies: int) -> Pass:
        noises = sum(outline.calls[layer] for layer in layers if layer not in shared) + len(weights)
        sampler = settings.sampler_of(noises)
        return Pass(layers, weights, copies, shared, outline.noise_rows, sampler=sampler, hidden=outline.hidden)

    if settings.injection == "joint":
        yield noised(layers, tuple(weights), settings.copies_of(""))
        return
    for source in layers:
        if source not in shared:
            group = (source, *(layer for layer in shared if shared[layer] == source))
            yield noised(group, (), settings.copies_of(source))
    together: dict[tuple[str, int], list[str]] = {}
    for name, layer in weights.items():
        together.setdefault((view.recurrent.get(layer, layer), settings.copies_of(layer)), []).append(name)
    for (_, copies), own in together.items():
        yield noised((), tuple(own), copies)


# --- rules of the model ----------------------------------------------------------------------------------------------


def _trace_clean_forward(runner: PassRunner, batch: Batch, loss_fn: LossFunction) -> tuple[Outline, Tensor, ModelTrace]:
    """A forward of two copies without noise: its outline, losses and trace. Raises if the model or the loss breaks a
    rule."""
    view, both = runner.view, two_copies(batch)
    inputs = both.inputs(1)
    trace = ModelTrace(view, inputs, batch.samples, runner.state)
    with _rows_are_samples("model", lambda: apply(view.model, batch.inputs(1))):
        outputs = trace.run(view.model, inputs, runner.state)
    for tensor in tensors(outputs):
        if tensor.requires_grad and not trace.marks(tensor) and trace.parameters_of(tensor) is None:
            trace.unseen(tensor)
    with _rows_are_samples("loss_fn", lambda: batch.losses(apply(view.model, batch.inputs(1)), loss_fn, 1)):
        losses, direct, others = runner.losses_and_direct_gradients(both, outputs, loss_fn, 1)
    first, second = losses[0].unflatten(0, (2, -1))
    losses = torch.stack([first, second.roll(-1, 0)])
    if not same(losses[0], losses[1]):
        fail_rows("the loss")
    trace.check(set(direct))
    for reference in others:
        if (read := reference()) is not None:
            trace.notes.append(
                f"the loss reads a tensor {list(read.shape)} that requires a gradient and gets none: make it an "
                "nn.Parameter"
            )
    if unused := [name for name, p in _trained_by_loss(loss_fn) if id(p) not in (*direct, *view.names)]:
        trace.notes.append(
            f"the loss has no derivative in {', '.join(unused)} of 'loss_fn': they get no gradient (a parameter of the "
            "model gets one from noise, whatever the loss)"
        )
    outline = trace.outline()
    if runner.settings.sampler == "hadamard":
        if several := [layer for layer, calls in outline.calls.items() if calls > 1]:
            trace.notes.append(
                f"the noises of the calls of {', '.join(several)} are not orthogonal to one another: sampler='auto' "
                "leaves independent signs to layers that are called more than once, which have the smaller error there"
            )
    if not outline.calls and not view.noised_layers:
        fail("model", "have a trained parameter", "none")
    return outline, losses, trace


def _carried_state(runner: PassRunner, trace: ModelTrace, batch: Batch) -> CarriedState:
    """The state that the model carries from one forward into the next: what the trace has left on modules, and a
    second forward reads."""
    left = [(place, tensors(place.value)) for place in runner.state.left()]
    left = [(place, own) for place, own in left if any(trace.marks(tensor) & SAMPLE for tensor in own)]
    if not left:
        return CarriedState(runner.view.model)
    readers = Readers()
    with overridable_autograd_functions(), readers, contextlib.suppress(RuntimeError, ValueError, IndexError):
        apply(runner.view.model, two_copies(batch).inputs(1))
    places = [place for place, own in left if not readers.read.isdisjoint(map(id, own))]
    return CarriedState(runner.view.model, places)


def _trained_by_loss(loss_fn: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters of a loss that is a module, or a method or partial function of modules."""
    if isinstance(loss_fn, nn.Module):
        yield from ((name, p) for name, p in loss_fn.named_parameters() if p.requires_grad)
    elif isinstance(loss_fn, functools.partial):
        for each in (loss_fn.func, *loss_fn.args, *loss_fn.keywords.values()):
            yield from _trained_by_loss(each)
    elif inspect.ismethod(loss_fn):
        yield from _trained_by_loss(loss_fn.__self__)


@contextlib.contextmanager
def _rows_are_samples(argument: str, on_one_copy: Callable[[], Any]) -> Iterator[None]:
    """Name the rule where torch raises an error about the rows of two copies, and `on_one_copy` raises none."""
    try:
        yield
    except RuleError:
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        try:
            on_one_copy()
        except Exception:
            raise error from None
        fail(
            argument,
            "take any number of rows, copies times samples, without a state from earlier forwards (reset it first) or "
            "anything else of a fixed number of rows (a graph is one sample, [graphs, nodes, ...], its nodes' losses "
            "have `affects`; ulr.optim's step(closure) trains any model)",
            f"in a forward of two copies: {error}",
            cause=error,
        )


def _refuse_unused(names: Sequence[str], forward: NoisedForward) -> None:
    """Raise if a parameter with noise was used by no torch function of a forward."""
    assert forward.perturbed is not None
    if unused := [name for name in names if name not in forward.perturbed.used]:
        rule = "use each trained parameter in its forward, through torch functions"
        fail("model", rule, f"none of {', '.join(unused)}")


# --- how a pass can run ----------------------------------------------------------------------------------------------


def settle(runner: PassRunner, plan: Plan, which: int, keys: Keys, batch: Batch, loss_fn: LossFunction) -> Pass:
    """A pass of a plan as it can run. If it is not settled, it is run with two copies in the ways that are in question,
    and the plan then has the result.

    Raises:
        RuleError: the settings ask for noise in a way in which the model cannot have it.
    """
    pass_ = plan.passes[which]
    if not pass_.settled:
        attempt = _try_weights if pass_.weights else _try
        settled = attempt(runner, pass_, keys, batch, loss_fn)._replace(settled=True)
        pass_ = plan.passes[which] = _bounded(settled, plan.outline, runner.settings, runner.view.device)
    return pass_


def _try(runner: PassRunner, pass_: Pass, keys: Keys, batch: Batch, loss_fn: LossFunction) -> Pass:
    spec = _spec(pass_, keys, batch)
    forward, losses = runner.run_losses(spec._replace(keep=True), loss_fn)
    pass_ = pass_._replace(shared_inputs=all(kept.call.shared for kept in forward.calls))
    # Rows of a parameter cannot be told from the parameter in a forward of one row, as one copy of a sample has.
    if pass_.hidden or any(kept.call.expands_rows for kept in forward.calls):
        return pass_
    assert spec.record is not None
    expected = TrialResult(losses, spec.record)
    expand_late, reuses_prefix = can_expand_late(runner, pass_, keys, batch, loss_fn, expected)
    return pass_._replace(expand_late=expand_late, reuses_prefix=reuses_prefix)


def _spec(pass_: Pass, keys: Keys, batch: Batch) -> ForwardSpec:
    """A forward of two copies for a trial: its noise is large enough to be seen."""
    return ForwardSpec(pass_, keys, batch, 2, large_noise=True, record=Record(2 * batch.samples))


def can_expand_late(
    runner: PassRunner, pass_: Pass, keys: Keys, batch: Batch, loss_fn: LossFunction, expected: TrialResult
) -> tuple[bool, bool]:
    """Whether two copies made at the first noised layer have the results of two copies made at the input, and whether
    a forward with cached results from before the noise has them too.

    The first fails where the model keeps something else with the rows of one copy, such as a batch size read before the
    noise: torch raises an error, or results differ. The second fails where results were written into tensors that
    each forward makes anew, or were changed after the noise.
    """
    spec = _spec(pass_._replace(expand_late=True), keys, batch)._replace(prefix=CleanPrefixCache())
    late = _matches(runner, spec, loss_fn, expected)
    return late, late and _matches(runner, spec._replace(record=Record(2 * batch.samples)), loss_fn, expected)


def _try_weights(runner: PassRunner, pass_: Pass, keys: Keys, batch: Batch, loss_fn: LossFunction) -> Pass:
    """A pass with noise on weights: a forward has several copies if that gives the results of one for each copy."""
    one_by_one = pass_._replace(layers=(), one_copy_per_forward=True)
    spec = _spec(one_by_one, keys, batch)
    forward, losses = runner.run_losses(spec, loss_fn)
    _refuse_unused(pass_.weights, forward)
    assert spec.record is not None
    if not _matches(runner, _spec(pass_._replace(layers=()), keys, batch), loss_fn, TrialResult(losses, spec.record)):
        if pass_.layers:
            rule = "be the same for all layers, or injection 'layerwise': some weights are used where no samples are"
            fail("noise", rule, runner.settings.noise)
        return one_by_one._replace(shared_inputs=True)
    if not pass_.layers:
        return pass_._replace(shared_inputs=True)
    forward, _ = runner.run_pass(ForwardSpec(pass_, keys, batch, 2, keep=True))
    if set(forward.order) != set(pass_.layers):
        missing = ", ".join(sorted(set(pass_.layers) - set(forward.order)))
        fail("noise", f"be the same for all parameters of a function, also for {missing}", runner.settings.noise)
    return pass_._replace(shared_inputs=all(kept.call.shared for kept in forward.calls))


def _matches(runner: PassRunner, spec: ForwardSpec, loss_fn: LossFunction, expected: TrialResult) -> bool:
    """Whether a forward of two copies has the expected losses and record."""
    try:
        losses = runner.run_losses(spec, loss_fn)[1]
    except (
        CannotExpandLate,
        RuntimeError,
        ValueError,
        TypeError,
        IndexError,
        AttributeError,
        AssertionError,
    ):  # rows that do not fit
        return False  # rows that do not fit
    assert spec.record is not None
    apart = expected.losses - expected.losses.roll(1, 0)
    return same(expected.losses, losses, apart) and alike(spec.record, expected.record, 2)


def _like(pass_: Pass, other: Pass, batch: Batch) -> Pass:
    """A pass that runs as another shape's does. With one sample copies are made at the input: a model may treat a
    single row differently, as `squeeze` does."""
    many = batch.many
    return pass_._replace(
        settled=other.settled,
        expand_late=other.expand_late and many,
        reuses_prefix=other.reuses_prefix and many,
        shared_inputs=other.shared_inputs,
        one_copy_per_forward=other.one_copy_per_forward,
    )


def _bounded(pass_: Pass, outline: Outline, settings: Settings, device: torch.device) -> Pass:
    """A pass whose memory is bounded: by `max_rows`, or on a CPU by the sizes of its tensors."""
    together = min(settings.copies_per_draw, pass_.copies)  # copies of a part that must share a forward
    if settings.max_rows is not None:
        rows = samples = settings.max_rows
    elif device.type != "cpu":
        return pass_
    else:
        begin = min(outline.begins[layer] for layer in pass_.layers) if pass_.expand_late else 0
        sizes = sorted([1, *outline.sizes[begin:]])
        rows = max(2, together, CPU_ACTIVATION_BYTES // sizes[-1])
        if max(outline.calls.values(), default=1) > 1:
            rows = max(rows, min(4 * rows, CPU_CALL_BYTES // max(1, sizes[len(sizes) // 2])))
        samples = max(1, CPU_ACTIVATION_BYTES // max([1, *outline.sizes]))
    if not pass_.shared_inputs and settings.memory == "keep":  # copies in several forwards would all be run once more
        rows = max(rows, pass_.copies) if settings.max_rows is None else rows
        together = pass_.copies if pass_.copies <= rows else together
    return pass_._replace(max_rows=rows, max_samples=min(samples, rows // together))
