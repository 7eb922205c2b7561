"""A run's report: `report.json` with every figure, two pictures, and the weights."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from ulr_kernels.jobs import checkpoint, plots
from ulr_kernels.jobs.versions import versions

REPORT, CURVES, COSINES, WEIGHTS = "report.json", "curves.png", "cosines.png", "model.safetensors"
FILES = (WEIGHTS, REPORT, CURVES, COSINES)
_MAX_COLUMNS = 4  # of small pictures in a row


def write(out: Path, report: dict[str, Any], model: nn.Module) -> list[Path]:
    """Write the report of a finished run; its files, the pictures last.

    Args:
        out: a folder that exists.
        report: as `figures` makes it.
        model: the trained model.

    Raises:
        OSError: a file cannot be written; files of that name from before are intact.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    written = [out / WEIGHTS, out / REPORT, out / CURVES]
    checkpoint.write_atomically(out / WEIGHTS, safetensors.torch.save(weights, {"format": "pt"}))
    checkpoint.write_atomically(out / REPORT, (json.dumps(report, indent=2) + "\n").encode())
    draw_curves(out / CURVES, [report])
    if report["settings"]["method"] == "ulr":
        draw_cosines(out / COSINES, report)
        written.append(out / COSINES)
    return written


def figures(settings: dict[str, Any], history: list[dict[str, Any]], commands: list[str]) -> dict[str, Any]:
    """All there is to say of a run, as JSON can hold it: times in seconds, memory in MiB, losses in nats."""
    last, seconds = history[-1], sum(record["seconds"] for record in history)
    samples = sum(record["seconds"] * record["samples_per_second"] for record in history)
    return {
        "commands": commands,
        "settings": settings,
        "versions": versions(),
        "test_accuracy": last["test_accuracy"],
        "test_loss": last["test_loss"],
        "train_accuracy": last["train_accuracy"],
        "train_loss": last["train_loss"],
        "training_seconds": seconds,
        "samples_per_second": samples / seconds,
        "peak_memory_mib": max(record["peak_memory_mib"] for record in history),
        "training_memory_mib": max(record["training_memory_mib"] for record in history),
        "history": history,
    }


def title(report: dict[str, Any]) -> str:
    """The method in words."""
    return {"ulr": "likelihood ratio", "bp": "backpropagation"}[report["settings"]["method"]]


def draw_curves(path: Path, reports: Sequence[dict[str, Any]]) -> None:
    """Loss and accuracy over the epochs, train dashed and test solid, one colour per run."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = plots.figure(1, 2, width=5.2, height=3.8)
    for report, colour in zip(reports, plots.COLOURS, strict=False):
        epochs = [record["epoch"] for record in report["history"]]
        marker = "o" if len(epochs) < 3 else None
        for axis, name, factor in ((axes[0], "loss", 1), (axes[1], "accuracy", 100)):
            for split, line in (("train", "--"), ("test", "-")):
                values = [factor * record[f"{split}_{name}"] for record in report["history"]]
                label = f"{title(report)}, {split}"
                axis.plot(epochs, values, line, color=colour, label=label, marker=marker, linewidth=1.8)
    axes[0].set(xlabel="epoch", ylabel="cross-entropy (nats)", title="Loss", yscale="log")
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[1].set(xlabel="epoch", ylabel="accuracy (%)", title="Accuracy")
    for axis in axes:
        axis.set_xlim(0.5, max(len(report["history"]) for report in reports) + 0.5)
    axes[1].legend(frameon=False, loc="lower right")
    settings = reports[0]["settings"]
    figure.suptitle(f"{settings['model']} on {Path(settings['data']).name}")
    plots.save(figure, path)


def draw_cosines(path: Path, report: dict[str, Any]) -> None:
    """The cosine of estimate and truth over the epochs, one small picture per layer, next to the law."""
    history, copies = report["history"], report["settings"]["copies"]
    layers = list(history[0]["cosines"])
    columns = min(len(layers), _MAX_COLUMNS)
    figure, axes = plots.figure(math.ceil(len(layers) / columns), columns, width=3.6, height=3.3, sharey=True)
    epochs = [record["epoch"] for record in history]
    marker = "o" if len(epochs) < 3 else None
    for index, (layer, axis) in enumerate(zip(layers, axes, strict=False)):
        values = [record["cosines"][layer] for record in history]
        measured, error, law = ([value[name] for value in values] for name in ("cosine", "cosine_error", "law"))
        axis.errorbar(epochs, measured, error, fmt="o", markersize=4, color=plots.COLOURS[0], label="measured")
        axis.plot(epochs, law, "-", marker=marker, color=plots.COLOURS[1], label="expected from copies and coordinates")
        axis.set_title(f"layer {layer}, {copies[layer] if isinstance(copies, dict) else copies} copies")
        axis.set(xlim=(0.5, len(epochs) + 0.5), ylim=(0, 1.02))
        if index >= len(layers) - columns:
            axis.set_xlabel("epoch")
        if index % columns == 0:
            axis.set_ylabel("cosine to the true gradient")
    for axis in axes[len(layers) :]:
        axis.set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=3)
    plots.save(figure, path)
