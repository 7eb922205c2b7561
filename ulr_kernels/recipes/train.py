"""Training a model on images, by likelihood-ratio gradients or by backpropagation, so that a run can always go on."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ulr_kernels import noise_contract
from ulr_kernels.check import check
from ulr_kernels.estimators import ULR
from ulr_kernels.jobs import JobError, checkpoint, memory, rules
from ulr_kernels.jobs.schedule import learning_rate
from ulr_kernels.jobs.shuffle import permutation
from ulr_kernels.recipes import data, models
from ulr_kernels.recipes.efficientnet import EfficientNetLite0
from ulr_kernels.recipes.settings import Settings

CHECKPOINT = "checkpoint.safetensors"
_COSINES = noise_contract.site_id("ulr_kernels.recipes.cosines")  # keeps their keys apart from those of the training
SAVE_SECONDS = 120.0  # within an epoch: what a run that is stopped loses at most
_COSINE_STEPS = 4  # estimates per measurement

Report = Callable[[str], None]


class Trainer:
    """One run: its data, model, optimiser and estimator, and how far it has come. Making one writes nothing.

    Attributes:
        settings: what the run is.
        history: one dict of figures per finished epoch.
        commands: what the user typed to start and to resume the run.
        step: optimiser steps done.
        partial: of the epoch under way, what its figures need: its `loss` summed over steps, `seconds` and `memory`.

    Raises:
        JobError: a setting is out of range, a device is absent, or the data cannot be had.
    """

    def __init__(self, settings: Settings) -> None:
        self.device = rules.device(settings.device)
        torch.set_num_threads(settings.threads or torch.get_num_threads())
        self.settings = dataclasses.replace(settings, threads=torch.get_num_threads())
        dataset = data.load(settings.data)
        self.data_digest = dataset.digest()
        self.train = dataset.train.first(settings.subset).to(self.device)
        self.test = dataset.test.first(settings.test_subset).to(self.device)
        shape, classes = dataset.shape, len(dataset.classes)
        self.model = models.build(settings.model, shape, classes, settings.seed, self.device, settings.blocks)
        pretrained = isinstance(self.model, EfficientNetLite0)
        self.mean, self.deviation = EfficientNetLite0.pixel_scale if pretrained else dataset.scale()
        self.optimizer = _optimizer(settings, self.model)
        # Cross-entropy in nats, one for each row. The estimator recognises this form.
        self.loss_per_row = functools.partial(
            F.cross_entropy, reduction="none", label_smoothing=settings.label_smoothing
        )
        self.memory_at_start = memory.current(self.device)
        self.estimator = self._estimator() if settings.method == "ulr" else None
        self.steps_per_epoch = math.ceil(len(self.train) / settings.batch)
        self.step = 0
        self.partial: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.commands: list[str] = []

    def _estimator(self) -> ULR:
        """The estimator; another one is tried on one image, so that it refuses a model before a run begins."""
        make = functools.partial(ULR, self.model, seed=self.settings.seed, **self.settings.estimator)
        self.model.eval()  # running statistics stay
        try:
            make().backward(self.inputs(self.train.images[:1]), self.train.labels[:1], self.loss_per_row)
        except (TypeError, ValueError) as error:
            raise JobError(str(error)) from error
        self.optimizer.zero_grad()
        return make()

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return len(self.history)

    # --- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on; orders of images follow from seed and epoch and need no place."""
        return {
            "settings": dataclasses.asdict(self.settings),
            "data": self.data_digest,
            "step": self.step,
            "partial": self.partial,
            "history": self.history,
            "commands": self.commands,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "estimator": self.estimator.state_dict() if self.estimator else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken, from a trainer of the same settings.

        Raises:
            JobError: the data has changed.
        """
        if state["data"] != self.data_digest:
            raise JobError("the data must be as at the start of the run: it has changed")
        self.step, self.history, self.commands = state["step"], state["history"], state["commands"]
        self.partial = state["partial"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.estimator:
            self.estimator.load_state_dict(state["estimator"])

    # --- work --------------------------------------------------------------------------------------------------------

    def inputs(self, images: Tensor) -> Tensor:
        """Pixels, uint8, as the model takes them: fp32 with the training set's mean 0 and variance 1, or as a
        pre-trained model was used to."""
        return (images.float() - self.mean) / self.deviation

    def run_epoch(self, bar: tqdm, save: Callable[[], None]) -> None:
        """Train on every image once, evaluate, and add the figures to the history; `save` now and then on the way.

        An epoch that was stopped goes on where it was last saved.

        Raises:
            FloatingPointError: a loss is not finite; neither this epoch nor its part since the last `save` is kept.
        """
        batches = permutation(self.settings.seed, self.epoch, len(self.train)).split(self.settings.batch)
        first = self.step - self.epoch * self.steps_per_epoch
        total = self.partial.get("loss", torch.zeros(())).to(self.device)
        self.model.train()
        memory.reset_peak(self.device)
        started = saved = time.perf_counter()
        before = self.partial
        bar.update(sum(map(len, batches[:first])))
        for done, rows in enumerate(batches[first:], first + 1):
            rows = rows.to(self.device)
            total += self._train_step(self.inputs(self.train.images[rows]), self.train.labels[rows])
            if bar.update(len(rows)):  # true only where the bar has been drawn, so that a GPU is seldom waited for
                bar.set_postfix(self._figures(total.item() / done), refresh=False)
            if time.perf_counter() - saved >= SAVE_SECONDS:
                self.partial = self._so_far(before, total, started)
                save()
                saved = time.perf_counter()
        so_far = self._so_far(before, total, started)
        record: dict[str, Any] = {"epoch": self.epoch + 1, "step": self.step, "seconds": so_far["seconds"]}
        record["noised_loss"] = so_far["loss"].item() / self.steps_per_epoch
        record["samples_per_second"] = len(self.train) / so_far["seconds"]
        record["peak_memory_mib"] = so_far["memory"]
        record["training_memory_mib"] = record["peak_memory_mib"] - self.memory_at_start
        for name, split in (("train", self.train), ("test", self.test)):
            record[f"{name}_loss"], record[f"{name}_accuracy"] = self.evaluate(split)
            self._check_finite(record[f"{name}_loss"])
        if self.estimator:
            record["cosines"] = self._cosines(self.estimator)
        self.history.append(record)
        self.partial = {}

    def _so_far(self, before: dict[str, Any], loss: Tensor, started: float) -> dict[str, Any]:
        """The figures of an epoch from its beginning until now; `before`: until it was last resumed."""
        loss = loss.cpu()  # waits for the device
        self._check_finite(loss.item())
        return {
            "loss": loss,
            "seconds": before.get("seconds", 0.0) + time.perf_counter() - started,
            "memory": max(before.get("memory", 0.0), memory.peak(self.device)),
        }

    def progress_line(self) -> str:
        """The epoch under way in a line."""
        steps, epochs = self.step - self.epoch * self.steps_per_epoch, self.settings.epochs
        images = min(len(self.train), steps * self.settings.batch)
        return (
            f"epoch {self.epoch + 1:{len(str(epochs))}d}/{epochs}  {images:,} of {len(self.train):,} images  "
            f"noised loss {self.partial['loss'].item() / steps:.4f}  {images / self.partial['seconds']:,.1f} samples/s"
        )

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            hint = "a smaller --lr" + " or another --sigma" * (self.estimator is not None)
            raise FloatingPointError(f"epoch {self.epoch + 1}: the loss is {loss}: try {hint}")

    def _train_step(self, x: Tensor, y: Tensor) -> Tensor:
        done = self.step / (self.settings.epochs * self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings.lr, self.settings.schedule, done)
        self.optimizer.zero_grad()
        if self.estimator:
            loss = self.estimator.backward(x, y, self.loss_per_row)
        else:
            loss = self.loss_per_row(self.model(x), y).mean()
            loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, split: data.Split) -> tuple[float, float]:
        """Mean cross-entropy (nats, no label smoothing) and accuracy (0 to 1) of the model without noise."""
        self.model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        batch = self.settings.batch  # no more memory than training needs
        for images, labels in zip(split.images.split(batch), split.labels.split(batch), strict=True):
            outputs = self.model(self.inputs(images))
            loss += F.cross_entropy(outputs, labels, reduction="sum").double()
            right += (outputs.argmax(1) == labels).sum()
        return loss.item() / len(split), right.item() / len(split)

    def _cosines(self, estimator: ULR) -> dict[str, dict[str, float | None]]:
        """By layer: how far estimates point along the true gradient, and what the law expects.

        Measured on test images spread evenly over the set, with noise of their own.
        """
        count = min(self.settings.batch, len(self.test))
        rows = torch.arange(count, device=self.device) * len(self.test) // count
        x, y = self.inputs(self.test.images[rows]), self.test.labels[rows]
        seed = noise_contract.fold_in(noise_contract.fold_in(self.settings.seed, _COSINES), self.epoch)
        found = check(
            self.model,
            x,
            y,
            self.loss_per_row,
            steps=_COSINE_STEPS,
            state=estimator.state_dict(),
            seed=seed,
            **self.settings.estimator,
        ).layers
        return {
            layer.layer: {
                "cosine": layer.cosine,
                "cosine_error": layer.cosine_error,
                "law": None if math.isnan(layer.predicted_cosine) else layer.predicted_cosine,  # JSON has no NaN
            }
            for layer in found
        }

    def _figures(self, loss: float) -> dict[str, str]:
        figures = {"loss": f"{loss:.3f}"}
        if self.history:
            figures["accuracy"] = f"{100 * self.history[-1]['test_accuracy']:.1f}%"
        figures["memory"] = f"{memory.peak(self.device):.0f}MiB"
        return figures


def fit(trainer: Trainer, out: Path, say: Report = print) -> None:
    """Run the epochs that are left, with a checkpoint at once, after each epoch, and every two minutes within one.

    Args:
        trainer: new, or from `restore`.
        out: a folder that exists; the checkpoint goes there.
        say: takes one line per epoch, and where no terminal shows a bar, one per checkpoint within an epoch.

    Raises:
        OSError: the checkpoint cannot be written; the last one is intact.
        FloatingPointError: a loss is not finite; so is it then.
    """
    epochs = trainer.settings.epochs

    def save() -> None:
        checkpoint.save(out / CHECKPOINT, trainer.state_dict())

    def save_on_the_way(bar: tqdm) -> None:
        save()
        if bar.disable:
            say(trainer.progress_line())

    save()  # a run that is stopped before its first step can go on too
    while trainer.epoch < epochs:
        title = f"epoch {trainer.epoch + 1}/{epochs}"
        with tqdm(total=len(trainer.train), desc=title, unit=" samples", leave=False, disable=None) as bar:
            trainer.run_epoch(bar, functools.partial(save_on_the_way, bar))
        save()
        last = trainer.history[-1]
        say(
            f"epoch {last['epoch']:{len(str(epochs))}d}/{epochs}  loss {last['train_loss']:.4f}  "
            f"accuracy {100 * last['train_accuracy']:6.2f} % train {100 * last['test_accuracy']:6.2f} % test  "
            f"{last['samples_per_second']:9,.0f} samples/s  {last['peak_memory_mib']:,.0f} MiB"
        )


def restore(folder: Path) -> Trainer:
    """The trainer as it was when the folder's checkpoint was written.

    Raises:
        JobError: no checkpoint, or a damaged one, or its data has changed or cannot be had any more.
    """
    path = folder / CHECKPOINT
    state = checkpoint.load(path)
    try:
        trainer = Trainer(Settings(**state["settings"]))
        trainer.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise JobError(f"{path}: does not fit this version: {error}") from error
    return trainer


def _optimizer(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=0.9, **common)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(model.parameters(), **common)
