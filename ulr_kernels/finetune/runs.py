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
from ulr_kernels.recipes import RecipeError

try:
    import matplotlib  # noqa: F401  (needed at the very end: better refused at the start)
    from tqdm import tqdm

    from ulr_kernels.finetune import report, trajectory
    from ulr_kernels.finetune.job import Job
    from ulr_kernels.recipes import checkpoint, folders, memory
except ImportError as error:
    raise RecipeError(f"fine-tuning needs the package {error.name}: pip install '.[finetune]'") from error

LOG, HISTORY, FEATURES = "trajectory.ulr", "history.json", "features.safetensors"


@dataclasses.dataclass
class History:
    """What the log does not hold: what was typed, and the figures of each evaluation so far."""

    commands: list[str]
    evaluations: list[dict[str, Any]]

    def save(self, folder: Path) -> None:
        checkpoint.write_atomically(folder / HISTORY, json.dumps(dataclasses.asdict(self), indent=2).encode())

    @classmethod
    def load(cls, folder: Path, steps: int) -> History:
        """That of a run which has done so many steps; before the first one there may be none."""
        try:
            return cls(**json.loads((folder / HISTORY).read_text()))
        except FileNotFoundError:
            if steps:
                raise RecipeError(
                    f"{folder / HISTORY}: no such file, which the run wrote before its first step"
                ) from None
            return cls([], [])
        except (OSError, ValueError, TypeError) as error:
            raise RecipeError(f"{folder / HISTORY}: cannot be read: {error}") from error


def start(settings: Settings, out: Path, command: str, overwrite: bool = False) -> None:
    """Fine-tune a model from its pre-trained weights and write the report.

    Args:
        settings: what the run is.
        out: its folder, made if need be.
        command: what the user typed, for the report.
        overwrite: replace a run that is there.

    Raises:
        RecipeError: the run cannot be made; nothing has been written.
        OSError, FloatingPointError: a file could not be written, or the loss is not finite; finished steps are in
            the log.
    """
    if settings.start and Path(settings.start).resolve().parent == out.resolve():
        raise RecipeError(
            f"start '{settings.start}' must be in another folder than this run, which needs it to the end"
        )
    job = Job(settings)
    with folders.prepare(out, LOG, (HISTORY, FEATURES, *report.FILES), overwrite):
        with contextlib.closing(trajectory.Writer.create(out / LOG, job.header)) as writer:
            _Run(job, out, writer, History([command], []), []).finish()


def resume(folder: Path, command: str) -> None:
    """Continue the run in a folder, bitwise as if it had never stopped, and write its report. Raises as `start`."""
    with folders.held(folder):
        log = trajectory.read(folder / LOG, torn=True)
        job = Job(Settings.of_log(folder / LOG, log.header.settings["run"]), log.header)
        job.replay(log)
        history = History.load(folder, job.step)
        history.commands.append(command)
        with contextlib.closing(trajectory.Writer(folder / LOG, log)) as writer:
            _Run(job, folder, writer, history, list(log.losses)).finish()


class _Run:
    """A job with its files."""

    def __init__(
        self, job: Job, folder: Path, writer: trajectory.Writer, history: History, losses: list[float]
    ) -> None:
        self.job, self.folder, self.writer, self.history, self.losses = job, folder, writer, history, losses
        steps, count = job.settings.steps, min(job.settings.evaluations, job.settings.steps)
        self.due = {steps * number // count for number in range(count + 1)}
        # A process that is stopped takes with it how long its steps since the last evaluation took.
        last = history.evaluations[-1] if history.evaluations else {"timed_steps": 0, "seconds": 0.0, "met": 0}
        self.timed_steps, self.seconds, self.met = last["timed_steps"], last["seconds"], last["met"]

    def finish(self) -> None:
        job = self.job
        self.history.save(self.folder)  # what was typed, should the run be stopped before its next evaluation
        if job.settings.tune == "head":
            self._make_features()
        memory.keep_freed()
        job.warm_up()
        title = f"{job.settings.model} {job.settings.tune}"
        with tqdm(total=job.settings.steps, initial=job.step, desc=title, unit="step", disable=None) as bar:
            self._evaluate_if_due(bar)
            while job.step < job.settings.steps:
                self._step(bar)
                self._evaluate_if_due(bar)
        for path in report.write(self.folder, job, self.history.commands, self.history.evaluations, self.losses):
            print(path)

    def _step(self, bar: Any) -> None:
        started = time.perf_counter()
        loss, met = self.job.train_step()
        if memory.current(self.job.device) > self.job.inference_memory:  # held in pieces that no step could use
            memory.give_back()
        assert self.job.optimizer.last_update is not None
        self.writer.append(self.job.optimizer.last_update, loss)
        self.losses.append(loss)
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
        record["memory_mib"] = memory.peak(job.device)
        record["inference_memory_mib"] = job.inference_memory
        recent = self.losses[done[-1]["step"] :] if done else []
        record["train_loss"] = statistics.fmean(recent) if recent else None
        for name in ("dev", "test") if job.step in (0, job.settings.steps) else ("dev",):
            record[f"{name}_loss"], record[f"{name}_accuracy"] = job.evaluate(name)
        job.forget_peak()
        done.append(record)
        self.history.save(self.folder)
        bar.clear()
        print(_line(record, job.settings.steps, job.unit), flush=True)

    def _make_features(self) -> None:
        """Once for a run: another computation might round otherwise, and the run would not go on bitwise."""
        path, splits = self.folder / FEATURES, self.job.splits
        if path.exists():
            features = checkpoint.load(path)
        else:
            with tqdm(
                total=sum(split.tokens for split in splits.values()), desc="features", unit="token", disable=None
            ) as bar:
                features = {name: self.job.make_features(split, bar) for name, split in splits.items()}
            checkpoint.save(path, features)
        for name, split in splits.items():
            split.features = features[name].to(self.job.device)


def _line(record: dict[str, Any], steps: int, unit: str) -> str:
    parts = [f"step {record['step']:{len(str(steps))}d}/{steps}"]
    for name in ("dev", "test"):
        if f"{name}_loss" in record:
            parts.append(f"{name} loss {record[f'{name}_loss']:.4f} accuracy {100 * record[f'{name}_accuracy']:.2f} %")
    if record["seconds"]:
        parts.append(f"{record['seconds']:,.0f} s, {record['met'] / record['seconds']:,.0f} {unit}/s")
        parts.append(f"{record['memory_mib']:,.0f} MiB (inference {record['inference_memory_mib']:,.0f})")
    return "  ".join(parts)
