"""The settings of `ulr train`: all that a run's result depends on."""

from __future__ import annotations

import argparse
import dataclasses

from ulr_kernels.baselines import BASELINES
from ulr_kernels.estimators.allocation import ALLOCATIONS
from ulr_kernels.estimators.settings import MEMORIES, SAMPLERS, SUPPORTS
from ulr_kernels.jobs import rules
from ulr_kernels.jobs.schedule import SCHEDULES
from ulr_kernels.jobs.settings import check, setting
from ulr_kernels.noise_contract import DISTRIBUTIONS
from ulr_kernels.ops.noisy_mlp_step import INJECTIONS
from ulr_kernels.recipes.models import MODELS, PRETRAINED

METHODS = ("ulr", "bp")
OPTIMIZERS = ("adam", "adamw", "sgd")


def _copies(text: str) -> int | dict[str, int]:
    """`64`, or `1=128,3=64` by layer."""
    try:
        if "=" not in text:
            return int(text)
        return {name: int(count) for name, count in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or LAYER=N,LAYER=N, got '{text}'") from None


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run. The group "likelihood ratio" holds arguments of `ulr.ULR`, which checks them; backpropagation ignores
    them."""

    data: str = setting(
        "digits, mnist5k, fashion, or a folder: train/CLASS/*.png, idx or CIFAR-10 files",
        metavar="DATA",
        group="what to train",
    )
    subset: int = setting("training images to use, as many of each class; 0: all", 0, rule=rules.at_least(0))
    test_subset: int = setting("test images to use, likewise", 0, rule=rules.at_least(0))
    model: str = setting("the model; efficientnet-lite0 is pre-trained", "mlp", choices=(*MODELS, *PRETRAINED))
    blocks: int = setting(
        "of a pre-trained model, the last blocks to train, besides the head", 1, rule=rules.at_least(0)
    )
    method: str = setting("likelihood ratio, or backpropagation to compare", "ulr", choices=METHODS)
    epochs: int = setting("passes over the training images", 20, rule=rules.at_least(1), group="how")
    batch: int = setting("images per step; an epoch's last step takes those left", 100, rule=rules.at_least(1))
    optimizer: str = setting("the optimiser; sgd has momentum 0.9", "adam", choices=OPTIMIZERS)
    lr: float = setting("learning rate at the start", 1e-3, rule=rules.positive)
    schedule: str = setting("of the learning rate: half a cosine to 0, or constant", "cosine", choices=SCHEDULES)
    weight_decay: float = setting("as the optimiser has it", 0.0, rule=rules.not_negative)
    label_smoothing: float = setting(
        "share of the target that is spread evenly over all classes", 0.0, rule=rules.below_one
    )
    seed: int = setting("of initial values, order of images, and noise", 0, rule=rules.seed)
    sigma: float = setting("scale of the noise", 0.1, group="likelihood ratio")
    copies: int | dict[str, int] = setting(
        "noisy copies of each image: a number, or LAYER=N,... by layer", 64, type=_copies
    )
    antithetic: bool = setting("copies in pairs of opposite noise", False)
    injection: str = setting("noise in one layer at a time, or in all at once", "layerwise", choices=INJECTIONS)
    dist: str = setting("distribution of the noise", "normal", choices=DISTRIBUTIONS)
    sampler: str = setting("independent or quasi-random noise", "iid", choices=SAMPLERS)
    baseline: str = setting("number that is subtracted from each loss", "mean", choices=BASELINES)
    max_rows: int = setting(
        "rows, copies times images, that the model is given at a time; 0: all, or on a CPU as many as its caches hold",
        0,
        rule=rules.at_least(0),
    )
    memory: str = setting("keep what layers read, or run each forward again", "keep", choices=MEMORIES)
    allocation: str = setting(
        "as many copies of each image, or more of those whose loss moves further", "even", choices=ALLOCATIONS
    )
    guide: str = setting("a learnt guess of each output's gradient", "none", choices=("none", "feedback"))
    support: str = setting("estimate all of an output's gradient, or where it is not 0", "all", choices=SUPPORTS)
    preset: str = setting(
        "best: orthogonal signs, a clean forward, guide and support, in the place of defaults",
        "none",
        choices=("none", "best"),
    )
    device: str = setting("the device", "cpu", choices=("cpu", "cuda"), group="where")
    threads: int = setting("CPU threads; 0 leaves the choice to torch", 0, rule=rules.at_least(0))

    def __post_init__(self) -> None:
        check(self)

    @property
    def estimator(self) -> dict:
        """The keyword arguments of `ulr.ULR`, less its seed."""
        names = ("sigma", "copies", "antithetic", "injection", "dist", "sampler", "baseline", "memory", "allocation")
        none = {name: None if getattr(self, name) == "none" else getattr(self, name) for name in ("guide", "preset")}
        return {name: getattr(self, name) for name in (*names, "support")} | none | {"max_rows": self.max_rows or None}
