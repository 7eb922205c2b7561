"""Options of `pytest bench/`, the order of its measurements, and the record that goes to the disk row by row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import machine, rows
from bench.record import Record


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="fewer and shorter measurements: a look, not a result")
    parser.addoption("--out", type=Path, help="write bench.txt, .csv and .json there, anew after each row")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Row by row, and within a row sweep by sweep, so that rivals alternate and a slow minute hits them alike."""
    if "contestant" not in metafunc.fixturenames:
        return
    sweeps = 2 if metafunc.config.getoption("quick") else 5
    metafunc.parametrize(
        ("key", "row", "contestant", "sweep"),
        [
            pytest.param(key, row, name, sweep, id=f"{key}-{name}-{sweep}")
            for key, make in rows.cpu_rows().items()
            for row in [make()]
            for sweep in range(sweeps)
            for name in row.contestants
        ],
    )


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Iterator[Record]:
    found = Record(request.config.getoption("out"))
    yield found
    found.write()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info |= {"ulr": machine.facts("cpu")}


@pytest.fixture(autouse=True, scope="session")
def leave_the_global_generator_alone():
    """torch.compile's random numbers come from torch's global generator."""
    with torch.random.fork_rng():
        yield
