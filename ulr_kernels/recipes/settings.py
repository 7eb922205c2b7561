"""What a training run is: every setting that its result depends on."""

from __future__ import annotations

import dataclasses

from ulr_kernels.recipes import rules
from ulr_kernels.recipes.models import MODELS, PRETRAINED

METHODS = ("ulr", "bp")
OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULES = ("cosine", "constant")


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run. The fields from `sigma` on are `ulr.ULR`'s, which checks them (`max_rows` 0: its own choice);
    backpropagation ignores them.

    Attributes:
        data: what `data.load` takes.
        subset, test_subset: images to use, as many of each class; 0: all.
        model: a key of `models.MODELS` or `models.PRETRAINED`.
        blocks: of a pre-trained model, the last blocks to train, besides the head; others train whole.
        method: `ulr`, or `bp` (backpropagation) to compare.
        epochs: passes over the training images.
        batch: images per step; the last step of an epoch takes what is left.
        lr: learning rate at the start.
        schedule: `cosine` (half a cosine from `lr` to 0 over the run) or `constant`.
        optimizer: `adam`, `adamw`, or `sgd` with momentum 0.9.
        weight_decay: as that optimiser has it.
        label_smoothing: share of the target that is spread evenly over all classes, in [0, 1).
        seed: initial values, order of the images and noise all follow from it.
        device: `cpu` or `cuda`.
        threads: of torch on the CPU; 0 leaves torch's own choice, which is then written down.
    """

    data: str
    subset: int = 0
    test_subset: int = 0
    model: str = "mlp"
    blocks: int = 1
    method: str = "ulr"
    epochs: int = 20
    batch: int = 100
    lr: float = 1e-3
    schedule: str = "cosine"
    optimizer: str = "adam"
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    seed: int = 0
    device: str = "cpu"
    threads: int = 0
    sigma: float = 0.1
    copies: int | dict[str, int] = 64
    antithetic: bool = True
    injection: str = "layerwise"
    dist: str = "normal"
    sampler: str = "iid"
    baseline: str = "mean"
    max_rows: int = 0
    memory: str = "keep"
    allocation: str = "even"

    def __post_init__(self) -> None:
        rules.one_of(self, "model", (*MODELS, *PRETRAINED))
        rules.one_of(self, "method", METHODS)
        rules.one_of(self, "optimizer", OPTIMIZERS)
        rules.one_of(self, "schedule", SCHEDULES)
        for count in ("subset", "test_subset", "blocks", "max_rows"):
            rules.at_least(self, count, 0)
        rules.at_least(self, "epochs", 1)
        rules.at_least(self, "batch", 1)
        rules.at_least(self, "threads", 0)
        rules.positive(self, "lr")
        rules.not_negative(self, "weight_decay")
        rules.below_one(self, "label_smoothing")
        rules.key(self, "seed")

    @property
    def estimator(self) -> dict:
        """The keyword arguments of `ulr.ULR`, less its seed."""
        names = ("sigma", "copies", "antithetic", "injection", "dist", "sampler", "baseline", "memory", "allocation")
        return {name: getattr(self, name) for name in names} | {"max_rows": self.max_rows or None}
