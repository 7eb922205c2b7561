"""Tile sizes, kept apart from the kernels as data: they change speed, never noise.

A tile of Rademacher noise has a multiple of 128 columns (one call of Philox makes 128 signs). With more
than 16 normals a thread (rows * cols / (32 * warps)) registers spill; python_tests/test_triton.py holds spills at none.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """rows and cols of noise; inputs: the extent along K, of a step of the forward or of a gradient's output tile."""

    rows: int
    cols: int
    inputs: int
    warps: int
    stages: int


def _by_dist(normal: Tile, signs: Tile) -> dict[str, Tile]:
    return {"normal": normal, "laplace": normal, "rademacher": signs}


def _by_size(*tables: dict[str, Tile]) -> dict[tuple[str, int], Tile]:
    """By distribution and bytes of an element, from tables for 2 and, where given, 4 bytes."""
    return {(dist, size): tile for size, table in zip((2, 4), tables, strict=False) for dist, tile in table.items()}


NOISE = _by_dist(Tile(32, 64, 0, 4, 1), Tile(64, 128, 0, 8, 1))
# Scores: nothing is read for an element, which leaves registers for more signs a thread.
SCORES = NOISE | {"rademacher": Tile(64, 128, 0, 4, 1)}
# Parameters, updated in place or gathered: their elements and states take registers beside the noise.
PARAMETERS = _by_dist(Tile(32, 64, 0, 8, 1), Tile(32, 128, 0, 8, 1))

# Products of fp32 run without tensor cores, in small tiles.
FORWARD = _by_size(
    _by_dist(Tile(64, 64, 64, 8, 3), Tile(64, 128, 64, 8, 3)),
    _by_dist(Tile(64, 64, 32, 8, 2), Tile(32, 128, 32, 8, 2)),
)
# For gradients whose draws are summed before one product.
GRADIENT = _by_size(
    _by_dist(Tile(64, 64, 128, 8, 1), Tile(64, 128, 64, 8, 1)),
    _by_dist(Tile(32, 64, 64, 8, 1), Tile(32, 128, 32, 8, 1)),
)
# For gradients with a product for each draw (copies that do not share x), or with outputs (recompute).
GRADIENT_PER_DRAW = _by_size(
    _by_dist(Tile(32, 64, 64, 8, 1), Tile(32, 128, 64, 8, 1)),
    _by_dist(Tile(32, 64, 16, 8, 1), Tile(32, 128, 32, 8, 1)),
)
# For a table of layers, whose entries take registers too.
GRADIENTS = GRADIENT | {("rademacher", 2): Tile(32, 128, 64, 8, 1)}
GRADIENTS_PER_DRAW = GRADIENT_PER_DRAW | _by_size(_by_dist(Tile(32, 64, 32, 8, 1), Tile(16, 128, 32, 8, 1)))

# For sums of scores over draws and rows, with no product.
SUMS = _by_dist(Tile(32, 64, 0, 4, 1), Tile(32, 128, 0, 8, 1))

# For weight noise, a tile of cols x inputs, by bytes of an element.
PERTURBED = _by_size(
    _by_dist(Tile(64, 64, 32, 8, 2), Tile(64, 32, 128, 8, 2)),
    _by_dist(Tile(64, 64, 16, 8, 1), Tile(64, 16, 128, 8, 1)),
)
# For weight noise of low rank: 16 x inputs, 16 x cols.
LOW_RANK = _by_dist(Tile(64, 64, 32, 8, 1), Tile(16, 128, 128, 8, 1))
# For convolutions: inputs are channels of a tap in the forward, places of the inner axis in a gradient.
CONV = FORWARD | {("rademacher", 2): Tile(32, 128, 32, 8, 2)}
CONV_GRADIENT = _by_size(
    _by_dist(Tile(64, 64, 64, 8, 1), Tile(64, 128, 64, 8, 1)),
    _by_dist(Tile(32, 64, 32, 8, 1), Tile(32, 128, 32, 8, 1)),
)
CONV_GRADIENT_PER_DRAW = GRADIENT_PER_DRAW | _by_size(_by_dist(Tile(32, 64, 32, 8, 1), Tile(16, 128, 32, 8, 1)))

# For convolutions with weight noise, by bytes of an element. Each tile of pixels makes the noise again.
PERTURBED_CONV = {2: Tile(128, 64, 16, 8, 1), 4: Tile(64, 64, 16, 8, 1)}

PROGRAMS = 264  # two for each of an H100's 132 multiprocessors


def draws_per_program(draws: int, tiles: int) -> int:
    """The draws of a program of the forward, for copies that share x: all, unless the tiles alone leave a GPU idle.

    Then some programs repeat the product of a tile, which costs less than waiting for its noise.
    """
    splits = min(draws, max(1, PROGRAMS // tiles))
    return -(-draws // splits)


def perturbed_conv(element_size: int, channels: int) -> Tile:
    """The tile for a group's output channels: few columns for few channels, but at least the 16 of a product."""
    tile = PERTURBED_CONV[element_size]
    return tile._replace(cols=16) if channels <= 16 else tile
