"""`ulr train`: a model on images, from its initial values."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ulr_kernels.cli.parser import add_run_folder, add_settings, given_settings, kept_in
from ulr_kernels.jobs import JobError
from ulr_kernels.recipes.settings import Settings

HELP = "train a model on images, with checkpoints and a report"


def add_options(parser: argparse.ArgumentParser) -> None:
    add_run_folder(add_settings(parser, Settings), "runs/DATA-MODEL-METHOD")


def run(args: argparse.Namespace, argv: list[str]) -> None:
    from ulr_kernels.recipes import runs

    given = given_settings(args, Settings)
    command = shlex.join(["ulr", *argv])
    if "resume" in args:
        runs.resume(args.resume, command)
        return
    if "data" not in given:
        raise JobError("give --data (digits, mnist5k, fashion, or a folder), or --resume DIR")
    settings = Settings(**given)
    if "out" not in args:
        args.out = Path("runs") / f"{Path(settings.data).resolve().name}-{settings.model}-{settings.method}"
    runs.train(settings, args.out, command, overwrite="overwrite" in args)


def what_is_kept(args: argparse.Namespace) -> tuple[str, str]:
    from ulr_kernels.recipes.train import CHECKPOINT

    return kept_in(args, CHECKPOINT, "finished epochs", "train")
