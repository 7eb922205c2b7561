"""The time of one call of a native library, by the pybind11 module `_C` and by ctypes, in turn in one process.

    python -m bench.calls        prints medians in microseconds

The kernels' own time is small: they make two numbers of noise, or add one product of a layer with two features.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

import ulr_kernels as ulr
from ulr_kernels.backends import _abi, _native
from ulr_kernels.ops._op import NoiseSpec

ROUNDS, CALLS = 101, 200


def microseconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - begin) / CALLS * 1e6


def use(launch: Callable[..., int]) -> None:
    _abi.launch = launch
    _native.launcher.cache_clear()


def main() -> None:
    if _abi.launch is _abi.launch_by_ctypes:
        raise SystemExit(f"there is only one way here: {_abi.CALLS_BY}")
    ways = {"pybind11": _abi.launch, "ctypes": _abi.launch_by_ctypes}
    torch.set_num_threads(1)
    key = torch.tensor(7)
    out, weight, sigma = torch.empty(1, 2), torch.eye(2), torch.tensor(0.5)
    noise = _native.noise_view(NoiseSpec(key), 2)
    views = _native.views((out,))
    rows: dict[str, Callable[[], object]] = {
        "the call alone": lambda: _native.launcher("cpp", "noise")(noise, views),
        "ulr.ops.noise": lambda: ulr.ops.noise((1, 2), key),
        "ulr.ops.noisy_linear": lambda: ulr.ops.noisy_linear(out, weight, None, sigma, key),
    }
    with ulr.use_backend("cpp"):
        for name, call in rows.items():
            times: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(ROUNDS):
                for way, launch in ways.items():
                    use(launch)
                    call()
                    times[way].append(microseconds(call))
            medians = ", ".join(f"{way} {statistics.median(seen):.2f} us" for way, seen in times.items())
            print(f"{name:<22} {medians}")


if __name__ == "__main__":
    main()
