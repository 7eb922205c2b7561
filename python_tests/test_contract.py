"""The noise contract: published answers, frozen vectors, and its definition written out once more in plain integers."""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import json
import math
import pathlib
import struct
from fractions import Fraction

import pytest
import torch

import ulr_kernels as ulr
from ulr_kernels import noise_contract, noise_tables

VECTORS = json.loads((pathlib.Path(__file__).parent / "vectors" / "noise_v1.json").read_text())

# Random123's kat_vectors for philox4x32, 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("counter,key,answer", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, answer, device) -> None:
    result = ulr.philox4x32(torch.tensor(words(counter), device=device), tuple(words(key)))
    assert result.tolist() == words(answer)


@pytest.mark.parametrize("vector", VECTORS["fold_in"], ids=str)
def test_fold_in_on_host_and_device(vector, device) -> None:
    key, data, answer = vector
    assert ulr.fold_in(key, data) == answer
    signed = [torch.tensor(noise_contract.signed64(v), device=device) for v in (key, data)]
    assert ulr.ops.fold_in(*signed).item() == answer


@pytest.mark.parametrize("vector", VECTORS["noise"], ids=lambda v: v["id"])
def test_frozen_vectors(vector, device) -> None:
    """The contract may not drift: bits that version 1 gave are the bits it gives."""
    eps = ulr.noise(tuple(vector["shape"]), vector["key"], device=device, **vector["kwargs"])
    assert [f"{b & 0xFFFFFFFF:08x}" for b in eps.cpu().view(torch.int32).flatten().tolist()] == vector["bits"]


@pytest.mark.parametrize("vector", VECTORS["site"], ids=str)
def test_site_ids(vector) -> None:
    assert noise_contract.site_id(vector[0]) == vector[1]


def test_table_hash() -> None:
    rows = [bits for name in ("NORMAL", "LAPLACE") for row in getattr(noise_tables, name) for bits in row]
    assert hashlib.sha256(struct.pack(f"<{len(rows)}I", *rows)).hexdigest() == noise_tables.SHA256
    header = pathlib.Path(__file__).parents[1] / "csrc" / "include" / "ulr" / "tables.h"
    text = header.read_text()
    assert noise_tables.SHA256 in text
    assert [
        int(t.strip("{}, \\"), 16)
        for line in text.splitlines()
        if line.startswith("    {")
        for t in line.split(", ")
        if "0x" in t
    ] == rows


@pytest.mark.parametrize("key", [-1, 2**63, 5])
def test_fold_in_counts_bits_not_signs(key) -> None:
    assert ulr.fold_in(key, -1) == ulr.fold_in(key % 2**64, 2**64 - 1)
    assert -(2**63) <= ulr.fold_in(key, 3) < 2**63


@pytest.mark.parametrize("bad", [2**64, -(2**63) - 1])
def test_fold_in_range(bad) -> None:
    with pytest.raises(ValueError, match="ulr.fold_in: 'data' must be in"):
        ulr.fold_in(0, bad)
    with pytest.raises(TypeError, match="ulr.fold_in: 'key' must be an integer, got float"):
        ulr.fold_in(0.5, 1)


# ---------------------------------------------------------------------------------------------------------------------
# The definition in plain integers and exact fractions.


def float32(value: Fraction) -> float:
    """The nearest fp32 number, ties to even: exact arithmetic, rounded once (no subnormals occur here)."""
    if not value:
        return 0.0
    exponent = math.floor(math.log2(abs(value)))
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    return float(round(value / unit) * unit)  # Fraction's round takes ties to even


def plain_word(col: int, row: int, draw: int, key: int) -> int:
    return noise_contract.philox4x32_int((col // 4, row, draw, 0), key)[col % 4]


def plain_quantile(word: int, table) -> float:
    m = float32(Fraction(word & 0x7FFFFFFF | 1))
    octave = math.frexp(m)[1] - 1
    t = Fraction(m) / 2**octave
    coefficients = [Fraction(struct.unpack("<f", struct.pack("<I", bits))[0]) for bits in table[octave]]
    result = float(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = float32(Fraction(result) * t + coefficient)
    return -result if word >> 31 else result


@pytest.mark.parametrize("dist", ["normal", "laplace"])
def test_quantile_noise_by_exact_arithmetic(dist, device) -> None:
    key, draw, row, col = 0x0123456789ABCDEF, 3, 2**32 - 2, 2**34 - 11
    eps = ulr.noise((2, 11), key, draw=draw, dist=dist, row_offset=row, col_offset=col, device=device)
    table = getattr(noise_tables, dist.upper())
    expected = [[plain_quantile(plain_word(col + c, row + r, draw, key), table) for c in range(11)] for r in range(2)]
    assert eps.tolist() == expected


def test_signs_by_integers(device) -> None:
    key, col = -7, 100
    eps = ulr.noise((1, 200), key, draw=2, dist="rademacher", row_offset=9, col_offset=col, device=device)
    for c in range(200):
        call = noise_contract.philox4x32_int(((col + c) // 128, 9, 2, 0), key)
        bit = call[(col + c) % 128 // 32] >> (col + c) % 32 & 1
        assert eps[0, c].item() == 1 - 2 * bit


def test_orthogonal_signs_by_integers(device) -> None:
    key, col, row, draw, positions, width = -7, 100, 9, 0x2ABCD, 4, 310
    at = {"row_offset": row, "col_offset": col, "positions": positions, "width": width}
    eps = ulr.noise((3, 200), key, draw=draw, dist="rademacher", sampler="hadamard", device=device, **at)
    for r in range(3):
        for c in range(200):
            call = noise_contract.philox4x32_int(((col + c) // 128, row + r, draw >> 16, 0), key)
            bit = call[(col + c) % 128 // 32] >> (col + c) % 32 & 1
            slot = (row + r) % positions * (width | 1) + col + c
            assert eps[r, c].item() == (1 - 2 * bit) * (-1) ** (draw & slot & 0xFFFF).bit_count()


def test_sobol_is_torchs_sequence_shifted(device) -> None:
    """Without the shift, draw 0's words, the points are those of torch's engine, which orders them by Gray code."""
    positions, cols, key = 2, 3, 99
    engine = torch.quasirandom.SobolEngine(positions * cols)
    points = (engine.draw(16) * 2**30).round().long() << 2
    for draw in range(16):
        gray = draw ^ (draw >> 1)
        eps = ulr.noise((4, cols), key, draw=gray, sampler="sobol", positions=positions, device=device)
        for row in range(4):
            for col in range(cols):
                point = points[draw, row % positions * cols + col].item()
                word = plain_word(col, row, 0, key) ^ point
                assert eps[row, col].item() == plain_quantile(word, noise_tables.NORMAL)


def test_every_octave_and_the_rounding_up_to_row_31() -> None:
    m = torch.tensor([1, 2, 3, 5, 9, 2**24 - 1, 2**24 + 1, 2**24 + 3, 2**30, 2**31 - 128, 2**31 - 64, 2**31 - 1])
    for sign in (0, 2**31):
        for dist in ("normal", "laplace"):
            eps = noise_contract.quantile(m | sign, dist).tolist()
            assert eps == [plain_quantile(w, getattr(noise_tables, dist.upper())) for w in (m | sign).tolist()]
    assert noise_contract.quantile(m[-1:], "normal").item() == 0.0


def test_fma_is_the_c_librarys() -> None:
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    library.fmaf.restype, library.fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    a, b, c = (noise_contract.noise_grid(1, 3000, torch.tensor([d]), torch.tensor(1))[0, 0] for d in range(3))
    c = torch.where(torch.arange(3000) % 2 == 0, -(a * b), c * 1e-4)  # half of the sums cancel
    expected = [library.fmaf(*values) for values in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]
    assert noise_contract.fma(a, b, c).tolist() == expected


def test_scores() -> None:
    eps = torch.tensor([0.0, -0.0, 1.5, -2.0])
    root = torch.tensor(2.0).sqrt().item()
    assert noise_contract.score(eps, "laplace").tolist() == [root, -root, root, -root]
    assert noise_contract.score(eps, "normal") is eps
