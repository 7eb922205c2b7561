"""The report of a fine-tuning run: every figure as JSON, the curves, the memory picture, the tuned weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from ulr_kernels.finetune import weights
from ulr_kernels.finetune.job import Job
from ulr_kernels.jobs import checkpoint, plots
from ulr_kernels.jobs.versions import versions

REPORT, CURVES, MEMORY, WEIGHTS = "report.json", "curves.png", "memory.png", "tuned.safetensors"
FILES = (WEIGHTS, REPORT, CURVES, MEMORY)
_SMOOTHED = 50  # points of the curve of the training loss


def write(
    out: Path, job: Job, commands: list[str], evaluations: list[dict[str, Any]], losses: list[float]
) -> list[Path]:
    """Write the report of a finished run; its files, the pictures last.

    Args:
        out: a folder that exists.
        job: the run.
        commands: what the user typed to start and to resume it.
        evaluations: one dict of figures for each, the first before the first step and the last after the last.
        losses: of every step.

    Raises:
        OSError: a file cannot be written; files of that name from before are intact.
    """
    report = figures(job, commands, evaluations)
    weights.save(out / WEIGHTS, job.parameters, job.header.weights, job.step)
    checkpoint.write_atomically(out / REPORT, (json.dumps(report, indent=2) + "\n").encode())
    draw_curves(out / CURVES, report, losses)
    draw_memory(out / MEMORY, report)
    return [out / name for name in FILES]


def figures(job: Job, commands: list[str], evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """All there is to say of a run, as JSON can hold it: times in seconds, memory in MiB, losses in nats.

    `training_seconds` are those of `timed_steps`: all but the steps that a process which was stopped had done since its
    last evaluation. `bytes_sent_per_step` are those of one rank.
    """
    first, last = evaluations[0], evaluations[-1]
    everything = sum(p.numel() * p.element_size() for p in job.model.parameters())
    tuned = sum(p.numel() for p in job.parameters.values())
    return {
        "commands": commands,
        "settings": dataclasses.asdict(job.settings),
        "classes": job.header.settings["classes"],
        "sentences": {name: len(split.ids) for name, split in job.splits.items()},
        "versions": versions(),
        "test_accuracy_before": first["test_accuracy"],
        "test_accuracy": last["test_accuracy"],
        "test_loss_before": first["test_loss"],
        "test_loss": last["test_loss"],
        "timed_steps": last["timed_steps"],
        "training_seconds": last["seconds"],
        f"{job.unit}_per_second": last["met"] / last["seconds"] if last["timed_steps"] else None,
        "ranks": last["ranks"],
        "bytes_sent_per_step": last["bytes_sent"] / last["timed_steps"] if last["timed_steps"] else None,
        "tuned_parameters": tuned,
        "memory": {
            "weights_mib": everything / 2**20,
            "inference_mib": last["inference_memory_mib"],
            "tuning_mib": max(record["memory_mib"] for record in evaluations[1:]),
            # Adam needs an fp32 gradient and two moments beside the weights. Activations kept for the backward come
            # on top.
            "adam_states_mib": 12 * tuned / 2**20,
        },
        "evaluations": evaluations,
    }


def draw_curves(path: Path, report: dict[str, Any], losses: list[float]) -> None:
    """Loss and accuracy over the steps; the test set, looked at twice, as points."""
    figure, axes = plots.figure(1, 2, width=5.2, height=3.8)
    blue, orange = plots.COLOURS[:2]
    evaluations = report["evaluations"]
    steps = [record["step"] for record in evaluations]
    width = max(len(losses) // _SMOOTHED, 1)
    means = torch.tensor(losses[: len(losses) // width * width]).view(-1, width).mean(1).tolist()
    middle = [width * (index + 0.5) for index in range(len(means))]
    axes[0].plot(middle, means, "--", color=blue, label="training, under noise", linewidth=1.4)
    ends = [evaluations[0], evaluations[-1]]
    for axis, name, factor in ((axes[0], "loss", 1), (axes[1], "accuracy", 100)):
        values = [factor * record[f"dev_{name}"] for record in evaluations]
        axis.plot(steps, values, "-o", color=blue, label="development", markersize=3, linewidth=1.8)
        values = [factor * record[f"test_{name}"] for record in ends]
        axis.plot([record["step"] for record in ends], values, "D", color=orange, label="test, before and after")
        axis.set(xlabel="step", title=name.capitalize())
    axes[0].set_ylabel("cross-entropy (nats)")
    axes[1].set_ylabel("accuracy (%)")
    axes[0].legend(frameon=False)
    axes[1].legend(frameon=False)
    settings = report["settings"]
    figure.suptitle(
        f"{Path(settings['model']).name} on {Path(settings['data']).name}: "
        f"{settings['tune']} by {settings['method']}, {report['training_seconds']:,.0f} s"
    )
    plots.save(figure, path)


def draw_memory(path: Path, report: dict[str, Any]) -> None:
    """The memory of tuning beside that of inference, and beside the least that backpropagation would keep."""
    found = report["memory"]
    bars = {
        "weights": found["weights_mib"],
        "inference, measured": found["inference_mib"],
        "tuning, measured": found["tuning_mib"],
    }
    if report["settings"]["tune"] != "head":
        bars["inference + gradient\nand moments of Adam"] = found["inference_mib"] + found["adam_states_mib"]
    figure, axes = plots.figure(1, 1, width=7.2, height=2.8)
    colours = ("#b8b8b8", plots.COLOURS[0], plots.COLOURS[0], plots.COLOURS[1])
    drawn = axes[0].barh(list(bars), list(bars.values()), color=colours[: len(bars)], height=0.6)
    axes[0].bar_label(drawn, fmt="{:,.0f} MiB", padding=4)
    axes[0].invert_yaxis()
    axes[0].grid(False, axis="y")
    axes[0].set(xlabel="MiB of the process", xlim=(0, 1.18 * max(bars.values())))
    axes[0].set_title(f"{report['tuned_parameters']:,} tuned parameters, batches of {report['settings']['batch']}")
    plots.save(figure, path)
