"""The measurements of a run, written to the disk row by row, so that a run that is stopped keeps them."""

from __future__ import annotations

from pathlib import Path

from bench import machine
from bench.report import Measurement, lines, write


class Record:
    """All measurements so far. Those of a row are written when the next row begins."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.found: list[Measurement] = []
        if out is not None:  # ceilings are measured before the rows, so that the first row can be written
            self.machine = {"ulr": machine.facts("cpu"), "ceilings": machine.cpu_ceilings()}

    def add(self, measurement: Measurement) -> None:
        if self.found and self.found[-1].key != measurement.key:
            self.write()
        self.found.append(measurement)

    def write(self) -> None:
        if self.out is not None and (found := list(lines(self.found, self.machine["ceilings"]))):
            write(self.out, "bench", found, self.machine)
