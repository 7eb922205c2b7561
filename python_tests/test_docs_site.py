"""The pages that the site of the documentation adds to docs/: the reference, and the drawings of the results."""

from __future__ import annotations

import importlib
import inspect
import json
import pathlib
import re
import shutil
import subprocess
import types

import pytest

import ulr_kernels as ulr
from bench import figures, measured

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, object]]:
    """title of a page of the reference -> its summary, and the function or class that it describes."""
    monkeypatch.syspath_prepend(ROOT / "docs" / "site")
    groups = importlib.import_module("reference").symbols()
    found = {}
    for symbol in (symbol for group in groups.values() for symbol in group):
        module, _, name = symbol.path.rpartition(".")
        found[symbol.title] = symbol.summary, getattr(importlib.import_module(module), name)
    return found


def test_each_page_is_in_the_navigation() -> None:
    navigation = re.findall(r"^ +- ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(set(navigation)) == len(navigation)
    assert {path.name for path in (ROOT / "docs").glob("*.md")} < set(navigation)


def test_each_public_name_has_a_page_of_its_docstring(documented) -> None:
    values = [value for _, value in documented.values()]
    for title, module in {"ulr": ulr, "ulr.ops": ulr.ops, "ulr.optim": ulr.optim}.items():
        for name in module.__all__:
            value = getattr(module, name)
            if not isinstance(value, types.ModuleType) and name != "__version__":
                assert documented.get(f"{title}.{name}", ("", value))[1] is value
                assert value in values
    for summary, value in documented.values():
        assert summary == inspect.getdoc(value).split("\n")[0]


def test_docstrings_are_read_as_they_are_meant(documented) -> None:
    """Arguments that a docstring describes exist; a first line of `Returns` has no colon, which would end a type."""
    for title, (_, value) in documented.items():
        if arguments := re.search(r"\nArgs:\n(.*?)(\n\n|$)", inspect.getdoc(value), re.DOTALL):
            names = ", ".join(re.findall(r"^ {4}(\w[\w, ]*):", arguments[1], re.MULTILINE))
            assert set(names.split(", ")) <= set(inspect.signature(value).parameters), title
        for member in [value, *(vars(value).values() if inspect.isclass(value) else ())]:
            if returns := re.search(r"\nReturns:\n(.*)", inspect.getdoc(member) or ""):
                assert ": " not in returns[1], (title, member)


def test_bars_show_each_ratio() -> None:
    page = figures.rivals_page()
    for name in measured.MACHINES:
        found, _ = measured.results(ROOT / "bench" / "results" / name)
        for (row, _, what), line in found.items():
            if what == "time" and line["ratio"] is not None:
                assert f">{measured.cell(line)}</span>" in page and f"<p>{row}</p>" in page
    assert "## Others" not in page


def results_file(folder: pathlib.Path, date: str, seconds: float) -> None:
    line = {"row": "normal fill 2^20, 1 thread", "what": "time", "name": "ulr", "rival": "randn", "goal": None}
    line |= {"value": seconds, "rival_value": 1.0, "ratio": 1 / seconds}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "linear.json").write_text(json.dumps({"ulr": {"commit": "abc", "date": date}, "lines": [line]}))


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_history_has_each_committed_measurement(tmp_path: pathlib.Path) -> None:
    def git(*arguments: str | pathlib.Path) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert "no history to draw" in figures.history_page(tmp_path)
    git("init")
    for date, seconds in (("2026-11-02", 0.5), ("2026-11-01", 0.25), ("2026-11-02", 0.5)):
        results_file(tmp_path / "bench" / "results" / "zen", date, seconds)
        git("add", ".")
        git("commit", "--message", date)
    points = figures.history(tmp_path)["zen"]["normal fill 2^20, 1 thread"]
    assert [(point.date, point.seconds["ulr"]) for point in points] == [("2026-11-01", 0.25), ("2026-11-02", 0.5)]
    page = figures.history_page(tmp_path)
    assert page.count("<circle") == 4 and "ulr: 250 ms to 500 ms" in page and "### Noise" in page

    git("clone", "--depth", "1", tmp_path.as_uri(), tmp_path / "shallow")
    page = figures.history_page(tmp_path / "shallow")
    assert "shallow clone" in page and "Rows measured once: 1" in page
