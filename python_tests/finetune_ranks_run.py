"""The ranks of test_finetune_ranks.py: python finetune_ranks_run.py FILES OUT, under torchrun's variables."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ulr_kernels.finetune import ranks, runs
from ulr_kernels.finetune.settings import Settings
from ulr_kernels.jobs import JobError
from ulr_kernels.optim import WorkerError

QUICK = {"threads": 1, "steps": 6, "evaluations": 2, "batch": 8, "probes": 4, "max_tokens": 32}
# Of each: the model, settings, and the losses that a rank sends in a step.
SHARED: dict[str, tuple[str, dict[str, Any], int]] = {
    "batches": ("encoder", {"tune": "all", "method": "mezo", "micro_batches": 2, "chunk": 4}, 8),
    "population": ("encoder", {"tune": "lora", "method": "eggroll", "chunk": 2}, 2),
    "probes": ("causal", {"tune": "all", "method": "fzoo", "dtype": "bf16", "micro_batches": 1, "chunk": 2}, 4),
    "both": ("causal", {"tune": "all", "method": "mezo", "batch": 6, "micro_batches": 3, "chunk": 2}, 12),
    "features": ("causal", {"tune": "head", "method": "mezo", "micro_batches": 4, "batch": 16}, 16),
}
# Settings of rank 0 and rank 1 that the run refuses.
REFUSED = {
    "idle": ({"tune": "head", "chunk": 8}, {"tune": "head", "chunk": 8}),
    "unlike": ({"tune": "all", "lr": 0.1}, {"tune": "all", "lr": 0.2}),
}


def settings(files: Path, model: str, options: dict[str, Any]) -> Settings:
    return Settings(**{"data": str(files / "set"), "model": str(files / model), **QUICK, **options})


def main(files: Path, out: Path) -> None:
    with ranks.joined(60) as shared:
        for name, (model, options, _) in SHARED.items():
            runs.start(settings(files, model, options), out / name, "", shared=shared)
        for name, wanted in REFUSED.items():
            try:
                runs.start(settings(files, "encoder", wanted[dist.get_rank()]), out / name, "", shared=shared)
            except (JobError, WorkerError) as error:
                print(error, file=sys.stderr)
    # A thread of the group that is left can abort the process when it ends.
    assert not [task for task in Path("/proc/self/task").glob("*/comm") if "gloo" in task.read_text()]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
