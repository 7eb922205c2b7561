"""The demonstration: one model, trained by likelihood ratio and by backpropagation, and a language model fine-tuned.

Each run has a process of its own, so that its time and memory are its own.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ulr_kernels.jobs import JobError
from ulr_kernels.recipes import report

# Shared by both methods; docs/measured.md has the runs that led here.
SHARED = "--data mnist5k --model mlp --epochs 40 --batch 100 --optimizer adam --lr 0.001 --label-smoothing 0.1"
OWN = {"ulr": "--method ulr --sigma 0.1 --copies 32 --preset best", "bp": "--method bp"}
TUNED = "--model minilm --data movie-reviews --tune head"


def run(out: Path, seeds: int = 1) -> None:
    """Train, print a table of both methods (medians over the seeds); fine-tune; print the paths of the pictures.

    Args:
        out: the folder of the runs and of the picture that compares them; earlier runs there are replaced.
        seeds: runs of each method, with the seeds 0, 1, ...

    Raises:
        JobError: `seeds` is below 1.
        ChildProcessError: a run failed (it has said why); those before it are there.
    """
    if seeds < 1:
        raise JobError(f"seeds must be at least 1, got {seeds}")
    reports: dict[str, list[dict[str, Any]]] = {method: [] for method in OWN}
    for seed in range(seeds):
        for method, options in OWN.items():
            folder = out / f"{method}-seed{seed}"
            reports[method].append(_run("train", folder, f"{SHARED} {options} --seed {seed}"))
    comparison = out / report.CURVES
    report.draw_curves(comparison, [reports[method][0] for method in OWN])
    print(f"\n{_table(list(reports.values()))}\n")
    tuned = out / "finetuned"
    found = _run("finetune", tuned, TUNED)
    before, after = (100 * found[name] for name in ("test_accuracy_before", "test_accuracy"))
    print(
        f"\ntest accuracy {before:.2f} % before and {after:.2f} % after {found['training_seconds']:.0f} s\n\npictures"
    )
    for path in (comparison, out / "ulr-seed0" / report.COSINES, tuned / report.CURVES):
        print(f"  {path}")


def _run(job: str, folder: Path, options: str) -> dict[str, Any]:
    """Run a job in a process of its own; returns its report."""
    command = [sys.executable, "-m", "ulr_kernels", job, *options.split(), "--out", str(folder), "--overwrite"]
    print(f"ulr {' '.join(command[3:])}", flush=True)
    # OpenMP's threads spin while they wait. Where the cores are shared that takes them from the threads that work
    # (docs/measured.md: a step of two threads took 5 to 14 times as long as with waiting threads asleep).
    done = subprocess.run(command, env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ}, check=False)
    if done.returncode:
        raise ChildProcessError(f"the run in {folder} ended with exit code {done.returncode}")
    return json.loads((folder / report.REPORT).read_text())


def _table(runs: list[list[dict[str, Any]]]) -> str:
    columns: dict[str, Callable[[list[dict[str, Any]]], str]] = {
        "method": lambda reports: report.title(reports[0]),
        "test accuracy": lambda reports: f"{100 * _median(reports, 'test_accuracy'):.2f} %",
        "training time": lambda reports: f"{_median(reports, 'training_seconds'):.1f} s",
        "samples/s": lambda reports: f"{_median(reports, 'samples_per_second'):,.0f}",
        "training memory": lambda reports: f"{_median(reports, 'training_memory_mib'):,.0f} MiB",
        "peak memory": lambda reports: f"{_median(reports, 'peak_memory_mib'):,.0f} MiB",
    }
    rows = [list(columns), *([text(reports) for text in columns.values()] for reports in runs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = []
    for first, *others in rows:
        numbers = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *numbers]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _median(reports: list[dict[str, Any]], figure: str) -> float:
    return statistics.median(report[figure] for report in reports)
