"""`ulr train`: a model on images, from its initial values."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ulr_kernels.baselines import BASELINES
from ulr_kernels.cli.parser import SettingsOptions, add_run_folder, given_settings, kept_in
from ulr_kernels.estimators.allocation import ALLOCATIONS
from ulr_kernels.estimators.settings import MEMORIES
from ulr_kernels.noise_contract import DISTRIBUTIONS, SAMPLERS
from ulr_kernels.ops.noisy_mlp_step import INJECTIONS
from ulr_kernels.recipes import RecipeError
from ulr_kernels.recipes.models import MODELS, PRETRAINED
from ulr_kernels.recipes.settings import METHODS, OPTIMIZERS, SCHEDULES, Settings

HELP = "train a model on images, with checkpoints and a report"


def add_options(parser: argparse.ArgumentParser) -> None:
    options = SettingsOptions(parser, Settings)
    _, add = options.group("what to train")
    add("data", "digits, mnist5k, fashion, or a folder: train/CLASS/*.png, idx or CIFAR-10 files", metavar="DATA")
    add("subset", "training images to use, as many of each class; 0: all")
    add("test_subset", "test images to use, likewise")
    add("model", "the model; efficientnet-lite0 is pre-trained", choices=[*MODELS, *PRETRAINED])
    add("blocks", "of a pre-trained model, the last blocks to train, besides the head")
    add("method", "likelihood ratio, or backpropagation to compare", choices=METHODS)
    _, add = options.group("how")
    add("epochs", "passes over the training images")
    add("batch", "images per step")
    add("optimizer", "the optimiser", choices=OPTIMIZERS)
    add("lr", "learning rate at the start")
    add("schedule", "of the learning rate: half a cosine down to 0, or constant", choices=SCHEDULES)
    add("weight_decay", "as the optimiser has it")
    add("label_smoothing", "share of the target that is spread evenly over all classes")
    add("seed", "of initial values, order of images, and noise")
    _, add = options.group("likelihood ratio")
    add("sigma", "scale of the noise")
    add("copies", "noisy copies of each image: a number, or LAYER=N,... by layer", type=_copies)
    add("antithetic", "copies in pairs of opposite noise")
    add("injection", "noise in one layer at a time, or in all at once", choices=INJECTIONS)
    add("dist", "distribution of the noise", choices=DISTRIBUTIONS)
    add("sampler", "independent or quasi-random noise", choices=SAMPLERS)
    add("baseline", "what is subtracted from each loss", choices=BASELINES)
    add(
        "max_rows",
        "rows, copies times images, that the model is given at a time; 0: all, or on a CPU what its caches hold",
    )
    add("memory", "keep what layers read, or run each forward again for its gradients", choices=MEMORIES)
    add("allocation", "as many copies of each image, or more of those whose loss moves further", choices=ALLOCATIONS)
    where, add = options.group("where")
    add("device", "the device", choices=("cpu", "cuda"))
    add("threads", "CPU threads; 0 leaves the choice to torch")
    add_run_folder(where, "runs/DATA-MODEL-METHOD")


def _copies(text: str) -> int | dict[str, int]:
    """`64`, or `1=128,3=64` by layer."""
    try:
        if "=" not in text:
            return int(text)
        return {name: int(count) for name, count in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or LAYER=N,LAYER=N, got '{text}'") from None


def run(args: argparse.Namespace, argv: list[str]) -> None:
    from ulr_kernels.recipes import jobs

    given = given_settings(args, Settings)
    command = shlex.join(["ulr", *argv])
    if "resume" in args:
        jobs.resume(args.resume, command)
        return
    if "data" not in given:
        raise RecipeError("give --data (digits, mnist5k, fashion, or a folder), or --resume DIR")
    settings = Settings(**given)
    if "out" not in args:
        args.out = Path("runs") / f"{Path(settings.data).resolve().name}-{settings.model}-{settings.method}"
    jobs.train(settings, args.out, command, overwrite="overwrite" in args)


def what_is_kept(args: argparse.Namespace) -> tuple[str, str]:
    from ulr_kernels.recipes.train import CHECKPOINT

    return kept_in(args, CHECKPOINT, "finished epochs", "train")
