"""The Python code of README.md and docs/networks.md runs as it is printed, and what it makes trains."""

import re
from pathlib import Path
from typing import Any

import small_models
import torch
from small_models import cross_entropy, v

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


def test_networks():
    names = run("docs/networks.md")
    model, estimator, optimizer = names["model"], names["estimator"], names["optimizer"]
    x, y = v(1, 40, 64).abs(), torch.arange(40) % 10
    with torch.no_grad():
        before = cross_entropy(model(x), y).mean()
    for _ in range(30):
        optimizer.zero_grad()
        estimator.backward(x, y, cross_entropy)
        optimizer.step()
    with torch.no_grad():
        assert cross_entropy(model(x), y).mean() < before - 0.2

    nodes, labels, train = v(2, 30, 32), torch.arange(30) % 7, torch.arange(0, 30, 2)
    adjacency = torch.softmax(3 * v(3, 30, 30), -1)
    names["graph"].requires_grad_(True)
    losses = [names["step_on"](nodes, adjacency, labels, train, names["opt"]).item() for _ in range(30)]
    assert losses[-1] < losses[0] - 0.1
