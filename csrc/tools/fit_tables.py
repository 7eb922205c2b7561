"""Fit the inverse-CDF tables of the noise contract and write them for Python and for C++.

    python csrc/tools/fit_tables.py          # rewrites ulr_kernels/noise_tables.py and csrc/include/ulr/tables.h

A word w gives m = (w & 0x7fffffff) | 1. The exponent of float(m) is the octave 0..31, its mantissa the argument
t in [1, 2) of the octave's polynomial for |eps|. Row 31 (m rounded up to 2^31) is the median: zero.
The tables are part of the contract: they are fitted once and committed. Run this again only for a new version.
"""

import hashlib
import pathlib

import numpy as np
from scipy.special import ndtri

DEGREE = 5
OCTAVES = 32
ROOT = pathlib.Path(__file__).resolve().parents[2]


def normal_magnitude(m: np.ndarray) -> np.ndarray:
    return -ndtri(m / 2.0**32)


def laplace_magnitude(m: np.ndarray) -> np.ndarray:
    return -np.log(m / 2.0**31) / np.sqrt(2.0)


def minimax(target, octave: int, fixed: dict[int, float]) -> np.ndarray:
    """Coefficients, lowest first, of the polynomial of least largest error, those in `fixed` held."""
    t = 1.5 - 0.5 * np.cos(np.linspace(0.0, np.pi, 2001))
    goal = target(t * 2.0**octave)
    for power, value in fixed.items():
        goal = goal - value * t**power
    free = [k for k in range(DEGREE + 1) if k not in fixed]
    # Centred powers for conditioning are not possible once some coefficients are held, so scale columns instead.
    design = np.stack([t**k for k in free], axis=1)
    weight = np.ones_like(t)
    best, best_error = np.zeros(len(free)), np.inf
    for _ in range(60):  # Lawson's iteration
        solution = np.linalg.lstsq(design * weight[:, None] ** 0.5, goal * weight**0.5, rcond=None)[0]
        error = np.abs(design @ solution - goal)
        if error.max() < best_error:
            best, best_error = solution, error.max()
        weight = weight * (error + 1e-300)
        weight = weight / weight.sum()
    result = np.zeros(DEGREE + 1)
    result[free] = best
    for power, value in fixed.items():
        result[power] = value
    return result


def fit(target) -> np.ndarray:
    """fp32 coefficients [octave, power]; each is rounded in turn and the rest fitted again around it."""
    table = np.zeros((OCTAVES, DEGREE + 1), dtype=np.float32)
    for octave in range(OCTAVES - 1):
        fixed: dict[int, float] = {}
        for power in range(DEGREE, -1, -1):
            fixed[power] = float(np.float32(minimax(target, octave, fixed)[power]))
        table[octave] = [fixed[k] for k in range(DEGREE + 1)]
    return table


def main() -> None:
    tables = {"NORMAL": fit(normal_magnitude), "LAPLACE": fit(laplace_magnitude)}
    digest = hashlib.sha256(b"".join(tables[n].astype("<f4").tobytes() for n in ("NORMAL", "LAPLACE"))).hexdigest()

    def rows(table: np.ndarray, left: str, right: str) -> str:
        return "".join(
            "    " + left + ", ".join(f"0x{b:08x}" for b in row.view(np.uint32)) + right + ",\n" for row in table
        )

    head = "Written by csrc/tools/fit_tables.py; part of the noise contract, never edited by hand."
    python = f'"""{head}\n\n' + "Row: octave; column: power, lowest first; entry: the bits of a fp32 coefficient.\n"
    python += f'"""\n\nDEGREE = {DEGREE}\nSHA256 = "{digest}"\n'
    for name, table in tables.items():
        python += f"{name} = (\n{rows(table, '(', ')')})\n"
    (ROOT / "ulr_kernels" / "noise_tables.py").write_text(python)

    cpp = f"// {head}\n// Row: octave; column: power, lowest first; entry: the bits of a fp32 coefficient.\n"
    cpp += "#pragma once\n\n#include <stdint.h>\n\n// clang-format off\n"
    cpp += f'#define ULR_TABLE_SHA256 "{digest}"\n#define ULR_TABLE_DEGREE {DEGREE}\n'
    for name, table in tables.items():
        body = rows(table, "{", "}")
        cpp += f"#define ULR_{name}_TABLE \\\n" + " \\\n".join(body.rstrip("\n").split("\n")) + "\n"
    (ROOT / "csrc" / "include" / "ulr" / "tables.h").write_text(cpp + "// clang-format on\n")


if __name__ == "__main__":
    main()
