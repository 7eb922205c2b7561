"""The Python code of README.md and of pages in docs/ runs as it is printed, and what it makes trains."""

import re
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from small_models import cross_entropy, v

import ulr_kernels as ulr

modules_may_draw = small_models.modules_may_draw  # used by every test of this file
ROOT = Path(__file__).parents[1]


def run(page: str) -> dict[str, Any]:
    """The names that a page's blocks of code leave, one after the other."""
    names: dict[str, Any] = {}
    torch.manual_seed(0)  # of the initial values
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
        exec(compile(block, page, "exec"), names)
    return names


def test_readme(capsys):
    names = run("README.md")
    assert "The estimates agree with autograd." in capsys.readouterr().out
    before = names["loss_fn"](names["model"](names["x"]), names["target"]).mean()
    assert before < 1.5  # ln 10 at the start


def test_first_steps(capsys, tmp_path, monkeypatch):
    """It prints what the page shows; numbers may differ by the rounding of another machine's products."""
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)  # the page saves a picture
    run("docs/first-steps.md")
    shown = "".join(re.findall(r"```text\n(.*?)```", (ROOT / "docs/first-steps.md").read_text(), re.DOTALL))
    printed, number = capsys.readouterr().out, r"\d+(?:\.\d+)?"
    assert re.split(number, printed) == re.split(number, shown)
    numbers = [[float(found) for found in re.findall(number, text)] for text in (printed, shown)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.04, abs=0.02)
    assert (tmp_path / "first-steps.png").stat().st_size > 10_000


def test_networks():
    names = run("docs/networks.md")
    model, optimizer = names["model"], names["optimizer"]
    estimator = ulr.ULR(model, sigma=0.3, copies=32)  # as the page makes it, before it goes on to a graph's
    x, y = v(1, 40, 64).abs(), torch.arange(40) % 10
    with torch.no_grad():
        before = cross_entropy(model(x), y).mean()
    for _ in range(30):
        optimizer.zero_grad()
        estimator.backward(x, y, cross_entropy)
        optimizer.step()
    with torch.no_grad():
        assert cross_entropy(model(x), y).mean() < before - 0.2

    graph, affects = names["graph"], names["affects"]
    graph_step = (names["nodes"], names["labels"], names["losses"])
    clean = graph_step[2](graph(graph_step[0]), graph_step[1]).mean().item()
    assert clean == pytest.approx(float(names["loss"]), abs=0.1)
    assert affects["head"].shape == (12, 12)
    affects = {"first": names["ring"][:, names["labelled"]], "second": torch.eye(30)[:, names["labelled"]]}
    optimizer = torch.optim.Adam(graph.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss = names["estimator"].backward(*graph_step, affects)
        optimizer.step()
    assert loss < names["loss"] - 0.5


def test_output_loss():
    names = run("docs/output-loss.md")
    with torch.no_grad():
        assert names["is_wrong"](names["model"](names["x"]), names["y"]).float().mean() < 0.1  # 0.75 at the start
    assert names["loss"].requires_grad and names["loss"] < 0.4
