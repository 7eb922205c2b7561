"""Peak extra memory of a contestant: how far one call raises the peak of its own process above what that held before.

    python -m bench.memory ROW CONTESTANT    prints the number of bytes

The call is made twice: the first loads code, compiles and starts threads, the second counts. The allocator
gives every larger block back to the system at once, so nothing that the first call freed hides memory of the second.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "32768", "MALLOC_TOP_PAD_": "0"}


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def _measure(key: str, name: str) -> int:
    import torch

    from bench.rows import cpu_rows

    row = cpu_rows()[key]()
    contestant = row.contestants[name]
    inputs = row.inputs(0)

    def call() -> None:
        kept = (contestant.keep(*inputs),) if contestant.keep else ()
        contestant.run(*inputs, *kept)

    with contestant.settings(row), torch.set_grad_enabled(name == "backpropagation"):
        call()
        gc.collect()
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # sets the recorded peak back to what is held now
        call()
        return max(0, _status("VmHWM") - before)


def extra_bytes(key: str, name: str) -> int | None:
    """Bytes, measured in a process of its own; None where the system does not keep the peak as Linux does."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", "bench.memory", key, name]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | GIVE_BACK, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    print(_measure(*sys.argv[1:]))
