"""The facts that a result states about its machine, and the machine's ceilings, measured in the same run."""

from __future__ import annotations

import itertools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench import rivals, rows
from bench.rows import noise
from bench.rows.row import key_of, normal
from ulr_kernels import dispatch, products

ROOT = Path(__file__).parents[1]


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def commit() -> str:
    """The commit, with a mark where the sources differ from it; ULR_COMMIT names it where there is no repository."""
    if _output("git", "rev-parse", "--short", "HEAD") == "unknown":
        return os.environ.get("ULR_COMMIT", "unknown")
    return _output("git", "describe", "--always", "--dirty", "--abbrev=10")


def _cpu() -> str:
    """Its name, family and model: a virtual machine's name is that of generations that differ by a factor of two."""
    lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
    known = {name.strip(): value.strip() for name, _, value in lines}
    name = known.get("model name", platform.processor())
    generation = f" (family {known['cpu family']}, model {known['model']})" if "cpu family" in known else ""
    return f"{name}{generation}, {len(os.sched_getaffinity(0))} cores"


def facts(device: str) -> dict:
    """Device, driver, versions, commit and the back end that each op would use."""
    result = {
        "device": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "backends": {op: _chosen(op, device) for op in dispatch.op_names()},
    }
    if device == "cuda":
        result |= {
            "device": torch.cuda.get_device_name(),
            "host": _cpu(),
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return result


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "absent"
    return triton.__version__


def _chosen(op: str, device: str) -> str:
    return next(n for n in dispatch.ORDER[device] if not isinstance(dispatch.find(n, op, device), str))


def median_seconds(run: Callable[[int], object], budget: float = 0.3) -> float:
    """The median of calls run(0), run(1), ... for about `budget` seconds; CPU."""
    run(0)
    times: list[float] = []
    for i in itertools.count():
        start = time.perf_counter()
        run(i)
        times.append(time.perf_counter() - start)
        if sum(times) > budget and len(times) >= 5:
            return statistics.median(times)
    raise AssertionError


def cpu_ceilings() -> dict[str, dict[str, Any]]:
    """By number of threads, those of every row: bytes/s of a copy or a fill, operations/s of torch's products, noise
    values/s.

    A multiply-add is two operations.
    The noise rate is the library's own fill of a buffer that stays in the cache: what the kernel takes where nothing
    else does. Keys are strings, as in the JSON that this goes into.
    """
    before, result = torch.get_num_threads(), {}
    source, target = torch.ones(2**24), torch.empty(2**24)
    square = normal(0, 1024, 1024, device="cpu")
    bias, key, out = torch.zeros(1024), key_of(0, "cpu"), torch.empty(256, 1024)
    for threads in sorted({make().threads or before for make in rows.cpu_rows().values()}):
        torch.set_num_threads(threads)
        ceilings = {
            "overlap": False,
            "bytes": max(
                2 * 4 * source.numel() / median_seconds(lambda i: target.copy_(source)),
                4 * source.numel() / median_seconds(lambda i: target.fill_(i)),
            ),
        }
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            a, b = square.to(dtype), bias.to(dtype)
            rivals_here = [F.linear] + [rivals.onednn_linear] * products.supports(dtype)
            seconds = min(median_seconds(lambda i, f=f, a=a, b=b: f(a, a, b)) for f in rivals_here)
            ceilings[f"flops {kind}"] = 2 * 1024**3 / seconds
        for dist in ("normal", "laplace", "rademacher"):
            seconds = median_seconds(lambda i, dist=dist: noise.fill(out, key, dist), 0.1)
            ceilings[dist] = out.numel() / seconds
        result[str(threads)] = ceilings
    torch.set_num_threads(before)
    return result
