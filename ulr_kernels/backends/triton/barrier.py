"""A kernel in phases, each of which reads what all programs wrote in the one before."""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from ulr_kernels.backends.triton.launch import Launch


@triton.jit
def wait_for_all(arrived):
    """A barrier of the whole grid: returns when every program has come here. `arrived` counts them, from 0.

    All programs must run at once, which a cooperative launch sees to.
    """
    tl.debug_barrier()  # the stores of all of the program's threads come before its arrival
    count = tl.atomic_add(arrived, 1, sem="acq_rel") + 1
    while count < tl.num_programs(0):
        count = tl.atomic_add(arrived, 0, sem="acq_rel")
    tl.debug_barrier()


@triton.jit
def leave(tickets, BARRIERS: tl.constexpr):
    """Sets the counters of the barriers, and the one behind them, to 0 again once all programs are past them."""
    if tl.atomic_add(tickets + BARRIERS, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        for i in tl.static_range(BARRIERS + 1):
            tl.store(tickets + i, 0)


def programs(device: torch.device) -> int:
    """How many there may be: one for each multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def run_phases(launch: Launch, phases: int) -> None:
    """One cooperative launch, whose PHASE is None; the interpreter, which runs one program after another, takes a
    launch for each phase."""
    if triton.knobs.runtime.interpret:
        for phase in range(phases):
            dataclasses.replace(launch, arguments={**launch.arguments, "PHASE": phase}, cooperative=False).run()
    else:
        launch.run()
