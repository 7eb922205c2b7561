"""The table of ratios and the picture, made from the measurements of the rows."""

from __future__ import annotations

import csv
import dataclasses
import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.goals import GOALS


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The median time of a contestant in one sweep.

    Attributes:
        key, row: the row's short and full name.
        contestant: its name; the library's begin with "ulr".
        cost: bytes, flops and noise values of the row, and `kind` and `dist`: which products and which noise.
        ceilings: which of the machine's ceilings count; the number of threads, or a device.
        seconds: None where the contestant did not run.
        extra_bytes: peak extra memory, where it was measured.
        absent: why it did not run.
    """

    key: str
    row: str
    contestant: str
    sweep: int
    seconds: float | None
    cost: dict[str, Any]
    ceilings: str
    extra_bytes: int | None = None
    absent: str = ""


@dataclasses.dataclass(frozen=True)
class Line:
    """The library beside one rival: `ratio` is theirs / ours, of the medians of each sweep, the median over sweeps.

    `value` and `rival_value` are seconds or bytes, `floor` is how many times the row's floor ours takes. A rival that
    did not run has neither value nor ratio, and `absent` says why.
    """

    row: str
    what: str
    name: str
    value: float
    rival: str
    rival_value: float | None
    ratio: float | None
    goal: float | None
    floor: float | None
    absent: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.goal is None or self.ratio is None else self.ratio >= self.goal


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
        ours = [found for name, found in contestants.items() if is_ours(name) and found[0].seconds is not None]
        rivals = [found for name, found in contestants.items() if not is_ours(name)]
        for mine in ours:
            for theirs in rivals:
                floor = floor_seconds(mine[0].cost, ceilings[mine[0].ceilings])
                yield _line(mine, theirs, goals.get((key, theirs[0].contestant, "time")), floor)
        for mine in ours:
            for theirs in rivals:
                if line := _memory_line(mine, theirs, goals.get((key, theirs[0].contestant, "memory"))):
                    yield line


def _line(mine: list[Measurement], theirs: list[Measurement], goal: float | None, floor: float) -> Line:
    """Medians of times, and the median of the ratios within a sweep."""
    seconds = {m.sweep: m.seconds for m in mine if m.seconds is not None}
    rival_seconds = {m.sweep: m.seconds for m in theirs if m.seconds is not None}
    ratios = [rival_seconds[sweep] / seconds[sweep] for sweep in seconds if sweep in rival_seconds]
    value = statistics.median(seconds.values())
    return Line(
        row=mine[0].row,
        what="time",
        name=mine[0].contestant,
        value=value,
        rival=theirs[0].contestant,
        rival_value=statistics.median(rival_seconds.values()) if ratios else None,
        ratio=statistics.median(ratios) if ratios else None,
        goal=goal,
        floor=value / floor,
        absent="" if ratios else theirs[0].absent,
    )


def _memory_line(mine: list[Measurement], theirs: list[Measurement], goal: float | None) -> Line | None:
    """Extra memory, where it was measured of both."""
    held = [m.extra_bytes for m in mine if m.extra_bytes is not None]
    rival_held = [m.extra_bytes for m in theirs if m.extra_bytes is not None]
    if not held or not rival_held:
        return None
    value, rival_value = float(held[0]), float(rival_held[0])
    ratio = rival_value / max(value, 4096)  # a page is the unit of the measurement
    names = mine[0].contestant, theirs[0].contestant
    return Line(mine[0].row, "memory", names[0], value, names[1], rival_value, ratio, goal, None)


# --- what people see -------------------------------------------------------------------------------------------------


def _digits(value: float) -> str:
    """Three significant digits, never as a power of ten: 1000, not 1e+03."""
    return f"{float(f'{value:.3g}'):.10g}"


def quantity(value: float, what: str) -> str:
    """Three digits of a number of seconds ("time") or bytes ("memory"), with a unit."""
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
                quantity(line.value, line.what) if first else "",
                f"{line.floor:.1f}x" if first and line.floor is not None else "",
                line.rival,
                "-" if line.rival_value is None else quantity(line.rival_value, line.what),
                "-" if line.ratio is None else f"{_digits(line.ratio)}x",
                "" if line.goal is None else f">= {_digits(line.goal)}x",
                line.absent or {None: "", True: "met", False: "NOT MET"}[line.met],
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

    found = [line for line in found if line.ratio is not None and (line.what == "time" or line.goal is not None)]
    colours = {None: "#8aa4c8", True: "#4a9c6d", False: "#c8553d"}
    figure = Figure(figsize=(11, 1.2 + 0.27 * len(found)), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    for place, line in enumerate(reversed(found)):
        assert line.ratio is not None
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
