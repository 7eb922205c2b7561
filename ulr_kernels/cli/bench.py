"""`ulr bench`: every operation beside its rivals."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "measure beside rivals: a table of ratios, and a picture"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a look, not a result: shorter, and no memory")
    parser.add_argument(
        "--model", choices=("h100",), help="measure nothing: predict the CUDA kernels' times from counts"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name has it; pytest's -k")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="default %(default)s")


def run(args: argparse.Namespace, argv: list[str]) -> None:
    from ulr_kernels import bench

    if "model" in args:
        print(bench.predictions(args.model))
        return
    bench.run(args.out, quick="quick" in args, only=args.only)
