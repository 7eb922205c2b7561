"""Pictures of reports: drawn without a display, in one style, written whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ulr_kernels.jobs import checkpoint

COLOURS = ("#1f5fa8", "#d1662b", "#3b8f5a", "#8a4fa3", "#9b7d1f")


def figure(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """A figure that needs no display and leaves matplotlib's global state alone, and its axes in a flat list."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **options).flatten()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#dddddd", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.title.set_fontsize("medium")
    return figure, axes


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG.

    Raises:
        OSError: the file cannot be written; one of that name from before is intact.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=140)
    checkpoint.write_atomically(path, picture.getvalue())
