"""The Triton kernels without a GPU: run by Triton's interpreter, through the front end of a launch, and compiled for a
H100 with a budget.

`python python_tests/test_triton.py [FAMILY...]` writes budgets/triton anew from what it measures: a file for each
family of `triton_launches`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from triton_launches import FAMILIES, launches

HERE = pathlib.Path(__file__).parent
BUDGETS = HERE / "budgets" / "triton"
# Of an instruction budget, in any kernel whose loop over draws makes noise and only adds it up or writes it out.
GOALS = {"normal": 30.0, "sign": 3.0, "wavefronts": 6.0}
# Loops over draws that only make noise and add it up, or write it out: here the goal holds for all they do.
HELD_TO_GOALS = {
    ("linear", "packed-signs"): GOALS["sign"],
    ("linear", "forward-bf16-normal"): GOALS["normal"],
    ("linear", "forward-fp32-normal"): GOALS["normal"],
    ("linear", "gradient-bf16-normal"): GOALS["normal"],
    ("linear", "gradient-fp32-normal"): GOALS["normal"],
    ("conv", "forward-bf16-normal"): GOALS["normal"],
    ("conv", "forward-bf16-normal-transposed"): GOALS["normal"],
    ("conv", "forward-bf16-normal-channels-last"): GOALS["normal"],
    ("conv", "forward-fp32-normal"): GOALS["normal"],
    ("conv", "gradient-bf16-normal"): GOALS["normal"],
    ("conv", "gradient-fp32-normal"): GOALS["normal"],
    ("steps", "gradients-bf16-normal"): GOALS["normal"],
    ("steps", "gradients-fp32-normal"): GOALS["normal"],
}


@pytest.mark.pair("triton/interpreted")
def test_interpreted() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_interpreted.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 60, run.stdout[-2000:]


@pytest.mark.pair("triton/interpreted")
def test_launches_of_size_one() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_front_end.py")],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]


def triton_version() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def names() -> list[tuple[str, str]]:
    return [(f, name) for f in FAMILIES for name in launches(f)] if importlib.util.find_spec("triton") else []


def budgets_of(family: str) -> dict[str, dict]:
    """By version of Triton: another compiler makes other code."""
    path = BUDGETS / f"{family}.json"
    return json.loads(path.read_text()) if path.exists() else {}


@pytest.mark.pair("triton/interpreted")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
@pytest.mark.parametrize("family,name", names())
def test_compiled(family, name) -> None:
    from cubin import measure

    measured = measure(launches(family)[name]())
    assert measured["spills"] == 0
    if (family, name) in HELD_TO_GOALS:
        assert measured["instructions"] <= HELD_TO_GOALS[family, name]
        assert measured["wavefronts"] <= GOALS["wavefronts"]
    budget = budgets_of(family).get(triton_version(), {}).get(name, {})
    over = {k: (measured[k], limit) for k, limit in budget.items() if measured[k] > limit}
    assert not over, f"measured, budget: {over}"


@pytest.mark.pair("triton/interpreted")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_launch_has_a_budget(family) -> None:
    for version, budget in budgets_of(family).items():
        assert list(budget) == list(launches(family)), version


def write_budgets(families: tuple[str, ...]) -> None:
    from cubin import measure

    for family in families:
        budgets = budgets_of(family)
        budgets[triton_version()] = {name: measure(launch()) for name, launch in launches(family).items()}
        rows = ",\n".join(
            f'  "{version}": {{\n'
            + ",\n".join(f"    {json.dumps(name)}: {json.dumps(values)}" for name, values in table.items())
            + "\n  }"
            for version, table in sorted(budgets.items())
        )
        (BUDGETS / f"{family}.json").write_text(f"{{\n{rows}\n}}\n")


if __name__ == "__main__":
    write_budgets(tuple(sys.argv[1:]) or FAMILIES)
