"""The parts of `bench/gpu.sh`: `python -m bench.gpu_bench facts | rows | samples | tiles`.

    facts      one line of JSON: device, driver, versions, commit
    rows       times the GPU's rows; OUT/gpu.{json,csv,txt} are written anew after each row; `--rows table` those of
               README's table, `rest` the others; `--go-on` takes those that are left when a row has ended its process
    samples    runs every op's samples once, for compute-sanitizer to watch; `--check`: beside the torch back end, in
               many processes, because kernels compile on the host; OUT/samples.json has each op's largest error
    tiles      times candidate tiles of the Triton kernels; OUT/tiles.json is written anew after each

`--device cpu --small` runs the same code without a GPU (Triton under TRITON_INTERPRET=1), to check the script.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import ulr_kernels as ulr
from bench import machine, report, rows
from bench.probes import probes
from bench.rows import conv, linear, noise
from bench.rows.row import key_of, normal
from ulr_kernels import dispatch
from ulr_kernels.backends.triton import tiles
from ulr_kernels.backends.triton.tiles import Tile
from ulr_kernels.ops._op import OPS

sys.path.insert(0, str(Path(__file__).parents[1] / "python_tests"))

from samples import Sample, samples_of  # noqa: E402

SWEEPS = 5
ROW_SECONDS = 120  # far more than any row takes with all that it compiles
_SPAWN = multiprocessing.get_context("spawn")  # a forked process has no CUDA
LOST = 75  # exit code: rows are left, and another process can take them


def times(run: Callable, calls: Iterator[tuple], count: int, device: str) -> list[float]:
    """Seconds of each of `count` calls: between two events on a GPU, by the clock on a CPU."""
    result = []
    if device == "cpu":
        for _ in range(count):
            start = time.perf_counter()
            run(*next(calls))
            result.append(time.perf_counter() - start)
        return result
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start_event, end_event in events:
        arguments = next(calls)
        start_event.record()
        run(*arguments)
        end_event.record()
    torch.cuda.synchronize()
    return [start_event.elapsed_time(end_event) / 1e3 for start_event, end_event in events]


def median(run: Callable, calls: Iterator[tuple], device: str) -> float:
    """The median of calls that fill about 30 ms, after as many as it takes to compile and warm up."""
    once = min(times(run, calls, 3, device))
    return statistics.median(times(run, calls, int(min(50, max(5, 0.03 / once))), device))


def extra_bytes(run: Callable[[], object], device: str) -> int | None:
    """Peak device memory of a call above what was held before it; outputs count."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(key: str, row: rows.Row, device: str) -> Iterator[report.Measurement]:
    """A row's contestants in turn, sweep by sweep, as on the CPU. One that cannot run is named, and left out.

    Raises:
        RuntimeError: (after the others have been measured) one of ours cannot run.
    """
    sets, calls, held = row.sets(), {}, {}
    ours: list[str] = []  # that cannot run
    for name, contestant in row.contestants.items():
        keep = contestant.keep
        try:
            with contestant.settings(row), torch.set_grad_enabled(name == "backpropagation"):
                kept = [(*s, keep(*s)) if keep else s for s in sets]
                contestant.run(*kept[0])
                if row.memory:
                    held[name] = extra_bytes(
                        lambda c=contestant, k=keep: c.run(*sets[0], *([k(*sets[0])] if k else [])), device
                    )
            calls[name] = itertools.cycle(kept)
        except Exception as error:
            if report.is_ours(name):
                ours.append(name)
                traceback.print_exc()
            print(f"{row.name}: {name} cannot run: {(str(error) or repr(error)).splitlines()[0]}", flush=True)
    for sweep, (name, arguments) in itertools.product(range(SWEEPS), calls.items()):
        contestant = row.contestants[name]
        with contestant.settings(row), torch.set_grad_enabled(name == "backpropagation"):
            seconds = median(contestant.run, arguments, device)
        yield report.Measurement(key, row.name, name, sweep, seconds, row.floor(), device, held.get(name))
    if ours:
        raise RuntimeError(f"{row.name}: {', '.join(ours)} cannot run")


def ceilings(device: str, small: bool, names: tuple[str, ...]) -> dict[str, Any]:
    """Bytes/s of a copy, operations/s of plain products, noise values/s into a buffer that fits the cache, by the first
    back end that is here."""
    size, side = (2**16, 128) if small else (2**28, 8192)
    source, target = torch.ones(size, device=device), torch.empty(size, device=device)
    result = {"overlap": True, "bytes": 8 * size / median(target.copy_, itertools.repeat((source,)), device)}
    for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = normal(0, side, side, device=device).to(dtype)
        result[f"flops {kind}"] = 2 * side**3 / median(torch.mm, itertools.repeat((a, a)), device)
    out, key = torch.empty(size >> 6, device=device).view(-1, 1024), key_of(0, device)
    with ulr.use_backend(next(name for name in names if not isinstance(dispatch.find(name, "noise", device), str))):
        for dist in ("normal", "laplace", "rademacher"):
            result[dist] = out.numel() / median(noise.fill, itertools.repeat((out, key, dist)), device)
    return result


def lost(device: str) -> bool:
    """Whether a kernel has ended the device for this process: every call from then on fails with the same error."""
    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(str(error).splitlines()[0], flush=True)
        return True
    return False


def run_rows(options: argparse.Namespace) -> None:
    """The table of the GPU's rows. fp32 is fp32 for all: cuDNN's convolutions are taken out of TF32, their default.

    A kernel that never ends or that loses the device takes the process with it, not the rows after it: what has been
    done is in OUT/gpu.part before each row begins, and after the exit code LOST a new process goes on.
    """
    device, small, part = options.device, options.small, options.out / "gpu.part"
    torch.backends.cudnn.allow_tf32 = False
    facts = machine.facts(device)
    if options.go_on:
        done = json.loads(part.read_text())
    else:
        done = {"ceilings": {device: ceilings(device, small, options.backends)}, "begun": 0, "failed": [], "found": []}
    found = [report.Measurement(**measurement) for measurement in done["found"]]

    def probe() -> None:
        done["ceilings"][device] |= probes(device, small, lambda run: median(run, itertools.repeat(()), device))

    def measured(key: str, make: Callable[[], rows.Row]) -> None:
        found.extend(measure(f"gpu-{key}", make(), device))

    def keep() -> None:
        lines = list(report.lines(found, done["ceilings"]))
        if lines:
            report.write(options.out, "gpu", lines, {"ulr": facts, "ceilings": done["ceilings"]})
        part.write_text(json.dumps(done | {"found": [dataclasses.asdict(each) for each in found]}))

    def give_up(key: str, why: str) -> None:
        print(f"{key}: {why}; a new process must go on", flush=True)
        done["failed"].append(key)
        try:
            keep()
        finally:
            os._exit(LOST)  # what waits for the device would not let go

    options.out.mkdir(parents=True, exist_ok=True)
    steps = {"probes": probe} if "triton" in options.backends else {}
    makers = rows.gpu_rows(options.backends, small, device)
    if options.rows != "all":
        makers = {key: make for key, make in makers.items() if (key in rows.GPU_TABLE) == (options.rows == "table")}
    steps |= {key: functools.partial(measured, key, make) for key, make in makers.items()}
    for key, step in list(steps.items())[done["begun"] :]:
        done["begun"] += 1
        keep()
        watch = threading.Timer(ROW_SECONDS, give_up, (key, f"no end after {ROW_SECONDS} s"))
        watch.start()
        try:
            step()
        except Exception:  # the rows after it may still tell something
            done["failed"].append(key)
            traceback.print_exc()
        finally:
            watch.cancel()
        if lost(device):
            give_up(key, "the device is lost")
    keep()
    print(report.table(list(report.lines(found, done["ceilings"]))))
    if done["failed"]:
        raise SystemExit(f"failed rows: {', '.join(done['failed'])}")


# Largest error relative to the largest value of the reference's result: products of bf16 and fp16 are rounded once.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def call(op: str, sample: Sample, backend: str) -> list[Tensor]:
    """The tensors that a call of a sample returns, and those that it was given, as it left them."""
    args, kwargs = tree_map_only(Tensor, lambda t: t.clone(), (sample.args, sample.kwargs))
    with ulr.use_backend(backend):
        result = OPS[op].function(*args, **kwargs)
    return [t.double().cpu() for t in tree_leaves((result, args, kwargs)) if isinstance(t, Tensor)]


def error_of(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of any tensor, relative to its largest finite value; infinite where a value is not a number."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if b.numel():
            scale = b.nan_to_num(0.0, 0.0, 0.0).abs().amax().clamp_min(1e-30)
            error = torch.where(a == b, 0.0, (a - b).abs() / scale).nan_to_num(math.inf)
            worst = max(worst, error.amax().item())
    return worst


def run_op(backend: str, op: str, dtype: torch.dtype, device: str, check: bool) -> dict[str, Any]:
    """All good samples of an op on a back end; with `check` the largest error beside the torch back end."""
    entry: dict[str, Any] = {"backend": backend, "op": op, "dtype": str(dtype), "samples": 0, "failed": []}
    start, worst = time.perf_counter(), 0.0
    absent = dispatch.find(backend, op, device)
    if isinstance(absent, str):
        return entry | {"absent": absent, "error": 0.0, "seconds": 0.0}
    for sample in samples_of(op, device, dtype):
        if sample.error is not None:
            continue
        try:
            found = call(op, sample, backend)
            error = error_of(found, call(op, sample, "torch")) if check else 0.0
            if error > TOLERANCE[dtype]:
                entry["failed"].append(f"{sample.id}: relative error {error:.1e}, more than {TOLERANCE[dtype]:.0e}")
            worst = max(worst, error)
            entry["samples"] += 1
        except Exception as failure:
            entry["failed"].append(f"{sample.id}: {(str(failure) or repr(failure)).splitlines()[0]}")
    return entry | {"error": worst, "seconds": time.perf_counter() - start}


def run_samples(options: argparse.Namespace) -> None:
    """Every good sample of every op, on each back end. What fails does not keep the others from running."""
    dtypes = (torch.float32, torch.bfloat16)
    todo = [
        (backend, op, dtype, options.device, options.check)
        for backend, op, dtype in itertools.product(options.backends, OPS, dtypes)
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    facts, entries = machine.facts(options.device), list[dict[str, Any]]()
    with contextlib.ExitStack() as stack:
        if options.workers > 1:
            pool = stack.enter_context(concurrent.futures.ProcessPoolExecutor(options.workers, _SPAWN))
            waiting = [pool.submit(run_op, *each) for each in todo]
            finished: Iterator[dict] = (each.result() for each in concurrent.futures.as_completed(waiting))
        else:
            finished = (run_op(*each) for each in todo)
        for entry in finished:
            entries.append(entry)
            error = f", error {entry['error']:.1e}" if options.check else ""
            print("{backend} {op} {dtype}: {samples} samples{0}, {seconds:.1f} s".format(error, **entry), flush=True)
            if "absent" in entry:
                print(f"  absent: {entry['absent']}", flush=True)
            for line in entry["failed"]:
                print(f"  FAILED {line}", flush=True)
            content = {"ulr": facts, "samples": entries}
            (options.out / "samples.json").write_text(json.dumps(content, indent=1) + "\n")
    failed = [f"{e['backend']} {e['op']} {e['dtype']}" for e in entries if e["failed"]]
    failed += [
        f"{name} (absent)"
        for name in options.backends
        if not any(e["samples"] for e in entries if e["backend"] == name)
    ]
    if failed:
        raise SystemExit(f"failed samples: {', '.join(failed)}")


# --- tiles -----------------------------------------------------------------------------------------------------------


def candidates(table: dict, key: Any) -> list[Tile]:
    """The tile in use, then others, the likelier first: neighbours that change one size, then two.

    Noise beyond 32 values a thread cannot stay in registers.
    """
    used = table[key]
    choices = {
        "rows": (32, 64, 128),
        "cols": (64, 128),
        "inputs": (32, 64, 128),
        "warps": (4, 8),
        "stages": (1, 2, 3, 4),
    }
    if table is tiles.NOISE:
        choices |= {"rows": (8, 16, 32, 64), "cols": (64, 128, 256), "inputs": (0,), "stages": (1,)}
    if any(table is gradients for gradients in (tiles.GRADIENT, tiles.CONV_GRADIENT)):
        choices["stages"] = (1, 2)
    found = {used: 0}
    for sizes in itertools.product(*choices.values()):
        tile = Tile(*sizes)
        changes = sum(a != b for a, b in zip(tile, used, strict=True))
        dist = key if table is tiles.NOISE else key[0]
        fits = tile.rows * tile.cols <= 32 * 32 * tile.warps and not (dist == "rademacher" and tile.cols % 128)
        if changes <= 2 and fits:
            found.setdefault(tile, changes)
    return sorted(found, key=lambda tile: found[tile])


def searches(device: str, small: bool) -> Iterator[tuple[str, dict, Any, rows.Row]]:
    size, side, copies = (2**14, 64, 4) if small else (2**27, 2048, 32)
    triton = ("triton",)
    for dist in ("normal", "rademacher"):
        yield "NOISE", tiles.NOISE, dist, noise.noise_row(dist, size, device, names=triton)
    for dtype in (torch.bfloat16, torch.float32):
        forward = linear.linear_row(2 * side, side, side, 1, dtype, device, names=triton)
        gradient = linear.gradient_row(side // 2, side // 2, side, copies, dtype, device, triton)
        yield "FORWARD", tiles.FORWARD, ("normal", dtype.itemsize), forward
        yield "GRADIENT", tiles.GRADIENT, ("normal", dtype.itemsize), gradient
        sizes, images = ((4, 16, 8, 16), 4) if small else ((64, 128, 32, 128), 16)
        convolution = conv.conv_row(sizes, images, dtype, device, triton)
        conv_gradient = conv.conv_gradient_row(sizes, images, dtype, device, triton)
        yield "CONV", tiles.CONV, ("normal", dtype.itemsize), convolution
        yield "CONV_GRADIENT", tiles.CONV_GRADIENT, ("normal", dtype.itemsize), conv_gradient


def chosen(results: list[dict]) -> list[dict]:
    """Of each table's key the fastest tile so far, beside the time of the one in use: what tiles.py should hold."""
    best: dict[tuple[str, str], dict] = {}
    used: dict[tuple[str, str], float] = {}
    for entry in filter(lambda e: "seconds" in e, results):
        key = entry["table"], entry["key"]
        if entry["used"]:
            used[key] = entry["seconds"]
        if _seconds(entry) < _seconds(best.get(key, {})):
            best[key] = entry
    return [entry | {"seconds in use": used.get(key)} for key, entry in best.items()]


def run_tiles(options: argparse.Namespace) -> None:
    """Time the candidates in turn; the time that is given is shared evenly by the searches."""
    results: list[dict] = []
    facts = machine.facts(options.device)
    todo = list(searches(options.device, options.small))
    share = options.seconds / len(todo)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, table, key, row in todo:
        used, end, sets = table[key], time.monotonic() + share, row.sets()
        for tile in candidates(table, key):
            if time.monotonic() > end:
                break
            table[key] = tile
            entry = {"table": name, "key": str(key), "row": row.name, "tile": tile._asdict(), "used": tile == used}
            contestant = row.contestants["ulr triton"]
            try:
                with contestant.settings(row), torch.no_grad():
                    entry["seconds"] = median(contestant.run, itertools.cycle(sets), options.device)
            except Exception as error:  # a tile that does not fit the device is a result
                entry["error"] = (str(error) or repr(error)).splitlines()[0][:200]
            results.append(entry)
            content = {"ulr": facts, "chosen": chosen(results), "tiles": results}
            (options.out / "tiles.json").write_text(json.dumps(content, indent=1) + "\n")
            if "error" in entry and lost(options.device):  # the tiles that are left would all be blamed
                table[key] = used
                raise SystemExit(f"{name} {key}: {tile} has lost the device")
        table[key] = used
        timed = sorted(
            (e for e in results if e["table"] == name and e["key"] == str(key) and "seconds" in e), key=_seconds
        )
        for entry in timed[:3]:
            print(
                f"{name} {key}: {entry['seconds'] * 1e6:.1f} us {entry['tile']}{' (in use)' * entry['used']}",
                flush=True,
            )


def _seconds(entry: dict) -> float:
    return entry.get("seconds", math.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("facts", "rows", "samples", "tiles"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--backends", default="cuda,triton", type=lambda text: tuple(text.split(",")))
    parser.add_argument("--small", action="store_true", help="tiny sizes: checks the script, measures nothing")
    parser.add_argument("--rows", default="all", choices=("all", "table", "rest"))
    parser.add_argument("--check", action="store_true", help="samples: compare with the torch back end")
    parser.add_argument("--workers", default=1, type=int, help="samples: processes")
    parser.add_argument("--go-on", action="store_true", help="rows: those that are left, into the same OUT")
    parser.add_argument("--seconds", default=150.0, type=float, help="of the search for tiles")
    parser.add_argument("--out", default=Path("build/gpu"), type=Path)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device")
    if options.part == "facts":
        print(json.dumps(machine.facts(options.device)))
    else:
        {"rows": run_rows, "samples": run_samples, "tiles": run_tiles}[options.part](options)


if __name__ == "__main__":
    main()
