"""Pages of the site that draw the committed results: bars of each rival, and every row's times over the commits.

The drawings are HTML and SVG without colours of their own: `docs/site/style.css` has these, for light and dark.
"""

from __future__ import annotations

import dataclasses
import html
import json
import math
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bench.measured import MACHINES, ROOT, Key, cell, results
from bench.report import quantity

FAMILIES = {  # by the beginning of a row's name
    "Noise": ("normal ", "laplace ", "rademacher ", "ulr.noise ", "noise_"),
    "Linear layers": ("noisy_linear ", "gradient ", "replay "),
    "Convolutions": ("noisy_conv2d ", "conv "),
    "Noise on weights": ("perturbed_",),
    "Parameters in place": ("perturb_ ", "combine_ "),
    "Whole steps": ("ULR step", "EGGROLL step", "full-rank ", "MeZO step"),
}
LOWEST, HIGHEST = -1.5, 3.7  # powers of ten at the ends of the axis of ratios
WIDTH, HEIGHT, MARGIN = 300, 120, 8  # of a chart, in units of its view box


def family(row: str) -> str:
    """The heading of a row."""
    return next((name for name, beginnings in FAMILIES.items() if row.startswith(beginnings)), "Others")


# --- bars of the rivals ----------------------------------------------------------------------------------------------

NO_SEARCH = "---\nsearch: { exclude: true }\n---\n"  # names of rows are in the tables of docs/measured.md already
RIVALS = f"""{NO_SEARCH}# Beside its rivals

Times of rivals over ours, from the committed results: a bar to the right of 1x is a rival that takes longer. The axis
is logarithmic. A short line is the goal, set for Zen 5. [Measured](measured.md) has the same ratios as tables, those
of memory too, and the conditions.
"""


def rivals_page() -> str:
    """A chart for each family of rows, with a bar for each rival and machine."""
    machines = {title: results(ROOT / "bench" / "results" / name)[0] for name, title in MACHINES.items()}
    keys = [key for key in dict.fromkeys(key for found in machines.values() for key in found) if key[2] == "time"]
    text = [RIVALS]
    for heading in (*FAMILIES, "Others"):
        rows = list(dict.fromkeys(row for row, _, _ in keys if family(row) == heading))
        if not rows:
            continue
        text.append(f"## {heading}\n\n{_legend(machines)}\n<div class='bars'>\n<div class='axis'>{_ticks()}</div>")
        for row in rows:
            text.append(f"<p>{html.escape(row)}</p>")
            for key in keys:
                if key[0] == row:
                    text.append(_rival(key, [found.get(key) for found in machines.values()]))
        text.append("</div>\n")
    return "\n".join(text)


def _legend(names: Iterable[str]) -> str:
    entries = (f"<span class='series-{place}'>{html.escape(name)}</span>" for place, name in enumerate(names))
    return f"<div class='legend'>{' '.join(entries)}</div>"


def _place(ratio: float) -> float:
    """Of a ratio on the axis, in per cent of its length; ratios beyond the ends are at the ends."""
    power = min(max(math.log10(max(ratio, 1e-9)), LOWEST), HIGHEST)
    return 100 * (power - LOWEST) / (HIGHEST - LOWEST)


def _ticks() -> str:
    ratios = (10.0**power for power in range(math.ceil(LOWEST), math.floor(HIGHEST) + 1))
    return "".join(f"<span style='left:{_place(ratio):.1f}%'>{ratio:g}x</span>" for ratio in ratios)


def _rival(key: Key, lines: list[dict[str, Any] | None]) -> str:
    """The bars of one rival, one for each machine."""
    goal = next(line["goal"] for line in lines if line is not None)
    bars = []
    for place, line in enumerate(lines):
        if line is not None and line["ratio"] is not None:
            start, end = sorted((_place(1), _place(line["ratio"])))
            label = max(end, 0 if goal is None else _place(goal))
            bars.append(
                f"<div class='bar series-{place}'><b style='left:{start:.1f}%;width:{end - start:.1f}%'></b>"
                f"<span style='left:{label:.1f}%'>{cell(line)}</span></div>"
            )
    if goal is not None:
        bars.append(f"<i style='left:{_place(goal):.1f}%' title='goal {goal:.3g}x'></i>")
    return f"<div class='rival'><span>{html.escape(key[1])}</span><div>{''.join(bars)}</div></div>"


# --- times over the commits ------------------------------------------------------------------------------------------

HISTORY = f"""{NO_SEARCH}# History of the measurements

The time of each row, ours and its rivals', in every committed result. A point is one measurement; its title names the
commit and the date. Points are one step apart, whatever their dates. The axis of times is logarithmic, from the least
to the greatest of a chart. Below it are the first and the last time.
"""


@dataclasses.dataclass(frozen=True)
class Point:
    """The times of one measurement of a row.

    Attributes:
        commit, date: of the measurement.
        seconds: of each contestant.
    """

    commit: str
    date: str
    seconds: dict[str, float]


def history_page(root: Path = ROOT) -> str:
    """A chart for each row that was measured more than once on a machine.

    Args:
        root: of a clone. Where it is none, or one without its history, the page says so.
    """
    found = history(root)
    text = [HISTORY]
    if not found:
        text.append("This site was built outside a clone of the repository, so there is no history to draw.\n")
    elif _git(root, "rev-parse", "--is-shallow-repository") == "true\n":
        text.append("This site was built in a shallow clone: older measurements are absent.\n")
    for machine, rows in found.items():
        text.append(f"## {MACHINES.get(machine, machine)}\n")
        again = {row: points for row, points in rows.items() if len(points) > 1}
        for heading in (*FAMILIES, "Others"):
            charts = [_chart(row, points) for row, points in again.items() if family(row) == heading]
            if charts:
                text.append(f"### {heading}\n\n<div class='charts'>\n{chr(10).join(charts)}\n</div>\n")
        once = [row for row in rows if row not in again]
        if once:
            entries = "".join(f"<li>{html.escape(row)}</li>" for row in once)
            text.append(f"<details><summary>Rows measured once: {len(once)}</summary><ul>{entries}</ul></details>\n")
    return "\n".join(text)


def history(root: Path) -> dict[str, dict[str, list[Point]]]:
    """machine -> row -> its measurements in the order of their dates; nothing outside a clone."""
    log = _git(root, "log", "--reverse", "--no-renames", "--name-only", "--format=%x00%H", "--", "bench/results")
    points: dict[str, dict[str, dict[str, Point]]] = {}  # by date: a file that is committed again counts once
    for entry in log.split("\0")[1:]:
        commit, *paths = entry.split()
        for path in paths:
            if path.endswith(".json") and (content := _git(root, "show", f"{commit}:{path}")):
                for row, point in _points(json.loads(content)):
                    points.setdefault(Path(path).parent.name, {}).setdefault(row, {})[point.date] = point
    return {
        machine: {row: [of_row[date] for date in sorted(of_row)] for row, of_row in rows.items()}
        for machine, rows in sorted(points.items(), key=lambda item: [*MACHINES, item[0]].index(item[0]))
    }


def _git(root: Path, *arguments: str) -> str:
    """What git prints; nothing where it fails or is not installed."""
    try:
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def _points(content: dict[str, Any]) -> Iterator[tuple[str, Point]]:
    """The rows of one file."""
    rows: dict[str, dict[str, float]] = {}
    for line in content["lines"]:
        if line["what"] == "time":
            seconds = rows.setdefault(line["row"], {})
            seconds[line["name"]] = line["value"]
            if line["rival_value"] is not None:
                seconds[line["rival"]] = line["rival_value"]
    for row, seconds in rows.items():
        yield row, Point(content["ulr"]["commit"], content["ulr"]["date"], seconds)


def _chart(row: str, points: list[Point]) -> str:
    """A line for each contestant, with its first and its last time in the legend."""
    names = list(dict.fromkeys(name for point in points for name in point.seconds))
    logs = [math.log(value) for point in points for value in point.seconds.values()]
    low, span = min(logs), max(logs) - min(logs) or 1.0
    drawn, legend = [], []
    for place, name in enumerate(names):
        dots, spots = [], []
        for index, point in enumerate(points):
            if name not in point.seconds:
                continue
            x = MARGIN + (WIDTH - 2 * MARGIN) * index / (len(points) - 1)
            y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (math.log(point.seconds[name]) - low) / span
            spots.append(f"{x:.1f},{y:.1f}")
            title = f"{name}: {quantity(point.seconds[name], 'time')}, commit {point.commit}, {point.date}"
            dots.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3'><title>{html.escape(title)}</title></circle>")
        drawn.append(f"<g class='series-{place}'><polyline points='{' '.join(spots)}'/>{''.join(dots)}</g>")
        of_name = [quantity(point.seconds[name], "time") for point in points if name in point.seconds]
        legend.append(f"{name}: {of_name[0]} to {of_name[-1]}")
    dates = f"<span>{points[0].date[:10]}</span><span>{points[-1].date[:10]}</span>"
    return (
        f"<figure><p>{html.escape(row)}</p>"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{html.escape(row)}'>{''.join(drawn)}</svg>"
        f"<div class='dates'>{dates}</div>{_legend(legend)}</figure>"
    )
