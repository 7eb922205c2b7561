"""`ulr replay`: base weights and the log of a run become the tuned weights again."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "rebuild the weights that a run has tuned, bitwise, from its base model and its log"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="the model that the run began with, as finetune's --model")
    parser.add_argument("log", type=Path, metavar="LOG", help="the run's trajectory.ulr")
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument("--until", type=int, metavar="STEP", help="the weights after so many steps (default all)")
    steps.add_argument(
        "--revert", type=int, metavar="N", help="take back the last N steps: rebuilds what precedes them"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where they go (default replayed.safetensors beside LOG)"
    )
    parser.add_argument(
        "--backend", choices=("torch", "cpp", "cuda", "triton"), help="default the fastest that is here"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads; by default torch's choice")


def run(args: argparse.Namespace, argv: list[str]) -> None:
    from ulr_kernels.finetune import replay

    given = {name: getattr(args, name) for name in ("until", "revert", "backend", "threads") if name in args}
    out = args.out if "out" in args else args.log.parent / "replayed.safetensors"
    print(replay.write(args.base, args.log, out, **given))
