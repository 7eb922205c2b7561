"""The tile sizes that Python knows are those of the CUDA sources."""

from __future__ import annotations

import pathlib
import re

from ulr_kernels.backends.cuda import tiles

CUDA = pathlib.Path(__file__).parents[1] / "csrc" / "cuda"
SOURCES = {
    "GRADIENT_FEATURES": ("gradient_problem.cuh", "kGradFeatures"),
    "GRADIENT_PANEL": ("gradient_problem.cuh", "kPanel"),
    "GRADIENT_ROWS": ("gradient_problem.cuh", "kGradRows"),
    "CONV_FEATURES": ("conv.cuh", "kFeatures"),
    "SCALE_SHIFT_COLUMNS": ("scale_shift_grad_.cu", "kColumns"),
    "SCALE_SHIFT_ROWS": ("scale_shift_grad_.cu", "kSlots"),
}


def constant(source: str, name: str) -> int:
    """The value of a `constexpr int`, which others of its source may define."""
    declarations = re.findall(r"constexpr int ([^;]*);", (CUDA / source).read_text())
    values = dict(re.findall(r"(\w+) = ([^,]+)", ",".join(declarations)))

    def value(expression: str) -> int:
        return eval(re.sub(r"\bk\w+", lambda found: str(value(values[found[0]])), expression).replace("/", "//"))

    return value(values[name])


def test_every_tile_size_is_that_of_its_source() -> None:
    here = {name: size for name, size in vars(tiles).items() if name.isupper()}
    assert here == {name: constant(*place) for name, place in SOURCES.items()}
    assert constant("forward.cuh", "kRows") == constant("linear.cuh", "kFeatures") == 128  # of bench/model.py
