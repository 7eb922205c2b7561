"""`ulr bench`: runs `bench/`, and makes the table of ratios and the picture out of its measurements."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ulr_kernels.recipes import RecipeError

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Goal:
    """The rival's time, or extra memory, is to be at least so many times the library's."""

    row: str
    rival: str
    at_least: float
    what: str = "time"


GOALS = (
    Goal("normal", "tensor.normal_", 7),
    Goal("normal-2-threads", "ulr, one thread", 1.9),
    Goal("rademacher", "tensor.bernoulli_", 60),
    Goal("linear-fp32", "noiseless F.linear", 1 / 0.50),
    Goal("linear-fp32", "noiseless oneDNN", 1 / 1.06),
    Goal("linear-bf16", "noiseless F.linear", 1 / 1.10),
    Goal("linear-fp32-1-thread", "noiseless F.linear", 1 / 0.50),
    Goal("linear-fp32-1-thread", "noiseless oneDNN", 1 / 1.06),
    Goal("linear-bf16-1-thread", "noiseless F.linear", 1 / 1.10),
    Goal("linear-copies", "eager, input repeated", 20),
    Goal("linear-copies", "eager, product repeated", 7),
    Goal("gradient", "authors' way", 25),
    Goal("gradient", "eager, reduced first", 1.5),
    Goal("gradient", "authors' way", 20, "memory"),
    Goal("gradient", "eager, reduced first", 20, "memory"),
    Goal("step", "authors' way", 12),
    *(
        Goal(f"perturbed-{dist}-{shape}", "noiseless oneDNN", share)
        for dist, share in (("normal", 0.75), ("rademacher", 0.85))
        for shape in ("384x384", "384x1536", "1536x384", "576x576", "576x1536", "1536x576")
    ),
    Goal("eggroll", "plain forward, F.linear", 0.45),
    Goal("eggroll", "torcheggroll", 5),
    Goal("eggroll", "eggroll-es", 5),
    Goal("population", "EvoX", 10),
    *(
        goal
        for model in ("minilm", "smollm2")
        for dist, share in (("gaussian", 0.75), ("signs", 0.85))
        for goal in (
            Goal(f"mezo-{model}-{dist}", "two plain forwards", share),
            Goal(f"mezo-{model}-{dist}", "MeZO as published", 2),
            Goal(f"mezo-{model}-{dist}", "two plain forwards", 1 / 1.03, "memory"),
        )
    ),
    Goal("perturb-normal", "mul_", 1 / 1.9),
    Goal("perturb-rademacher", "mul_", 1 / 1.2),
    Goal("combine-16", "noise of each probe, one pass", 1 / 1.15),
    Goal("gpu-step-small", "eager, product repeated", 10),
    Goal("gpu-step-small", "torch.compile, CUDA graph", 3),
)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The median time of a contestant in one sweep.

    Attributes:
        key, row: the row's short and full name.
        contestant: its name; the library's begin with "ulr".
        cost: bytes, flops and noise values of the row, and `kind` and `dist`: which products and which noise.
        ceilings: which of the machine's ceilings count; the number of threads, or a device.
        extra_bytes: peak extra memory, where it was measured.
    """

    key: str
    row: str
    contestant: str
    sweep: int
    seconds: float
    cost: dict[str, Any]
    ceilings: str
    extra_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Line:
    """The library beside one rival: `ratio` is theirs / ours, of the medians of each sweep, the median over sweeps.

    `value` and `rival_value` are seconds or bytes, `floor` is how many times the row's floor ours takes.
    """

    row: str
    what: str
    name: str
    value: float
    rival: str
    rival_value: float
    ratio: float
    goal: float | None
    floor: float | None

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.ratio >= self.goal


def floor_seconds(cost: dict[str, Any], ceilings: dict[str, Any]) -> float:
    """The least time of a call: the greater of its traffic's and its arithmetic's.

    On a CPU products and noise use the same vector units, so their times add up; on a GPU they overlap.
    """
    product = cost["flops"] / ceilings[f"flops {cost['kind']}"]
    noise = cost["noise"] / ceilings[cost["dist"]]
    arithmetic = max(product, noise) if ceilings["overlap"] else product + noise
    return max(cost["bytes"] / ceilings["bytes"], arithmetic)


def is_ours(contestant: str) -> bool:
    """ "ulr", or "ulr" and a back end; "ulr, one thread" is a rival."""
    return contestant.split(" ")[0] == "ulr"


def lines(measurements: Iterable[Measurement], ceilings: dict[str, dict[str, Any]]) -> Iterator[Line]:
    """One line for each of the library's contestants and each of its rivals in the same row, times before memory."""
    rows: dict[str, dict[str, list[Measurement]]] = {}
    for m in measurements:
        rows.setdefault(m.key, {}).setdefault(m.contestant, []).append(m)
    goals = {(g.row, g.rival, g.what): g.at_least for g in GOALS}
    for key, contestants in rows.items():
        for what in ("time", "memory"):
            for name in filter(is_ours, contestants):
                mine = contestants[name]
                floor = floor_seconds(mine[0].cost, ceilings[mine[0].ceilings])
                for rival in contestants:
                    if is_ours(rival):
                        continue
                    goal = goals.get((key, rival, what))
                    line = _line(mine, contestants[rival], what, goal, floor)
                    if line:
                        yield line


def _line(
    mine: list[Measurement], theirs: list[Measurement], what: str, goal: float | None, floor: float
) -> Line | None:
    distance: float | None = None
    if what == "time":
        by_sweep = {m.sweep: m.seconds for m in theirs}
        ratio = statistics.median(by_sweep[m.sweep] / m.seconds for m in mine if m.sweep in by_sweep)
        value, rival_value = (statistics.median(m.seconds for m in ms) for ms in (mine, theirs))
        distance = value / floor
    else:
        held = [m.extra_bytes for m in mine if m.extra_bytes is not None]
        rival_held = [m.extra_bytes for m in theirs if m.extra_bytes is not None]
        if not held or not rival_held:
            return None
        value, rival_value = float(held[0]), float(rival_held[0])
        ratio = rival_value / max(value, 4096)  # a page is the unit of the measurement
    return Line(mine[0].row, what, mine[0].contestant, value, theirs[0].contestant, rival_value, ratio, goal, distance)


def read(path: Path) -> tuple[list[Measurement], dict[str, Any]]:
    """The measurements in pytest-benchmark's JSON, and what it says of the machine: `ulr` and `ceilings`."""
    content = json.loads(path.read_text())
    measurements = [
        Measurement(row=b["group"], seconds=b["stats"]["median"], **b["extra_info"]) for b in content["benchmarks"]
    ]
    return measurements, {name: content["machine_info"][name] for name in ("ulr", "ceilings")}


# --- what people see -------------------------------------------------------------------------------------------------


def _digits(value: float) -> str:
    """Three significant digits, never as a power of ten: 1000, not 1e+03."""
    return f"{float(f'{value:.3g}'):.10g}"


def _quantity(value: float, what: str) -> str:
    if what == "memory":
        return f"{value / 1e6:.2f} MB"
    rounded = float(f"{value:.3g}")  # 999.7 us are shown as 1 ms
    unit, scale = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if rounded >= s), ("us", 1e-6))
    return f"{_digits(value / scale)} {unit}"


def table(found: list[Line]) -> str:
    """Aligned text: a row's name and our value once, then a line for each rival."""
    head = ("row", "ulr", "floor", "rival", "its", "ratio", "goal", "")
    body, last = [], None
    for line in found:
        title = line.row + (" extra memory" if line.what == "memory" else "")
        title += line.name.removeprefix("ulr")  # the back end, where it was named
        first = title != last
        last = title
        body.append(
            (
                title if first else "",
                _quantity(line.value, line.what) if first else "",
                f"{line.floor:.1f}x" if first and line.floor is not None else "",
                line.rival,
                _quantity(line.rival_value, line.what),
                f"{_digits(line.ratio)}x",
                "" if line.goal is None else f">= {_digits(line.goal)}x",
                {None: "", True: "met", False: "NOT MET"}[line.met],
            )
        )
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    left = {"row", "rival", ""}

    def aligned(cells: tuple[str, ...]) -> str:
        pairs = zip(head, cells, widths, strict=True)
        return "  ".join(c.ljust(w) if name in left else c.rjust(w) for name, c, w in pairs).rstrip()

    return "\n".join(map(aligned, (head, *body)))


LEGEND = """ratio: the rival's median over ours, the median over sweeps in which they took turns.
floor: our time over the least that copy bandwidth, products and noise rate allow, measured in the same run."""


def headline(facts: dict[str, Any]) -> str:
    back_ends = sorted(set(facts["backends"].values()))
    return (
        f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}, back end {' and '.join(back_ends)}, "
        f"commit {facts['commit']}, {facts['date']}"
    )


def draw(found: list[Line], facts: dict[str, Any], path: Path) -> None:
    """A bar for each rival's time over the library's, and each memory goal's, on a log scale; a mark at each goal."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = [line for line in found if line.what == "time" or line.goal is not None]
    colours = {None: "#8aa4c8", True: "#4a9c6d", False: "#c8553d"}
    figure = Figure(figsize=(11, 1.2 + 0.27 * len(found)), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    for place, line in enumerate(reversed(found)):
        axes.barh(place, line.ratio - 1, left=1, color=colours[line.met], height=0.7, zorder=2)
        axes.text(max(line.ratio, line.goal or 1, 1), place, f"  {_digits(line.ratio)}x", va="center", fontsize=8)
        if line.goal is not None:
            axes.plot([line.goal] * 2, [place - 0.4, place + 0.4], color="black", linewidth=2, zorder=3)
    names = [
        f"{line.row}{' memory' if line.what == 'memory' else ''}{line.name.removeprefix('ulr')}   vs {line.rival}"
        for line in found
    ]
    axes.set_yticks(range(len(found)), reversed(names), fontsize=8)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8, zorder=1)
    axes.set_ylim(-0.8, len(found) - 0.2)
    axes.margins(x=0.12)
    axes.set_xlabel("how many times ulr_kernels's time (or memory) the rival takes; black mark: the goal")
    axes.grid(axis="x", which="both", color="#dddddd", linewidth=0.5, zorder=0)
    axes.set_title(headline(facts), fontsize=8)
    figure.savefig(path, dpi=120)


def write(out: Path, name: str, found: list[Line], machine: dict[str, Any]) -> None:
    """OUT/NAME.json, .csv and .txt: the lines, and where and of what they were measured."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [dataclasses.asdict(line) | {"met": line.met} for line in found]
    (out / f"{name}.json").write_text(json.dumps(machine | {"lines": rows}, indent=1) + "\n")
    with (out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (out / f"{name}.txt").write_text(f"{headline(machine['ulr'])}\n\n{table(found)}\n\n{LEGEND}\n")


def predictions(device: str) -> str:
    """What the model of bench/model.py says of a device, as a table.

    Raises:
        RecipeError: this is no source checkout.
    """
    _need_sources()
    from bench import model

    return model.table(device)


def _need_sources() -> None:
    if not (ROOT / "bench" / "test_rows.py").exists():
        raise RecipeError(f"bench needs the project's source folder; {ROOT} has no bench/")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))


def run(out: Path, *, quick: bool = False, only: str = "") -> list[Line]:
    """Measure, print the table, and write it to `out` as bench.{txt,csv,json,png}.

    Args:
        out: a folder; made if there is none.
        quick: fewer and shorter measurements, no memory.
        only: an expression of pytest's -k that chooses rows.

    Raises:
        RecipeError: this is no source checkout, pytest-benchmark or matplotlib is missing, `out` cannot be written, or
            `only` is malformed or matches no row or no rival that is installed.
        ChildProcessError: a benchmark failed; what the others measured is in `out`.
    """
    _need_sources()
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise RecipeError(f"out '{out}' cannot be written")  # which would else show when all is measured
    try:
        import matplotlib  # noqa: F401
        import pytest
        import pytest_benchmark  # noqa: F401
    except ImportError as error:
        raise RecipeError(f"bench needs {error.name}: pip install '.[test,train]'") from None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "pytest", "bench", "-q", "--benchmark-quiet", f"--benchmark-json={path}"]
        command += [*(["--quick"] if quick else []), *(["-k", only] if only else [])]
        done = subprocess.run([*command, "-p", "no:cacheprovider", "-W", "ignore"], cwd=ROOT)
        if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
            raise RecipeError(f"no row matches --only '{only}'")
        if done.returncode == pytest.ExitCode.USAGE_ERROR:
            raise RecipeError(f"--only must be an expression of pytest's -k, got '{only}'")
        failure = f"a benchmark failed (pytest's exit code {done.returncode})" if done.returncode else ""
        if failure and not path.exists():
            raise ChildProcessError(failure)
        measurements, machine = read(path)
    found = list(lines(measurements, machine["ceilings"]))
    if not found:
        raise RecipeError("no rival was measured: `make bench` installs them, and --only must not leave them out")
    write(out, "bench", found, machine)
    draw(found, machine["ulr"], out / "bench.png")
    print(f"\n{(out / 'bench.txt').read_text()}\n{out / 'bench.txt'}, .csv, .json, .png")
    if failure:
        raise ChildProcessError(f"{failure}; the table has what the others measured")
    return found
