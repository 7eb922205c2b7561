"""What a fine-tuning run is: every setting that its result depends on, and values that work for each way of tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ulr_kernels import noise_contract
from ulr_kernels.finetune.models import DTYPES, TUNE
from ulr_kernels.recipes import RecipeError, rules

METHODS = ("mezo", "eggroll", "fzoo")
OPTIMIZERS = ("sgd", "momentum", "adam")
SCHEDULES = ("constant", "cosine")

# By what is tuned; docs/measured.md has the runs that led here.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "head": {"steps": 1000, "batch": 256, "probes": 64, "chunk": 16, "optimizer": "adam", "lr": 3e-3, "sigma": 1e-2},
    "lora": {"steps": 2000, "batch": 32, "probes": 4, "chunk": 1, "optimizer": "adam", "lr": 1e-3, "sigma": 1e-2},
    "all": {"steps": 4000, "batch": 32, "probes": 1, "chunk": 1, "optimizer": "sgd", "lr": 1e-5, "sigma": 1e-3},
}

# Settings that came later, with what runs did before. A log leaves them out there, so that those of before are read.
_ADDED: dict[str, Any] = {"micro_batches": 1}


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run. Where 0 or `auto` is the default, that stands for a value that works for `tune`.

    Attributes:
        data: what `data.load` takes.
        model: what `models.build` takes.
        start: tuned weights of an earlier run on this model, to begin with: a `tuned.safetensors`; empty for none.
        method: `mezo`, `eggroll` or `fzoo`, of `ulr_kernels.optim`.
        tune: `all`, `lora` or `head`. For `head` the features are made once, before the first step.
        steps: updates of the weights.
        batch: sentences in a step.
        micro_batches: equal parts of a step's sentences, evaluated one after the other, or by ranks of their own.
        probes: directions of a step (mezo, fzoo), or members of the population (eggroll).
        chunk: probes that one forward evaluates together; 1 keeps to the memory of inference.
        lr: learning rate at the start.
        schedule: `cosine` (half a cosine from `lr` to 0 over the run) or `constant`.
        optimizer: what is made of the estimates: `sgd`, `momentum` (0.9) or `adam`.
        weight_decay: decoupled.
        sigma: scale of the probes' noise.
        dist: of the noise.
        rank: of eggroll's noise.
        lora_rank: of the adapters.
        template: the prompt around a sentence, `{}` in its place; empty leaves the choice to the model.
        words: of a causal model, the words that stand for the classes, in their order, with commas between.
        max_tokens: of a sentence in its prompt.
        dtype: of the weights.
        train_examples: training sentences to use, the first of each class alike; 0 for all.
        dev_examples: likewise of the development sentences.
        evaluations: looks at the development sentences, the last one after the last step.
        seed: initial values, order of the sentences and noise all follow from it.
        device: `cpu` or `cuda`.
        threads: of torch on the CPU; 0 leaves torch's own choice, which is then written down.
    """

    data: str
    model: str = "minilm"
    start: str = ""
    method: str = "mezo"
    tune: str = "head"
    steps: int = 0
    batch: int = 0
    micro_batches: int = 1
    probes: int = 0
    chunk: int = 0
    lr: float = 0.0
    schedule: str = "cosine"
    optimizer: str = "auto"
    weight_decay: float = 0.0
    sigma: float = 0.0
    dist: str = "auto"
    rank: int = 1
    lora_rank: int = 4
    template: str = ""
    words: str = "negative,positive"
    max_tokens: int = 128
    dtype: str = "fp32"
    train_examples: int = 0
    dev_examples: int = 0
    evaluations: int = 10
    seed: int = 0
    device: str = "cpu"
    threads: int = 0

    @classmethod
    def of_log(cls, path: Path, values: Mapping[str, Any]) -> Settings:
        """Those that the log of a run holds.

        Raises:
            RecipeError: another version wrote them, with a setting more or less: the run would be another one here.
        """
        values = {**_ADDED, **values}
        names = {field.name for field in dataclasses.fields(cls)}
        for name in sorted(values.keys() ^ names):
            has = "has the setting" if name in values else "lacks the setting"
            raise RecipeError(f"{path}: of another version: it {has} '{name}'")
        return cls(**values)

    def for_log(self) -> dict[str, Any]:
        """What `of_log` reads."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in _ADDED or value != _ADDED[name]}

    def __post_init__(self) -> None:
        rules.one_of(self, "method", METHODS)
        rules.one_of(self, "tune", TUNE)
        dist = {"dist": "rademacher" if self.method == "fzoo" else "normal"}
        for name, value in (_DEFAULTS[self.tune] | dist).items():
            if getattr(self, name) in (0, "auto"):
                object.__setattr__(self, name, value)
        rules.one_of(self, "schedule", SCHEDULES)
        rules.one_of(self, "optimizer", OPTIMIZERS)
        rules.one_of(self, "dist", noise_contract.DISTRIBUTIONS)
        rules.one_of(self, "dtype", tuple(DTYPES))
        for option in ("steps", "batch", "micro_batches", "probes", "chunk"):
            rules.at_least(self, option, 1)
        for option in ("rank", "lora_rank", "max_tokens", "evaluations"):
            rules.at_least(self, option, 1)
        for option in ("train_examples", "dev_examples", "threads"):
            rules.at_least(self, option, 0)
        for option in ("lr", "sigma"):
            rules.positive(self, option)
        rules.not_negative(self, "weight_decay")
        rules.key(self, "seed")
        if self.method == "eggroll" and self.probes % 2:
            raise RecipeError(f"probes must be even with eggroll, whose members come in pairs, got {self.probes}")
        if self.method == "fzoo" and self.probes == 1:
            raise RecipeError("probes must be at least 2 with fzoo, which divides by their deviation, got 1")
