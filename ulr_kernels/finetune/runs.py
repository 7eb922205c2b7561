"""The jobs of `ulr finetune`: a new run, or the rest of one, each with its log and its report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

from ulr_kernels.finetune.settings import Settings
from ulr_kernels.jobs import JobError

try:
    import matplotlib  # noqa: F401  (needed at the very end: better refused at the start)
    import torch.distributed as dist
    from torch import Tensor
    from tqdm import tqdm

    from ulr_kernels.finetune import report, trajectory
    from ulr_kernels.finetune.job import Job
    from ulr_kernels.jobs import checkpoint, memory, run_folder
except ImportError as error:
    raise JobError(f"fine-tuning needs the package {error.name}: pip install '.[finetune]'") from error

LOG, HISTORY, FEATURES = "trajectory.ulr", "history.json", "features.safetensors"


@dataclasses.dataclass
class History:
    """The parts of a run that its log does not hold: the typed commands and the figures of each evaluation."""

    commands: list[str]
    evaluations: list[dict[str, Any]]

    def save(self, folder: Path) -> None:
        checkpoint.write_atomically(folder / HISTORY, json.dumps(dataclasses.asdict(self), indent=2).encode())

    @classmethod
    def load(cls, folder: Path, steps: int) -> History:
        """That of a run which has done so many steps; before the first one there may be none."""
        try:
            history = cls(**json.loads((folder / HISTORY).read_text()))
            alone = {"ranks": 1, "bytes_sent": 0}  # of runs before there were ranks
            history.evaluations = [alone | record for record in history.evaluations]
            return history
        except FileNotFoundError:
            if steps:
                raise JobError(f"{folder / HISTORY}: no such file, which the run wrote before its first step") from None
            return cls([], [])
        except (OSError, ValueError, TypeError) as error:
            raise JobError(f"{folder / HISTORY}: cannot be read: {error}") from error


def start(settings: Settings, out: Path, command: str, overwrite: bool = False, shared: bool = False) -> None:
    """Fine-tune a model from its pre-trained weights and write the report.

    Ranks call it alike; the first one alone writes and prints. They share the folder.

    Args:
        settings: what the run is.
        out: its folder, made if need be.
        command: what the user typed, for the report.
        overwrite: replace a run that is there.
        shared: by the ranks of the default process group.

    Raises:
        JobError: the run cannot be made; nothing has been written.
        OSError, FloatingPointError, WorkerError: a file could not be written, the loss is not finite, or a rank did not
            answer; finished steps are in the log.
    """
    if settings.start and Path(settings.start).resolve().parent == out.resolve():
        raise JobError(f"start '{settings.start}' must be in another folder than this run, which needs it to the end")
    job = Job(settings, shared=shared)
    with contextlib.ExitStack() as stack:
        writer = None
        if job.rank == 0:
            stack.enter_context(run_folder.prepare(out, LOG, (HISTORY, FEATURES, *report.FILES), overwrite))
            writer = stack.enter_context(contextlib.closing(trajectory.Writer.create(out / LOG, job.header)))
        _Run(job, out, writer, History([command], []), []).finish()


def resume(folder: Path, command: str, shared: bool = False) -> None:
    """Continue the run in a folder, bitwise as if it had never stopped, and write its report.

    So many ranks as there are now, whatever their number before, each replay the log. Arguments and errors are those of
    `start`.
    """
    with contextlib.ExitStack() as stack:
        first = not shared or dist.get_rank() == 0
        if first:
            stack.enter_context(run_folder.held(folder))
        log = trajectory.read(folder / LOG, torn=True)
        job = Job(Settings.of_log(folder / LOG, log.header.settings["run"]), log.header, shared)
        job.replay(log)
        history = History.load(folder, job.step)
        history.commands.append(command)
        writer = stack.enter_context(contextlib.closing(trajectory.Writer(folder / LOG, log))) if first else None
        _Run(job, folder, writer, history, list(log.losses)).finish()


class _Run:
    """A job with its files; on ranks other than the first one without its `writer`."""

    def __init__(
        self, job: Job, folder: Path, writer: trajectory.Writer | None, history: History, losses: list[float]
    ) -> None:
        self.job, self.folder, self.writer, self.history, self.losses = job, folder, writer, history, losses
        steps, count = job.settings.steps, min(job.settings.evaluations, job.settings.steps)
        self.due = {steps * number // count for number in range(count + 1)}
        # A process that is stopped takes with it how long its steps since the last evaluation took.
        none = {"timed_steps": 0, "seconds": 0.0, "met": 0, "bytes_sent": 0}
        last = history.evaluations[-1] if history.evaluations else none
        self.timed_steps, self.seconds, self.met = last["timed_steps"], last["seconds"], last["met"]
        self.bytes_sent = last["bytes_sent"]

    def finish(self) -> None:
        job = self.job
        self._save_history()  # what was typed, should the run be stopped before its next evaluation
        job.agree({"evaluations": len(self.history.evaluations)})
        if job.settings.tune == "head":
            self._make_features()
        memory.keep_freed()
        job.warm_up()
        title = f"{job.settings.model} {job.settings.tune}"
        with self._bar(total=job.settings.steps, initial=job.step, desc=title, unit="step") as bar:
            self._evaluate_if_due(bar)
            while job.step < job.settings.steps:
                self._step(bar)
                self._evaluate_if_due(bar)
        if self.writer is not None:
            for path in report.write(self.folder, job, self.history.commands, self.history.evaluations, self.losses):
                print(path)

    def _bar(self, **options: Any) -> Any:
        """On a terminal, and on the first rank alone."""
        return tqdm(disable=None if self.writer is not None else True, **options)

    def _save_history(self) -> None:
        if self.writer is not None:
            self.history.save(self.folder)

    def _step(self, bar: Any) -> None:
        started, workers = time.perf_counter(), self.job.workers
        sent = workers.bytes_sent if workers else 0
        loss, met = self.job.train_step()
        if memory.current(self.job.device) > self.job.inference_memory:  # held in pieces that no step could use
            memory.give_back()
        assert self.job.optimizer.last_update is not None
        if self.writer is not None:
            self.writer.append(self.job.optimizer.last_update, loss)
        self.losses.append(loss)
        self.bytes_sent += workers.bytes_sent - sent if workers else 0
        self.seconds += time.perf_counter() - started
        self.met += met
        self.timed_steps += 1
        if bar.update():
            bar.set_postfix(self._figures(), refresh=False)

    def _figures(self) -> dict[str, str]:
        last = self.history.evaluations[-1]
        return {
            "loss": f"{statistics.fmean(self.losses[-50:]):.3f}",
            "accuracy": f"{100 * last['dev_accuracy']:.1f}%",
            f"{self.job.unit}/s": f"{self.met / self.seconds:,.0f}",
            "MiB": f"{memory.peak(self.job.device):.0f} (inference {self.job.inference_memory:.0f})",
        }

    def _evaluate_if_due(self, bar: Any) -> None:
        """Not twice: a run that stopped after an evaluation has it on the disk."""
        job, done = self.job, self.history.evaluations
        if job.step not in self.due or (done and done[-1]["step"] >= job.step):
            return
        record: dict[str, Any] = {"step": job.step, "timed_steps": self.timed_steps}
        record["seconds"], record["met"] = self.seconds, self.met
        record["ranks"], record["bytes_sent"] = job.ranks, self.bytes_sent
        record["memory_mib"] = memory.peak(job.device)
        record["inference_memory_mib"] = job.inference_memory
        recent = self.losses[done[-1]["step"] :] if done else []
        record["train_loss"] = statistics.fmean(recent) if recent else None
        for name in ("dev", "test") if job.step in (0, job.settings.steps) else ("dev",):
            record[f"{name}_loss"], record[f"{name}_accuracy"] = job.evaluate(name)
        job.forget_peak()
        done.append(record)
        self._save_history()
        if self.writer is not None:
            bar.clear()
            print(_line(record, job.settings.steps, job.unit), flush=True)

    def _make_features(self) -> None:
        """Once for a run: another computation might round otherwise, and the run would not go on bitwise."""
        path, job = self.folder / FEATURES, self.job
        if not job.wait_for_ranks("before the features", path.exists()):
            with self._bar(total=job.feature_tokens(), desc="features", unit="token") as bar:
                features = {name: job.make_features(split, bar) for name, split in job.splits.items()}
            if job.ranks > 1:
                features = self._join(features)
            if job.rank == 0:
                checkpoint.save(path, features)
            job.wait_for_ranks("joining the features")
        features = checkpoint.load(path)
        for name, split in job.splits.items():
            split.features = features[name].to(job.device)

    def _join(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """On the first rank, those of all ranks: each leaves its part in the folder, since messages are for numbers."""
        job, stem = self.job, FEATURES.removesuffix(".safetensors")
        parts = [self.folder / f"{stem}-{rank}.safetensors" for rank in range(job.ranks)]
        checkpoint.save(parts[job.rank], own)
        job.wait_for_ranks("making the features")
        if job.rank > 0:
            return own
        made = [checkpoint.load(part) for part in parts]
        for part in self.folder.glob(f"{stem}-*.safetensors"):  # also those of ranks that were stopped here before
            part.unlink()
        return {name: job.join_features(split, [each[name] for each in made]) for name, split in job.splits.items()}


def _line(record: dict[str, Any], steps: int, unit: str) -> str:
    parts = [f"step {record['step']:{len(str(steps))}d}/{steps}"]
    for name in ("dev", "test"):
        if f"{name}_loss" in record:
            parts.append(f"{name} loss {record[f'{name}_loss']:.4f} accuracy {100 * record[f'{name}_accuracy']:.2f} %")
    if record["seconds"]:
        parts.append(f"{record['seconds']:,.0f} s, {record['met'] / record['seconds']:,.0f} {unit}/s")
        parts.append(f"{record['memory_mib']:,.0f} MiB (inference {record['inference_memory_mib']:,.0f})")
        if record["bytes_sent"]:
            sent = record["bytes_sent"] / record["timed_steps"]
            parts.append(f"{record['ranks']} ranks, each sends {sent:,.0f} bytes a step")
    return "  ".join(parts)
