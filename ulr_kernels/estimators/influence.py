"""Trials of noise that some losses must not feel: that of other samples, and that of rows which do not affect them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ulr_kernels.errors import fail
from ulr_kernels.estimators.record import Record, felt
from ulr_kernels.estimators.schedule import Pass
from ulr_kernels.nn.affects import NoiseRows
from ulr_kernels.nn.batch import Batch

MOST_TRIED_LOSSES = 16  # losses of a sample for which it is tried whether the rows that are said not to affect them do
FLIPPED_SHARE = 1e-4  # of the change of noisy samples, by which others may change, as a threshold may flip
MOST_TRIAL_COPIES = 10  # copies of a trial's forward, if max_rows allows so many


class TrialResult(NamedTuple):
    """The result of a trial's forward."""

    losses: Tensor  # fp32 `[copies, samples]` or `[copies, samples, losses]`
    record: Record  # of what it computed


class Trial:
    """The noise of one trial: on some rows in all layers, in one forward of several copies.

    In the first two copies half of the samples have noise, and the losses of the others must stay as they are. In each
    other copy all rows have noise that do not affect one loss, and this loss must stay as it is in all samples.

    Args:
        batch: the samples.
        samples: whether there are the first two copies.
        losses: of a sample, one for each other copy.
    """

    def __init__(self, batch: Batch, samples: bool, losses: Sequence[int]) -> None:
        self._batch, self._losses = batch, losses
        # Which samples get noise has no period (Thue and Morse's sequence), so it differs within pairs at any distance.
        marks = torch.tensor([sample.bit_count() % 2 == 1 for sample in range(batch.samples)], device="cpu")
        self._marks = torch.stack([marks, ~marks]) if samples else marks.new_zeros(0, batch.samples)
        self.copies = len(self._marks) + len(losses)

    def noisy_rows(self, layer: str, call: int, rows: NoiseRows, device: torch.device) -> Tensor:
        """The rows of a call that have noise: bool `[copies * samples * rows]`, or `[copies * samples]`."""
        marks = self._marks.to(device).flatten()
        if self._batch.affects is None:
            return marks
        marks = marks.repeat_interleave(rows[layer][call])
        if not self._losses:
            return marks
        others = self._batch.affects.unaffecting_rows(layer, call, self._losses, self._batch.samples, rows)
        return torch.cat([marks, others])

    def felt(self, noisy: TrialResult, clean: TrialResult, share: float, rounding: float) -> set[int | None]:
        """The losses that have felt noise which they must not feel; None: samples without noise, in their losses or in
        any tensor that a layer reads.

        Args:
            noisy, clean: the forwards with and without noise.
            share: of the change of the losses that may feel the noise, by which others may change.
            rounding: the norm by which the losses of one copy may change in any case.
        """
        found: set[int | None] = set()
        change = noisy.losses - clean.losses
        if count := len(self._marks):
            quiet = torch.zeros(self.copies * self._batch.samples, dtype=torch.bool)
            quiet[: self._marks.numel()] = ~self._marks.flatten()
            if felt(noisy.record, clean.record, quiet.to(change.device), share):
                found.add(None)
            marks = self._marks.to(change.device)
            others, own = change[:count][~marks].norm(), change[:count][marks].norm()
            if others > share * own + math.sqrt(count) * rounding:
                found.add(None)
        for copy, loss in enumerate(self._losses, count):
            if change[copy, :, loss].norm() > (share * change[copy].norm() + rounding) / math.sqrt(change.shape[-1]):
                found.add(loss)
        return found


def trials(batch: Batch, max_rows: int | None) -> list[Trial]:
    """The trials for a batch, with the same even number of copies each."""
    if batch.affects is None:
        return [Trial(batch, True, ())]
    last = batch.affects.losses - 1
    count = min(MOST_TRIED_LOSSES, last + 1)
    losses = [last * which // max(1, count - 1) for which in range(count)]  # from the first to the last one
    at_once = (
        MOST_TRIAL_COPIES if max_rows is None else min(MOST_TRIAL_COPIES, max(2, max_rows // batch.samples // 2 * 2))
    )
    forwards = -(-(count + 2) // at_once)
    copies = -(-(count + 2) // forwards)
    copies += copies % 2
    losses += [last] * (copies * forwards - 2 - count)
    later = [losses[start : start + copies] for start in range(copies - 2, len(losses), copies)]
    return [Trial(batch, True, losses[: copies - 2]), *(Trial(batch, False, each) for each in later)]


def refuse_influence(
    to_try: Sequence[Trial],
    passes: Sequence[Pass],
    tried: Callable[[Sequence[Pass], Trial], TrialResult],
    clean: TrialResult,
) -> Record:
    """Raise if noise on some samples changes the losses of others, or noise on rows a loss that they do not affect: the
    gradient would lack what it does there.

    Samples mix where they are computed from one another (attention across the batch, its mean, a loss of pairs), and
    where a layer has its rows in another order than samples first, so that noise is counted for other samples. It shows
    in the losses, and where these do not see it (the next layer is zero, the loss counts errors) in the tensors that
    layers read and the model returns.

    A number that must not feel the noise is computed by the same operations on the same numbers as without, so its
    change is held to a limit of rounding alone. A forward with noise in all layers then shows whatever one for each
    layer would show. These follow where something shows, with a limit that lets thresholds flip, and name the layer.

    Args:
        to_try: trials of the batch, with the same number of copies each.
        passes: with noise on outputs.
        tried: of some passes and a trial, the forward with the trial's noise in their layers.
        clean: the forward without noise.

    Returns:
        The record of the first forward.

    Raises:
        RuleError: a loss or a layer feels such noise.
    """
    rounding = 1e-5 * float(clean.losses[0].norm())
    first: TrialResult | None = None
    for trial in to_try:
        together = tried(passes, trial)
        first = first or together
        suspects = trial.felt(together, clean, 0.0, rounding)
        for pass_ in passes if suspects else ():
            seen = suspects & trial.felt(tried([pass_], trial), clean, FLIPPED_SHARE, rounding)
            if None in seen:
                fail(
                    "model",
                    "compute each sample from its own alone, and give each layer its samples first: [samples, ...], or "
                    "rows of a sample one after the other, [samples * rows, ...]",
                    f"losses or tensors that change with the noise of other samples ({', '.join(pass_.layers)})",
                )
            if seen:
                fail(
                    "affects",
                    "not be 0 where a row's noise changes a loss",
                    f"0 for rows whose noise changes loss {seen.pop()} ({', '.join(pass_.layers)})",
                )
    assert first is not None
    return first.record
