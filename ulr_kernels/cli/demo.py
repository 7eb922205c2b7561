"""`ulr demo`: one model trained with and without a backward pass."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "train one model by likelihood ratio and by backpropagation, and compare"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default %(default)s")
    parser.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="runs of each method; the table shows medians"
    )


def run(args: argparse.Namespace, argv: list[str]) -> None:
    from ulr_kernels.recipes import demo

    demo.run(args.out, args.seeds)
