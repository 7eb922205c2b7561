"""`ulr bench`: every operation beside its rivals."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ulr_kernels.jobs import JobError

HELP = "measure beside rivals: a table of ratios, and a picture"
OUT = Path("runs/bench")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a look, not a result: shorter, and no memory")
    parser.add_argument(
        "--model", choices=("h100",), help="measure nothing: predict the CUDA kernels' times from counts"
    )
    parser.add_argument("--only", metavar="TEXT", help="rows whose name has it; pytest's -k")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default {OUT}")


def run(args: argparse.Namespace, argv: list[str]) -> None:
    root = Path(__file__).parents[2]
    if not (root / "bench" / "run.py").exists():
        raise JobError(f"bench needs the project's source folder; {root} has no bench/")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    if "model" in args:
        from bench import model

        measuring = [name for name in ("quick", "only", "out") if name in args]
        if measuring:
            raise JobError(f"--model measures nothing and writes nothing: drop --{measuring[0]}")
        print(model.table(args.model))
        return
    from bench.run import run

    run(getattr(args, "out", OUT), quick="quick" in args, only=getattr(args, "only", ""))
