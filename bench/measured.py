"""The tables of docs/measured.md, made from the committed results: `python -m bench.measured` writes them anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "measured.md"
BEGIN, END = "<!-- begin: python -m bench.measured -->\n", "<!-- end -->\n"
MACHINES = {
    "epyc-zen5-2-cores": "Zen 5",
    "epyc-zen4-2-cores": "Zen 4",
}

Key = tuple[str, str, str]  # row, rival, "time" or "memory"


def results(folder: Path) -> tuple[dict[Key, dict[str, Any]], list[str]]:
    """The newest line of each row and rival in a machine's result files, and each file's commit and date."""
    files = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    files = dict(sorted(files.items(), key=lambda item: item[1]["ulr"]["date"]))
    found = {(m["row"], m["rival"], m["what"]): m for content in files.values() for m in content["lines"]}
    sources = [f"`{name}` (commit {c['ulr']['commit']}, {c['ulr']['date']})" for name, c in files.items()]
    return found, sources


def cell(line: dict[str, Any] | None) -> str:
    if line is None or line["ratio"] is None:
        return "-"
    ratio = line["ratio"]
    text = f"{float(f'{ratio:.3g}'):g}x"
    return text if line["goal"] is None or ratio >= line["goal"] else f"{text}, missed"


def tables() -> str:
    """One table of times and one of extra memory, a column for each machine; then where the figures come from."""
    machines = {title: results(ROOT / "bench" / "results" / name) for name, title in MACHINES.items()}
    text = []
    for what, title in (("time", "Time of the rival over ours"), ("memory", "Extra memory of the rival over ours")):
        keys = list(dict.fromkeys(key for found, _ in machines.values() for key in found if key[2] == what))
        first = {row: place for place, (row, *_) in reversed(list(enumerate(keys)))}
        keys.sort(key=lambda key: first[key[0]])  # a row's rivals of all machines one after the other
        text += [
            f"### {title}\n",
            f"| row | rival | goal | {' | '.join(machines)} |",
            "| --- " * (3 + len(machines)) + "|",
        ]
        last = None
        for key in keys:
            lines = [found.get(key) for found, _ in machines.values()]
            goal = next(line["goal"] for line in lines if line is not None)
            cells = [
                key[0] if key[0] != last else "",
                key[1],
                "" if goal is None else f"{goal:.3g}x",
                *map(cell, lines),
            ]
            text.append(f"| {' | '.join(cells)} |")
            last = key[0]
        text.append("")
    text.append("### Result files\n")
    for title, (_, sources) in machines.items():
        text += [f"* {title}:", *(f"  {source}{',' * (source != sources[-1])}" for source in sources)]
    return "\n".join(text) + "\n"


def page() -> str:
    """The page with its tables as the committed results have them."""
    before, rest = PAGE.read_text().split(BEGIN)
    return f"{before}{BEGIN}{tables()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page())
