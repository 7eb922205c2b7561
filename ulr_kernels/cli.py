"""The command line: `ulr train | demo | bench | doctor`, also `python -m ulr_kernels`.

Exit codes: 0 done, 1 failed on the way, 2 what was asked for cannot be done (nothing written), 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ulr_kernels.recipes import RecipeError
from ulr_kernels.recipes.models import MODELS
from ulr_kernels.recipes.settings import METHODS, OPTIMIZERS, SCHEDULES, Settings

_SETTINGS = {field.name: field.default for field in dataclasses.fields(Settings)}


class _Parser(argparse.ArgumentParser):
    """Options that are not given leave no trace, so that `Settings` alone knows the defaults; errors are one line."""

    def __init__(self, **options) -> None:
        super().__init__(argument_default=argparse.SUPPRESS, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own; the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    args = parser.parse_args(argv)
    prog = f"{parser.prog} {args.command}"
    try:
        args.run(args, argv)
    except RecipeError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{prog}: error: {error}{_what_is_kept(args)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted{_what_is_kept(args)}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ulr", description="Training without a backward pass.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_train(commands.add_parser("train", help="train a model on images, with checkpoints and a report"))
    demo = commands.add_parser("demo", help="train one model by likelihood ratio and by backpropagation, and compare")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default %(default)s")
    demo.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each method; the table shows medians")
    demo.set_defaults(run=_demo)
    bench = commands.add_parser("bench", help="measure beside rivals: a table of ratios, and a picture")
    bench.add_argument("--quick", action="store_true", help="a look, not a result: shorter, and no memory")
    bench.add_argument("--only", default="", metavar="TEXT", help="rows whose name has it; pytest's -k")
    bench.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="default %(default)s")
    bench.set_defaults(run=_bench)
    doctor = commands.add_parser("doctor", help="say which back end runs each operation, and why others are absent")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    def add(group: argparse._ArgumentGroup, name: str, text: str, **options) -> None:
        default = _SETTINGS[name]
        shown = "" if default is dataclasses.MISSING else f" (default {default})"
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif "type" not in options and "choices" not in options and isinstance(default, int | float):
            options["type"] = type(default)
        if "type" in options:
            options.setdefault("metavar", "X" if options["type"] is float else "N")
        group.add_argument(f"--{name.replace('_', '-')}", help=text + shown, **options)

    what = parser.add_argument_group("what to train")
    add(what, "data", "digits, mnist5k, fashion, or a folder: train/CLASS/*.png or idx files", metavar="DATA")
    add(what, "model", "the model", choices=list(MODELS))
    add(what, "method", "likelihood ratio, or backpropagation to compare", choices=METHODS)
    how = parser.add_argument_group("how")
    add(how, "epochs", "passes over the training images")
    add(how, "batch", "images per step")
    add(how, "optimizer", "the optimiser", choices=OPTIMIZERS)
    add(how, "lr", "learning rate at the start")
    add(how, "schedule", "of the learning rate: half a cosine down to 0, or constant", choices=SCHEDULES)
    add(how, "weight_decay", "as the optimiser has it")
    add(how, "label_smoothing", "share of the target that is spread evenly over all classes")
    add(how, "seed", "of initial values, order of images, and noise")
    noise = parser.add_argument_group("likelihood ratio")
    add(noise, "sigma", "scale of the noise")
    add(noise, "copies", "noisy copies of each image: a number, or LAYER=N,... by layer", type=_copies)
    add(noise, "antithetic", "copies in pairs of opposite noise")
    add(noise, "injection", "noise in one layer at a time, or in all at once", choices=("layerwise", "joint"))
    add(noise, "dist", "distribution of the noise", choices=("normal", "laplace", "rademacher"))
    add(noise, "sampler", "independent or quasi-random noise", choices=("iid", "sobol"))
    add(noise, "baseline", "what is subtracted from each loss", choices=("none", "clean", "mean"))
    where = parser.add_argument_group("where")
    add(where, "device", "the device", choices=("cpu", "cuda"))
    add(where, "threads", "CPU threads; 0 leaves the choice to torch")
    where.add_argument("--out", type=Path, metavar="DIR", help="the report's folder (default runs/DATA-MODEL-METHOD)")
    where.add_argument("--overwrite", action="store_true", help="replace the run that is in the folder")
    where.add_argument("--resume", type=Path, metavar="DIR", help="continue the run in this folder, with its settings")
    parser.set_defaults(run=_train)


def _copies(text: str) -> int | dict[str, int]:
    """`64`, or `1=128,3=64` by layer."""
    try:
        if "=" not in text:
            return int(text)
        return {name: int(count) for name, count in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or LAYER=N,LAYER=N, got '{text}'") from None


def _train(args: argparse.Namespace, argv: list[str]) -> None:
    from ulr_kernels.recipes import jobs

    given = {name: getattr(args, name) for name in _SETTINGS if name in args}
    if "resume" in args:
        extra = [name for name in (*given, "out", "overwrite") if name in args]
        if extra:
            raise RecipeError(f"--resume continues with the run's own settings: drop --{extra[0].replace('_', '-')}")
        jobs.resume(args.resume, shlex.join(["ulr", *argv]))
        return
    if "data" not in given:
        raise RecipeError("give --data (digits, mnist5k, fashion, or a folder), or --resume DIR")
    settings = Settings(**given)
    if "out" not in args:
        args.out = Path("runs") / f"{Path(settings.data).name}-{settings.model}-{settings.method}"
    jobs.train(settings, args.out, shlex.join(["ulr", *argv]), overwrite="overwrite" in args)


def _demo(args: argparse.Namespace, argv: list[str]) -> None:
    from ulr_kernels.recipes import demo

    demo.run(args.out, args.seeds)


def _bench(args: argparse.Namespace, argv: list[str]) -> None:
    from ulr_kernels import bench

    bench.run(args.out, quick="quick" in args, only=args.only)


def _doctor(args: argparse.Namespace, argv: list[str]) -> None:
    from ulr_kernels import doctor

    print(doctor.describe())


def _what_is_kept(args: argparse.Namespace) -> str:
    """For a run that ended early: where its last checkpoint is."""
    from ulr_kernels.recipes.train import CHECKPOINT

    folder = getattr(args, "resume", None) or getattr(args, "out", None)
    if folder is None or not (folder / CHECKPOINT).exists():
        return ""
    return f"; finished epochs are kept in {folder / CHECKPOINT}: continue with ulr train --resume {folder}"
