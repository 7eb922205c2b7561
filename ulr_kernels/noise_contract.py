"""The noise contract, version 1, in torch: the readable definition that every other back end reproduces bit for bit.

    words   w = Philox4x32-10(counter = (col // 4, row, draw, 0), key = (key_lo, key_hi))[col % 4]
    eps     = dist(w)

Philox4x32-10: Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC'11. `docs/noise.md` is the contract in
words. Words are held as int64 in [0, 2^32), because torch has little arithmetic for uint32.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ulr_kernels import noise_tables

CONTRACT_VERSION = 1
DISTRIBUTIONS = ("normal", "laplace", "rademacher")
SAMPLERS = ("iid", "sobol", "hadamard")

WORD = 0xFFFFFFFF
FOLD_IN_COUNTER = 0x666F6C64  # "fold": keeps the counters of key derivation apart from those of noise
# Numbers folded into a parameter's key for streams of their own: the two factors of low-rank noise, and rounding.
LOW_RANK_STREAMS = (1, 2)
ROUNDING_STREAM = 3
MAX_SOBOL_DIMENSIONS = torch.quasirandom.SobolEngine.MAXDIM
MAX_SOBOL_DRAWS = 2**30
ALL_ROWS = 2**32  # as positions: a parameter's rows are those of one sample
HADAMARD_BITS = 16  # of a draw, and of a slot: 2^16 draws are orthogonal

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: Tensor, key: tuple[Tensor | int, Tensor | int]) -> Tensor:
    """Philox4x32-10 of each counter.

    Args:
        counter: int64 `[..., 4]`, each word in [0, 2^32).
        key: the low and the high word; ints, or int64 tensors that broadcast against `counter[..., 0]`.

    Returns:
        int64 `[..., 4]`, each word in [0, 2^32).

    Raises:
        ValueError: `counter` is not int64 with a last axis of 4, or a key word given as an int is outside [0, 2^32).
    """
    if counter.dtype != torch.int64 or counter.dim() == 0 or counter.shape[-1] != 4:
        raise ValueError(f"ulr.philox4x32: 'counter' must be int64 [..., 4], got {counter.dtype} {list(counter.shape)}")
    for word in key:
        if isinstance(word, int) and not 0 <= word <= WORD:
            raise ValueError(f"ulr.philox4x32: 'key' words must be in [0, 2^32), got {word}")
    return torch.stack(_philox(*counter.unbind(-1), *key), dim=-1)


def _rounds(c0, c1, c2, c3, k0, k1):
    """Ten rounds on words, Python integers or int64 tensors that broadcast.

    The product of two tensors wraps modulo 2^64, which leaves its two halves intact.
    """
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & WORD) ^ c1 ^ k0, p1 & WORD, ((p0 >> 32) & WORD) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & WORD, (k1 + _KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def _philox(*words: Tensor | int) -> tuple[Tensor, ...]:
    return torch.broadcast_tensors(*_rounds(*words))


def philox4x32_int(counter: tuple[int, int, int, int], key: int) -> tuple[int, int, int, int]:
    """`philox4x32` of Python integers, so that deriving a key on the host makes no tensors."""
    return _rounds(*counter, key & WORD, (key >> 32) & WORD)


def signed64(value: int) -> int:
    """The signed int64 with the bits of a number in [-2^63, 2^64)."""
    return value - 2**64 if value > 2**63 - 1 else value


def fold_in(key: int, data: int) -> int:
    """A new key from a key and a number: words 0 and 1 of Philox4x32-10(counter = (data_lo, data_hi, 0, "fold"), key).

    Args:
        key: an integer in [-2^63, 2^64); its 64 bits count.
        data: likewise.

    Returns:
        The key as a signed int64.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is outside [-2^63, 2^64).
    """
    for name, value in (("key", key), ("data", data)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"ulr.fold_in: '{name}' must be an integer, got {type(value).__name__}")
        if not -(2**63) <= value < 2**64:
            raise ValueError(f"ulr.fold_in: '{name}' must be in [-2^63, 2^64), got {value}")
    low, high, _, _ = philox4x32_int((data & WORD, (data >> 32) & WORD, 0, FOLD_IN_COUNTER), key)
    return signed64(low | high << 32)


def fold_in_tensor(key: Tensor, data: Tensor) -> Tensor:
    """`fold_in` of int64 tensors that broadcast, on their device."""
    low, high, _, _ = _philox(
        data & WORD,
        (data >> 32) & WORD,
        torch.zeros_like(data),
        torch.full_like(data, FOLD_IN_COUNTER),
        *key_words(key),
    )
    return low | (high << 32)


def site_id(name: str) -> int:
    """The number of a noise site: the first 8 bytes, little-endian, of the BLAKE2b hash of its qualified name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def key_words(key: Tensor) -> tuple[Tensor, Tensor]:
    return key & WORD, (key >> 32) & WORD


# ---------------------------------------------------------------------------------------------------------------------
# Words to noise. Only integer operations, int-to-float conversion and IEEE multiply, add and fma in a fixed order.


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """fp32 fused multiply-add, correctly rounded, from fp64 operations.

    The product of two fp32 numbers is exact in fp64. The sum is rounded to odd (its last bit is set where the sum is
    inexact), and a number rounded to odd at 53 bits rounds to fp32 as the exact sum would (Boldo and Melquiond, 2008).
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)  # Knuth's two-sum: total + error is the exact sum
    bits = total.view(torch.int64)
    towards = torch.where((error > 0) == (total > 0), 1, -1)
    even_and_inexact = (error.abs() > 0) & (bits & 1 == 0)  # false where a sum with an infinity has no error
    return (bits + torch.where(even_and_inexact, towards, 0)).view(torch.float64).float()


def square_root(a: Tensor) -> Tensor:
    """fp32 square root, correctly rounded by way of fp64; torch's own is not."""
    return a.double().sqrt().float()


@functools.cache
def _coefficients(dist: str, device: torch.device) -> Tensor:
    rows = torch.tensor(getattr(noise_tables, dist.upper()), dtype=torch.int64, device=device)
    return rows.to(torch.int32).view(torch.float32)


def quantile(words: Tensor, dist: str) -> Tensor:
    """`normal` or `laplace` noise, fp32, from int64 words: a polynomial per octave, then the word's bit 31 as sign."""
    mantissa = ((words & 0x7FFFFFFF) | 1).to(torch.int32).float()
    bits = mantissa.view(torch.int32)
    argument = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32)
    rows = _coefficients(dist, words.device)[(bits >> 23) - 127]
    result = rows[..., noise_tables.DEGREE]
    for power in range(noise_tables.DEGREE - 1, -1, -1):
        result = fma(result, argument, rows[..., power])
    sign = (words & 0x80000000).to(torch.int32) if words.numel() else words.to(torch.int32)
    return (result.view(torch.int32) ^ sign).view(torch.float32)


def score(eps: Tensor, dist: str) -> Tensor:
    """-d/d eps ln f(eps): eps for `normal`; sqrt(2) with the sign *bit* of eps for `laplace`; eps for `rademacher`."""
    if dist != "laplace":
        return eps
    return torch.copysign(torch.full_like(eps, math.sqrt(2.0)), eps)


# ---------------------------------------------------------------------------------------------------------------------
# Coordinates to words.


def _iid_words(rows: Tensor, cols: Tensor, draw: Tensor | int, key: Tensor) -> Tensor:
    """Words of coordinates that broadcast; only one word of each call of Philox is used."""
    words = _philox(cols >> 2, rows, torch.as_tensor(draw, device=cols.device), torch.zeros_like(cols), *key_words(key))
    return torch.stack(words, -1).gather(-1, (cols & 3).expand(words[0].shape).unsqueeze(-1)).squeeze(-1)


def _signs(rows: Tensor, cols: Tensor, draw: Tensor | int, key: Tensor) -> Tensor:
    draw = torch.as_tensor(draw, device=cols.device)
    words = torch.stack(_philox(cols >> 7, rows, draw, torch.zeros_like(cols), *key_words(key)), -1)
    word = words.gather(-1, ((cols >> 5) & 3).expand(words.shape[:-1]).unsqueeze(-1)).squeeze(-1)
    return 1.0 - 2.0 * ((word >> (cols & 31)) & 1).float()


@functools.cache
def sobol_directions(device: torch.device) -> Tensor:
    """Direction numbers V, int32 `[21201, 30]`, shifted left by 2 so that they fill a 32-bit word (bits as int32)."""
    state = torch.quasirandom.SobolEngine(MAX_SOBOL_DIMENSIONS).sobolstate
    return (state << 2).to(torch.int32).contiguous().to(device)


def _sobol_points(rows: Tensor, cols: Tensor, draw: Tensor | int, positions: int, width: int) -> Tensor:
    """Sobol words in natural order: the XOR of V[dimension][b] over the set bits b of `draw`."""
    dimension = (rows % positions) * width + cols
    directions = sobol_directions(cols.device)[dimension].to(torch.int64) & WORD
    point = torch.zeros_like(dimension)
    draw = torch.as_tensor(draw, device=cols.device)
    for bit in range(30):
        point = point ^ torch.where(((draw >> bit) & 1).bool(), directions[..., bit], 0)
    return point


def hadamard_slots(rows: Tensor, cols: Tensor, positions: int, width: int) -> Tensor:
    """The slot of each coordinate: the number of its Walsh function. The odd stride parts neighbouring rows."""
    return ((rows % positions) * (width | 1) + cols) & (2**HADAMARD_BITS - 1)


def _hadamard(rows: Tensor, cols: Tensor, draw: Tensor | int, key: Tensor, positions: int, width: int) -> Tensor:
    """Signs that all 2^16 draws of a block share, times the Walsh function of the slot."""
    draw = torch.as_tensor(draw, device=cols.device)
    bits = hadamard_slots(rows, cols, positions, width) & draw
    for shift in (8, 4, 2, 1):
        bits = bits ^ (bits >> shift)
    return _signs(rows, cols, draw >> HADAMARD_BITS, key) * (1.0 - 2.0 * (bits & 1).float())


def hadamard_blocks(draw: int, draws: int) -> Iterator[tuple[int, int, slice]]:
    """How a sum over draws is cut into aligned blocks: of each its first draw, its size 2^m, and which draws it holds.

    The size is the smallest power of two that holds all of the draws, at most 2^16.
    """
    size = min(1 << max(draws - 1, 0).bit_length(), 1 << HADAMARD_BITS)
    for first in range(draw // size * size, draw + draws, size):
        yield first, size, slice(max(first - draw, 0), min(first + size - draw, draws))


def walsh_hadamard(weights: Tensor) -> Tensor:
    """H[s] = sum over c of weights[c] (-1)^popcount(c & s), fp32, over the last axis, whose size is a power of two.

    Butterflies in ascending strides: the order of the sums is the contract's.
    """
    half, size = 1, weights.shape[-1]
    while half < size:
        low, high = weights.unflatten(-1, (-1, 2, half)).unbind(-2)
        weights = torch.stack((low + high, low - high), -2).flatten(-3)
        half *= 2
    return weights


def noise_at(
    rows: Tensor,
    cols: Tensor,
    draw: Tensor | int,
    key: Tensor,
    *,
    dist: str,
    sampler: str = "iid",
    positions: int = 1,
    width: int = 0,
) -> Tensor:
    """Noise, fp32, at coordinates (int64, broadcast against one another).

    `positions` and `width` count a sample's rows and all columns, for the samplers other than "iid".
    """
    if sampler == "hadamard":
        return _hadamard(rows, cols, draw, key, positions, width)
    if dist == "rademacher":
        return _signs(rows, cols, draw, key)
    if sampler == "sobol":
        shift = _iid_words(rows, cols, 0, key)
        return quantile(shift ^ _sobol_points(rows, cols, draw, positions, width), dist)
    return quantile(_iid_words(rows, cols, draw, key), dist)


def noise_grid(
    rows: int,
    cols: int,
    draws: Tensor,
    key: Tensor,
    *,
    dist: str = "normal",
    sampler: str = "iid",
    positions: int = 1,
    row_offset: int = 0,
    col_offset: int = 0,
    width: int = 0,
) -> Tensor:
    """Noise of a block: fp32 `[len(draws), rows, cols]`; `draws` is int64 `[D]`, `key` an int64 scalar tensor."""
    device = draws.device
    row = torch.arange(row_offset, row_offset + rows, device=device).view(1, -1, 1)
    col = torch.arange(col_offset, col_offset + cols, device=device).view(1, 1, -1)
    return noise_at(
        row,
        col,
        draws.view(-1, 1, 1),
        key.to(device),
        dist=dist,
        sampler=sampler,
        positions=positions,
        width=width or col_offset + cols,
    )


def parameter_noise(
    rows: Tensor,
    cols: Tensor,
    rank: int | None,
    draw: int,
    key: Tensor,
    *,
    dist: str,
    sampler: str = "iid",
    width: int = 0,
) -> Tensor:
    """A parameter's noise, fp32 `[R, C]`, at any rows [R] and columns [C]; `width` counts all columns.

    Of low rank it is E = A B^T / sqrt(rank), summed by fma from A's first column on; None: of full rank.
    """
    if rank is None:
        places = {"positions": ALL_ROWS, "width": width}
        return noise_at(rows[:, None], cols[None], draw, key, dist=dist, sampler=sampler, **places)
    by_row, by_col = low_rank_factors(rows, cols, rank, draw, key, dist=dist)
    total = torch.zeros(len(rows), len(cols), dtype=torch.float32, device=key.device)
    for a, b in zip(by_row, by_col, strict=True):
        total = fma(a[:, None], b[None, :], total)
    return total * low_rank_scale(rank)


def low_rank_factors(
    rows: Tensor, cols: Tensor, rank: int, draw: int, key: Tensor, *, dist: str
) -> tuple[Tensor, Tensor]:
    """A^T `[rank, R]` and B^T `[rank, C]`."""
    ranks = torch.arange(rank, device=key.device)[:, None]
    keys = (fold_in_tensor(key, torch.full_like(key, stream)) for stream in LOW_RANK_STREAMS)
    by_row, by_col = (noise_at(ranks, at[None], draw, k, dist=dist) for at, k in zip((rows, cols), keys, strict=True))
    return by_row, by_col


def low_rank_scale(rank: int) -> float:
    """1 / sqrt(rank), an fp32 number."""
    return torch.tensor(1 / math.sqrt(rank), dtype=torch.float32, device="cpu").item()


def round_stochastically(values: Tensor, rows: Tensor, cols: Tensor, draw: int, key: Tensor) -> Tensor:
    """fp32 `[R, C]`, at rows [R] and columns [C] of a parameter, to bf16.

    A value goes away from zero with the probability of the part that is cut off: the upper half of a word of the
    parameter's rounding stream is added below the last place kept. Infinities and NaN are converted as usual.
    """
    words = _iid_words(rows[:, None], cols[None], draw, fold_in_tensor(key, torch.full_like(key, ROUNDING_STREAM)))
    bits = (values.view(torch.int32).to(torch.int64) & WORD) + (words >> 16)
    rounded = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isfinite(), rounded, values.to(torch.bfloat16))


def copy_draws(copies: int, antithetic: bool, draw: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The draw (int64 `[copies]`) and the sign (fp32 `[copies]`) of each copy: antithetic copies come as two halves."""
    copy = torch.arange(copies, device=device)
    if not antithetic:
        return draw + copy, torch.ones(copies, dtype=torch.float32, device=device)
    half = copies // 2
    return draw + copy % half, torch.where(copy < half, 1, -1).float()
