"""`ulr bench`: runs the rows of `bench/` in a process of their own and prints their table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.report import Line, draw
from ulr_kernels.jobs import JobError

ROOT = Path(__file__).parents[1]


def run(out: Path, *, quick: bool = False, only: str = "") -> list[Line]:
    """Measure, print the table, and write it to `out` as bench.{txt,csv,json,png}.

    The table on the disk grows with each row, so a run that is stopped keeps the rows that it has measured.

    Args:
        out: a folder; made if there is none. Its old bench.* files are replaced.
        quick: fewer and shorter measurements, no memory.
        only: an expression of pytest's -k that chooses rows.

    Raises:
        JobError: pytest-benchmark or matplotlib is missing, `out` cannot be written, or `only` is malformed or
            matches no row or no rival that is installed.
        ChildProcessError: a benchmark failed; the rows that were measured are in `out`.
    """
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise JobError(f"out '{out}' cannot be written")  # before anything is measured
    try:
        import matplotlib  # noqa: F401
        import pytest
        import pytest_benchmark  # noqa: F401
    except ImportError as error:
        raise JobError(f"bench needs {error.name}: pip install '.[test,train]'") from None
    for suffix in ("txt", "csv", "json", "png"):
        (out / f"bench.{suffix}").unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-quiet", f"--out={out.absolute()}"]
    command += [*(["--quick"] if quick else []), *(["-k", only] if only else [])]
    done = subprocess.run([*command, "-p", "no:cacheprovider", "-W", "ignore"], cwd=ROOT)
    if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise JobError(f"no row matches --only '{only}'")
    if done.returncode == pytest.ExitCode.USAGE_ERROR:
        raise JobError(f"--only must be an expression of pytest's -k, got '{only}'")
    failure = f"a benchmark failed (pytest's exit code {done.returncode})" if done.returncode else ""
    if not (out / "bench.json").exists():
        if failure:
            raise ChildProcessError(failure)
        raise JobError("no rival was measured: `make bench` installs them, and --only must not leave them out")
    content = json.loads((out / "bench.json").read_text())
    found = [Line(**{name: value for name, value in line.items() if name != "met"}) for line in content["lines"]]
    draw(found, content["ulr"], out / "bench.png")
    print(f"\n{(out / 'bench.txt').read_text()}\n{out / 'bench.txt'}, .csv, .json, .png")
    if failure:
        raise ChildProcessError(f"{failure}; the table has what the others measured")
    return found
