"""One measurement: a contestant of a row, in one sweep. `ulr bench` makes the table out of all of them."""

from __future__ import annotations

import dataclasses
import itertools
import time

import pytest
import torch

from bench import memory
from bench.record import Record
from bench.report import Measurement
from bench.rivals import RivalAbsent
from bench.rows import Contestant, Row


class Warm:
    """The inputs of the row whose turn it is, and what its contestants keep; dropped when the next row begins."""

    def __init__(self) -> None:
        self.row: Row | None = None

    def calls(self, row: Row, contestant: Contestant) -> list[tuple]:
        if row is not self.row:
            self.row, self.sets, self.kept = row, [], {}
            self.sets = row.sets()
        if id(contestant) not in self.kept:
            keep = contestant.keep
            self.kept[id(contestant)] = [(*s, keep(*s)) if keep else s for s in self.sets]
            for arguments in self.kept[id(contestant)]:  # compile, allocate, fault the pages in
                contestant.run(*arguments)
        return self.kept[id(contestant)]


warm = Warm()


def test_row(
    benchmark, record: Record, request: pytest.FixtureRequest, key: str, row: Row, contestant: str, sweep: int
) -> None:
    quick = request.config.getoption("quick")
    chosen = row.contestants[contestant]
    benchmark.group = row.name
    found = Measurement(key, row.name, contestant, sweep, None, row.floor(), "")
    try:
        with chosen.settings(row), torch.set_grad_enabled(contestant == "backpropagation"):
            found = dataclasses.replace(found, ceilings=str(torch.get_num_threads()))
            calls = itertools.cycle(warm.calls(row, chosen))
            start = time.perf_counter()
            chosen.run(*next(calls))
            once = time.perf_counter() - start
            fewest = 3 if once < 0.5 else 1  # of a slow rival, which the sweeps repeat
            rounds = int(min(200, max(fewest, (0.05 if quick else 0.2) / once)))
            benchmark.pedantic(chosen.run, setup=lambda: (next(calls), {}), rounds=rounds)
        found = dataclasses.replace(found, seconds=benchmark.stats.stats.median)
        if row.memory and sweep == 0 and not quick:
            found = dataclasses.replace(found, extra_bytes=memory.extra_bytes(key, contestant))
    except Exception as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        found = dataclasses.replace(found, absent=reason if found.seconds is None else "")
        if isinstance(error, RivalAbsent):
            pytest.skip(reason)
        raise
    finally:  # a time that was measured is kept, whatever failed after it
        record.add(found)
    benchmark.extra_info |= dataclasses.asdict(found)
