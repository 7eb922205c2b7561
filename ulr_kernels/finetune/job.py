"""Fine-tuning a pre-trained model with forward passes only, so that a run can always go on."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ulr_kernels import optim
from ulr_kernels.finetune import data, models, weights
from ulr_kernels.finetune.settings import Settings
from ulr_kernels.finetune.trajectory import Header, Trajectory, weights_digest
from ulr_kernels.nn.names import parameter_names
from ulr_kernels.optim.optimizer import ForwardOptimizer
from ulr_kernels.recipes import RecipeError, memory, rules
from ulr_kernels.recipes.order import permutation

_FEATURE_BATCH = 64  # sentences whose features are made together
_MOMENTUM, _BETAS = 0.9, (0.9, 0.99)


@dataclasses.dataclass
class Examples:
    """A split as the model takes it: token numbers, classes, and features where the backbone is not tuned."""

    ids: list[list[int]]
    labels: Tensor
    features: Tensor | None = None

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


class Job:
    """One run: its data, model and optimiser, and how far it has come. Making one writes nothing.

    Args:
        settings: what the run is.
        header: of the log of the run that goes on; the model and the data must be what they were.

    Attributes:
        splits: `train`, `dev` and `test`.
        inference_memory: MiB, the peak of a forward pass of the batch without noise; 0 before `warm_up`.

    Raises:
        RecipeError: a setting does not fit, a device is absent, or model or data cannot be had or have changed.
    """

    def __init__(self, settings: Settings, header: Header | None = None) -> None:
        self.device = rules.device(settings.device)
        torch.set_num_threads(settings.threads or torch.get_num_threads())
        self.settings = settings = dataclasses.replace(settings, threads=torch.get_num_threads())
        dataset = data.load(settings.data)
        self.classes = dataset.classes
        data_digest = dataset.digest()
        calibration = header.settings["calibration"] if header else None
        loaded = build(settings, len(self.classes), calibration)
        self.model, self.encoder = loaded.model, loaded.encoder
        parts = {
            "train": dataset.train.first(settings.train_examples),
            "dev": dataset.dev.first(settings.dev_examples),
            "test": dataset.test,
        }
        self.splits = {name: self._examples(part) for name, part in parts.items()}
        try:
            self.optimizer = _optimizer(settings, self.model)
        except ValueError as error:
            raise RecipeError(str(error)) from error
        self.header = Header(
            rule=self.optimizer.rule,
            draws=settings.probes // 2 if settings.method == "eggroll" else settings.probes,
            weights=weights_digest(named_parameters(self.model)),
            settings={
                "run": dataclasses.asdict(settings),
                "classes": list(self.classes),
                "data": data_digest,
                "calibration": loaded.calibration,
            },
        )
        if header and header != self.header:
            same_data = header.settings["data"] == data_digest
            raise RecipeError(
                f"the {'model' if same_data else 'data'} must be as at the start of the run: it has changed"
            )
        self.inference_memory = 0.0

    @property
    def step(self) -> int:
        """Steps done."""
        return self.optimizer.steps

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Those that are tuned, by the names that the log has."""
        tuned = {name for names in self.header.rule.names for name in names}
        return {name: value for name, value in named_parameters(self.model).items() if name in tuned}

    def replay(self, trajectory: Trajectory) -> None:
        """Go on from the last step of the run's log: bitwise the weights and the optimiser's state after it."""
        for update in trajectory.updates:
            self.optimizer.apply(update)

    # --- work --------------------------------------------------------------------------------------------------------

    def _examples(self, split: data.Split) -> Examples:
        return Examples([self.encoder.encode(text) for text in split.sentences], torch.tensor(split.labels))

    @torch.inference_mode()
    def make_features(self, split: Examples, bar: Any) -> Tensor:
        """The pooled states `[sentences, H]` of a split; longer sentences go together, so that little is padding."""
        order = sorted(range(len(split.ids)), key=lambda row: len(split.ids[row]))
        features: Tensor | None = None
        for start in range(0, len(order), _FEATURE_BATCH):
            rows = order[start : start + _FEATURE_BATCH]
            made = self.model.features(**self.encoder.batch([split.ids[row] for row in rows], self.device))
            if features is None:
                features = made.new_empty(len(order), made.shape[1])
            features[rows] = made
            bar.update(sum(len(split.ids[row]) for row in rows))
        assert features is not None
        return features

    def warm_up(self) -> None:
        """Classify the largest batch of the run without noise, and note how much memory that takes.

        Where the features are made already, no step reads sentences; then it is as many of the longest as the features
        were made of at a time.
        """
        ids = self.splits["train"].ids
        if self.settings.tune == "head":
            largest = sorted(ids, key=len)[-_FEATURE_BATCH:]
        else:
            batches = ([ids[row] for row in self._rows(step)] for step in range(self.step, self.settings.steps))
            largest = max(batches, key=lambda batch: len(batch) * max(map(len, batch)), default=ids[:1])
        x = self.encoder.batch(largest, self.device)
        memory.reset_peak(self.device)
        with torch.inference_mode():
            self.model(**x)
        self.inference_memory = memory.peak(self.device)
        self.forget_peak()

    def forget_peak(self) -> None:
        """Let what comes now be measured by itself: what came before leaves neither its peak nor its freed memory."""
        memory.give_back()
        memory.reset_peak(self.device)

    def batch(self, step: int) -> tuple[dict[str, Tensor], Tensor, int]:
        """Inputs, classes and number of tokens of a step."""
        return self._inputs(self.splits["train"], self._rows(step))

    def _rows(self, step: int) -> list[int]:
        """Training sentences of a step; what is left of an epoch after its last whole batch rests."""
        count, size = len(self.splits["train"].ids), self.settings.batch
        epoch, place = divmod(step, max(count // size, 1))
        return _permutation(self.settings.seed, epoch, count)[place * size : (place + 1) * size].tolist()

    def _inputs(self, split: Examples, rows: list[int]) -> tuple[dict[str, Tensor], Tensor, int]:
        labels = split.labels[rows].to(self.device)
        tokens = sum(len(split.ids[row]) for row in rows)
        if split.features is not None:
            return {"features": split.features[rows]}, labels, tokens
        return self.encoder.batch([split.ids[row] for row in rows], self.device), labels, tokens

    @property
    def unit(self) -> str:
        """What is counted for the speed: where the features are made already, a step meets no tokens."""
        return "sentences" if self.settings.tune == "head" else "tokens"

    def train_step(self) -> tuple[float, int]:
        """One update of the weights: the loss that the optimiser reports, and the `unit`s that its probes met.

        Raises:
            FloatingPointError: the loss is not finite. The step was taken without its estimate: go on from the log.
        """
        settings = self.settings
        x, labels, tokens = self.batch(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        loss = self.optimizer.step_batch(x, labels, _loss_of_rows, settings.chunk).item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {self.step}: the loss is {loss}: try a smaller --lr or --sigma")
        return loss, (len(labels) if self.settings.tune == "head" else tokens) * self.optimizer.evaluations

    def _learning_rate(self) -> float:
        settings = self.settings
        if settings.schedule == "constant":
            return settings.lr
        return settings.lr * 0.5 * (1 + math.cos(math.pi * self.step / settings.steps))

    @torch.inference_mode()
    def evaluate(self, name: str) -> tuple[float, float]:
        """Mean cross-entropy (nats) and accuracy (0 to 1) on a split, without noise."""
        split, size = self.splits[name], self.settings.batch
        order = sorted(range(len(split.ids)), key=lambda row: len(split.ids[row]))
        loss, right = 0.0, 0
        for start in range(0, len(order), size):
            x, labels, _ = self._inputs(split, order[start : start + size])
            logits = self.model(**x)
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            right += int((logits.argmax(1) == labels).sum())
        return loss / len(order), right / len(order)


def build(settings: Settings, classes: int, calibration: list[float] | None, base: str | None = None) -> models.Loaded:
    """The model as a run of these settings begins with it, from `base` where it is elsewhere now."""
    loaded = models.build(
        base or settings.model,
        classes,
        tune=settings.tune,
        template=settings.template,
        words=[word.strip() for word in settings.words.split(",")],
        max_tokens=settings.max_tokens,
        lora_rank=settings.lora_rank,
        dtype=settings.dtype,
        seed=settings.seed,
        calibration=calibration,
        device=rules.device(settings.device),
    )
    if settings.start:
        _begin_with(loaded.model, Path(settings.start))
    return loaded


@torch.no_grad()
def _begin_with(model: torch.nn.Module, path: Path) -> None:
    """Take over the weights that an earlier run has tuned."""
    values, own = weights.load(path), named_parameters(model)
    for name, value in values.items():
        if name not in own or own[name].shape != value.shape:
            raise RecipeError(f"start '{path}' is of another model: it has {name} {list(value.shape)}")
    for name, value in values.items():
        own[name].copy_(value)


def named_parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """All parameters, by the names that noise and logs have for them."""
    names = parameter_names(model)
    return {names[id(parameter)]: parameter for parameter in model.parameters()}


def _optimizer(settings: Settings, model: torch.nn.Module) -> ForwardOptimizer:
    common: dict[str, Any] = {"weight_decay": settings.weight_decay, "dist": settings.dist, "seed": settings.seed}
    if settings.optimizer == "adam":
        common["betas"] = _BETAS
    elif settings.optimizer == "momentum":
        common["momentum"] = _MOMENTUM
    lr, sigma, probes = settings.lr, settings.sigma, settings.probes
    if settings.method == "eggroll":
        return optim.EGGROLL(model, lr, sigma, population=probes, rank=settings.rank, **common)
    kind = {"mezo": optim.MeZO, "fzoo": optim.FZOO}[settings.method]
    return kind(model, lr, eps=sigma, probes=probes, **common)


def _loss_of_rows(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> Tensor:
    return permutation(seed, epoch, count)
