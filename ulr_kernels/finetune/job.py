"""Fine-tuning a pre-trained model with forward passes only, so that a run can always go on."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ulr_kernels import optim
from ulr_kernels.finetune import data, models, ranks, weights
from ulr_kernels.finetune.settings import Settings
from ulr_kernels.finetune.trajectory import Header, Trajectory, weights_digest
from ulr_kernels.jobs import JobError, memory, rules
from ulr_kernels.jobs.schedule import learning_rate
from ulr_kernels.jobs.shuffle import permutation
from ulr_kernels.nn.names import parameter_names
from ulr_kernels.optim.optimizer import ForwardOptimizer
from ulr_kernels.optim.workers import Workers

_FEATURE_BATCH = 64  # sentences whose features are made together
_MOMENTUM, _BETAS = 0.9, (0.9, 0.99)
_loss_of_rows = functools.partial(F.cross_entropy, reduction="none")
_permutation = functools.lru_cache(maxsize=2)(permutation)


@dataclasses.dataclass
class Examples:
    """A split as the model takes it: token numbers, classes, and features where the backbone is not tuned."""

    ids: list[list[int]]
    labels: Tensor
    features: Tensor | None = None

    def by_length(self, size: int) -> list[list[int]]:
        """All rows in parts of so many: sentences of like length go together, so that little is padding."""
        order = sorted(range(len(self.ids)), key=lambda row: len(self.ids[row]))
        return [order[start : start + size] for start in range(0, len(order), size)]


class Job:
    """One run: its data, model and optimiser, and how far it has come. Making one writes nothing.

    Args:
        settings: what the run is.
        header: of the log of the run that goes on; the model and the data must be what they were.
        shared: by the ranks of the default process group.

    Attributes:
        splits: `train`, `dev` and `test`.
        workers: what the ranks evaluate in a step; None for a process by itself.
        rank, ranks: this process's number, and how many share the run.
        inference_memory: MiB, the peak of a forward pass of the batch without noise; 0 before `warm_up`.

    Raises:
        JobError: a setting does not fit, a device is absent, or model or data cannot be had or have changed.
    """

    def __init__(self, settings: Settings, header: Header | None = None, shared: bool = False) -> None:
        self.workers = _workers(settings) if shared else None
        self.rank, self.ranks = (self.workers.rank, self.workers.size) if self.workers else (0, 1)
        self.device = rules.device(settings.device)
        if self.workers and self.device.type == "cuda":
            ranks.use_own_device()
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
        sentences = len(self._rows(0))
        if sentences % settings.micro_batches:
            raise JobError(
                f"micro-batches must divide the {sentences} sentences of a step, got {settings.micro_batches}"
            )
        try:
            self.optimizer = _optimizer(settings, self.model, self.workers)
        except ValueError as error:
            raise JobError(str(error)) from error
        forwards = self.optimizer.forwards(settings.chunk)
        if self.workers and self.workers.probe_ranks > forwards:
            raise JobError(
                f"a step has too few parts for {self.ranks} ranks (micro-batches: {settings.micro_batches}, forwards "
                f"of each: {forwards}): start fewer, or give more --micro-batches or --probes, or a smaller --chunk"
            )
        self.header = Header(
            rule=self.optimizer.rule,
            draws=settings.probes,
            weights=weights_digest(named_parameters(self.model)),
            settings={
                "run": settings.for_log(),
                "classes": list(self.classes),
                "data": data_digest,
                "calibration": loaded.calibration,
            },
        )
        if header and header != self.header:
            same_data = header.settings["data"] == data_digest
            raise JobError(f"the {'model' if same_data else 'data'} must be as at the start of the run: it has changed")
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

    # --- ranks -------------------------------------------------------------------------------------------------------

    def agree(self, more: dict[str, object]) -> None:
        """Check that all ranks are the same run, at the same step with the same weights, and have the same `more`.

        Raises:
            WorkerError: they are not, or a rank did not answer.
        """
        if self.workers:
            run = {f"--{name.replace('_', '-')}": value for name, value in dataclasses.asdict(self.settings).items()}
            own = {"data": self.header.settings["data"], "model": self.header.weights, "step": self.step}
            self.workers.agree(run | own | {"tuned weights": weights_digest(self.parameters)} | more)

    def wait_for_ranks(self, when: str, value: bool = False) -> bool:
        """Wait until all ranks are here; returns the first one's `value`."""
        if self.workers is None:
            return value
        return bool(self.workers.gather(torch.tensor([value], dtype=torch.uint8), when)[0])

    def _own(self, parts: list[list[int]]) -> list[list[int]]:
        """Dealt to the ranks in turn."""
        return parts[self.rank :: self.ranks]

    # --- work --------------------------------------------------------------------------------------------------------

    def _examples(self, split: data.Split) -> Examples:
        return Examples([self.encoder.encode(text) for text in split.sentences], torch.tensor(split.labels))

    def feature_tokens(self) -> int:
        """Tokens that this rank reads in `make_features` of all splits."""
        splits = self.splits.values()
        return sum(len(s.ids[row]) for s in splits for rows in self._own(s.by_length(_FEATURE_BATCH)) for row in rows)

    @torch.inference_mode()
    def make_features(self, split: Examples, bar: Any) -> Tensor:
        """The pooled states `[sentences, H]` of a split. This rank makes its part; the rows of the others are 0."""
        head = self.model.head
        features = torch.zeros(len(split.ids), head.in_features, dtype=head.weight.dtype, device=self.device)
        for rows in self._own(split.by_length(_FEATURE_BATCH)):
            features[rows] = self.model.features(**self._tokens(split, rows))
            bar.update(sum(len(split.ids[row]) for row in rows))
        return features

    def join_features(self, split: Examples, parts: Sequence[Tensor]) -> Tensor:
        """Those of the whole split, of what each rank has made."""
        features = torch.empty_like(parts[0])
        for number, rows in enumerate(split.by_length(_FEATURE_BATCH)):
            features[rows] = parts[number % self.ranks][rows]
        return features

    def warm_up(self) -> None:
        """Classify the largest micro-batch of the run without noise, and note how much memory that takes.

        Where the features are made already, no step reads sentences; then it is as many of the longest as the features
        were made of at a time.
        """
        ids = self.splits["train"].ids
        if self.settings.tune == "head":
            largest = sorted(ids, key=len)[-_FEATURE_BATCH:]
        else:
            steps = range(self.step, self.settings.steps)
            batches = ([ids[row] for row in part] for step in steps for part in self._micro_batches(step))
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

    def _rows(self, step: int) -> list[int]:
        """Training sentences of a step; what is left of an epoch after its last whole batch rests."""
        count, size = len(self.splits["train"].ids), self.settings.batch
        epoch, place = divmod(step, max(count // size, 1))
        return _permutation(self.settings.seed, epoch, count)[place * size : (place + 1) * size].tolist()

    def _micro_batches(self, step: int) -> list[list[int]]:
        """The equal parts of those sentences, in their order."""
        rows, count = self._rows(step), self.settings.micro_batches
        size = len(rows) // count
        return [rows[number * size : (number + 1) * size] for number in range(count)]

    def _inputs(self, split: Examples, rows: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs and classes."""
        labels = split.labels[rows].to(self.device)
        if split.features is not None:
            return {"features": split.features[rows]}, labels
        return self._tokens(split, rows), labels

    def _tokens(self, split: Examples, rows: list[int]) -> dict[str, Tensor]:
        return self.encoder.batch([split.ids[row] for row in rows], self.device)

    @property
    def unit(self) -> str:
        """The unit of throughput: sentences if features are made beforehand, else tokens."""
        return "sentences" if self.settings.tune == "head" else "tokens"

    def train_step(self) -> tuple[float, int]:
        """One update of the weights: the loss that the optimiser reports, and the `unit`s that its probes read on all
        ranks.

        Raises:
            FloatingPointError: the loss is not finite. The step was taken without its estimate: go on from the log.
            WorkerError: a rank did not answer. The step was not taken.
        """
        split, step, parts = self.splits["train"], self.step, self._micro_batches(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings.lr, self.settings.schedule, self.step / self.settings.steps)
        for number in self.workers.batches(len(parts)) if self.workers else range(len(parts)):
            x, labels = self._inputs(split, parts[number])
            self.optimizer.accumulate_batch(x, labels, _loss_of_rows, self.settings.chunk)
        loss = self.optimizer.step().item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {self.step}: the loss is {loss}: try a smaller --lr or --sigma")
        rows = self._rows(step)
        read = len(rows) if self.settings.tune == "head" else sum(len(split.ids[row]) for row in rows)
        return loss, read * self.optimizer.evaluations

    @torch.inference_mode()
    def evaluate(self, name: str) -> tuple[float, float]:
        """Mean cross-entropy (nats) and accuracy (0 to 1) on a split, without noise."""
        split = self.splits[name]
        parts = split.by_length(self.settings.batch)
        mine = torch.zeros(-(-len(parts) // self.ranks), 2, dtype=torch.float64)  # of a part: loss, right answers
        for place, rows in enumerate(self._own(parts)):
            x, labels = self._inputs(split, rows)
            logits = self.model(**x)
            mine[place, 0] = F.cross_entropy(logits, labels, reduction="sum")
            mine[place, 1] = (logits.argmax(1) == labels).sum()
        found = self.workers.gather(mine, f"evaluating after step {self.step}") if self.workers else [mine]
        loss, right = torch.stack(found, 1).flatten(0, 1).cumsum(0)[-1].tolist()  # in the order of the parts
        return loss / len(split.ids), right / len(split.ids)


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
            raise JobError(f"start '{path}' is of another model: it has {name} {list(value.shape)}")
    for name, value in values.items():
        own[name].copy_(value)


def named_parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    """All parameters, by the names that noise and logs have for them."""
    names = parameter_names(model)
    return {names[id(parameter)]: parameter for parameter in model.parameters()}


def _workers(settings: Settings) -> Workers:
    """Ranks have micro-batches of their own as far as these can be dealt evenly, and share the probes beyond that."""
    size = dist.get_world_size()
    return Workers(probe_ranks=size // math.gcd(size, settings.micro_batches))


def _optimizer(settings: Settings, model: torch.nn.Module, workers: Workers | None) -> ForwardOptimizer:
    common: dict[str, Any] = {"weight_decay": settings.weight_decay, "dist": settings.dist, "seed": settings.seed}
    common["workers"] = workers
    if settings.optimizer == "adam":
        common["betas"] = _BETAS
    elif settings.optimizer == "momentum":
        common["momentum"] = _MOMENTUM
    lr, sigma, probes = settings.lr, settings.sigma, settings.probes
    if settings.method == "eggroll":
        return optim.EGGROLL(model, lr, sigma, population=probes, rank=settings.rank, **common)
    kind = {"mezo": optim.MeZO, "fzoo": optim.FZOO}[settings.method]
    return kind(model, lr, eps=sigma, probes=probes, **common)
