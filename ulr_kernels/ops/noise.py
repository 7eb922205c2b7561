"""The noise itself, and the two primitives below it: Philox words and key derivation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ulr_kernels import noise_contract
from ulr_kernels.ops._op import NOISE_SCHEMA, Check, Cost, NoiseSpec, Op, Output, key_tensor, register

# --- philox4x32 ------------------------------------------------------------------------------------------------------


def philox4x32(counter: Tensor, key: tuple[int, int] | Tensor) -> Tensor:
    """Philox4x32-10 of each counter (Salmon et al., SC'11).

    Args:
        counter: int64 `[..., 4]`, each word in [0, 2^32).
        key: `(low, high)`, each in [0, 2^32), or an int64 tensor `[2]` of them.

    Returns:
        int64 `[..., 4]`, each word in [0, 2^32).

    Raises:
        ValueError: a shape, a dtype or a key word breaks the rules above.
    """
    if not isinstance(key, Tensor):
        for word in key:
            if isinstance(word, bool) or not isinstance(word, int) or not 0 <= word <= noise_contract.WORD:
                raise ValueError(f"ulr::philox4x32: 'key' must hold integers in [0, 2^32), got {word!r}")
        key = torch.tensor(tuple(key), dtype=torch.int64, device=counter.device)
    return torch.ops.ulr.philox4x32.default(counter, key)


class Philox(NamedTuple):
    """Arguments of philox4x32."""

    counter: Tensor
    key: Tensor


def _philox_check(a: Philox) -> Output:
    check, counter, key = Check("philox4x32"), a.counter, a.key
    check.dtype("counter", counter, (torch.int64,))
    if counter.dim() == 0 or counter.shape[-1] != 4:
        check.fail("counter", "be [..., 4]", list(counter.shape))
    check.dtype("key", key, (torch.int64,))
    check.shape("key", key, (2,), "its low and its high word")
    check.device("counter", counter.device, key=key)
    return Output(counter.shape, torch.int64)


def _philox_reference(out: Tensor, a: Philox) -> None:
    out.copy_(noise_contract.philox4x32(a.counter, (a.key[0], a.key[1])))


register(
    Op(
        philox4x32,
        "(Tensor counter, Tensor key) -> Tensor",
        Philox,
        _philox_check,
        _philox_reference,
        lambda a: Cost(bytes=2 * 8 * a.counter.numel(), flops=0, noise=0),
    )
)

# --- fold_in ---------------------------------------------------------------------------------------------------------


def fold_in(key: Tensor, data: Tensor | int) -> Tensor:
    """`ulr.fold_in` of int64 tensors that broadcast, on their device: keys of all sites of a step in one launch.

    Args:
        key: int64, any shape.
        data: int64, any shape that broadcasts with `key`'s; or an integer in [-2^63, 2^64).

    Returns:
        int64 of the broadcast shape.

    Raises:
        ValueError: not int64, on another device, or `data` is an integer out of range.
    """
    if not isinstance(data, Tensor):
        data = key_tensor("fold_in", data, key.device)
    return torch.ops.ulr.fold_in.default(key, data)


class FoldIn(NamedTuple):
    """Arguments of fold_in."""

    key: Tensor
    data: Tensor


def _fold_check(a: FoldIn) -> Output:
    check, key, data = Check("fold_in"), a.key, a.data
    check.dtype("key", key, (torch.int64,))
    check.dtype("data", data, (torch.int64,))
    check.device("key", key.device, data=data)
    try:
        shape = torch.broadcast_shapes(key.shape, data.shape)
    except RuntimeError:
        check.fail("data", f"broadcast with key {list(key.shape)}", list(data.shape))
    return Output(shape, torch.int64)


def _fold_reference(out: Tensor, a: FoldIn) -> None:
    out.copy_(noise_contract.fold_in_tensor(*torch.broadcast_tensors(a.key, a.data)))


register(
    Op(
        fold_in,
        "(Tensor key, Tensor data) -> Tensor",
        FoldIn,
        _fold_check,
        _fold_reference,
        lambda a: Cost(bytes=8 * (a.key.numel() + 2 * max(a.key.numel(), a.data.numel())), flops=0, noise=0),
    )
)

# --- noise -----------------------------------------------------------------------------------------------------------


def noise(
    shape: Sequence[int] | int,
    key: int | Tensor,
    *,
    draw: int = 0,
    dist: str = "normal",
    sampler: str = "iid",
    positions: int = 1,
    row_offset: int = 0,
    col_offset: int = 0,
    width: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """A block of noise: mean 0, variance 1, a pure function of key, draw, row and column (docs/noise.md).

    Args:
        shape: of the result. The last axis counts columns, the axes before it, flattened, rows; a vector is one row.
        key: 64 bits: an integer in [-2^63, 2^64) or an int64 scalar tensor on `device`.
        draw: number of the copy, member of a population or probe.
        dist: "normal", "laplace" or "rademacher".
        sampler: "iid"; "sobol": over `draw`, each element is one dimension of a shifted Sobol sequence; "hadamard",
            with dist="rademacher": orthogonal signs of 2^m aligned draws (docs/noise.md).
        positions: rows per sample, for Sobol's dimensions and Hadamard's slots.
        row_offset, col_offset: where in the whole noise this block starts.
        width: columns of the whole noise, where they count (those two samplers, positions > 1); 0: this block's are the
            last ones.
        device: of the result; the key's, if that is a tensor, else the CPU.

    Returns:
        fp32 of `shape`, contiguous.

    Raises:
        ValueError: an index is negative or past the contract's limits, or a name is unknown.
    """
    shape = [shape] if isinstance(shape, int) else list(shape)
    if device is None:
        device = key.device if isinstance(key, Tensor) else torch.device("cpu")
    key = key_tensor("noise", key, torch.device(device))
    return torch.ops.ulr.noise.default(key, shape, dist, sampler, positions, draw, row_offset, col_offset, width)


def noise_like(
    parameter: Tensor, key: int | Tensor, *, draw: int = 0, dist: str = "normal", sampler: str = "iid"
) -> Tensor:
    """Weight noise of a parameter: fp32 of its shape, its rows `shape[0]`, its columns the flattened rest.

    Args:
        parameter: any shape; a vector is one row, a scalar 1 x 1. Its device is the result's.
        key, draw, dist, sampler: as in `noise`; all rows are those of one sample.

    Raises:
        ValueError: as in `noise`.
    """
    shape = list(parameter.shape)
    flat = [shape[0], parameter[0].numel() if shape[0] else 0] if len(shape) >= 2 else shape
    rows = max(1, _rows_cols(flat)[0])
    made = noise(flat, key, draw=draw, dist=dist, sampler=sampler, positions=rows, device=parameter.device)
    return made.view(shape)


def _rows_cols(shape: Sequence[int]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1] if shape else 1


class Noise(NamedTuple):
    """Arguments of noise."""

    shape: list[int]
    noise: NoiseSpec


def _noise_check(a: Noise) -> Output:
    check = Check("noise")
    if any(size < 0 for size in a.shape):
        check.fail("shape", "have sizes of at least 0", list(a.shape))
    check.noise(a.noise, *_rows_cols(a.shape), 1)
    return Output(a.shape, torch.float32)


def _noise_reference(out: Tensor, a: Noise) -> None:
    rows, cols = _rows_cols(a.shape)
    flat = out.view(rows, cols)
    key, _, dist, sampler, positions, draw, row_offset, col_offset, width = a.noise
    which: dict[str, Any] = {"dist": dist, "sampler": sampler, "positions": positions}
    which |= {"col_offset": col_offset, "width": width}
    block = max(1, 2**20 // max(1, cols))  # the reference holds about twenty int64 temporaries an element
    for start in range(0, rows, block):
        part, draws = flat[start : start + block], torch.tensor([draw], device=key.device)
        made = noise_contract.noise_grid(len(part), cols, draws, key, row_offset=row_offset + start, **which)
        part.copy_(made[0])


register(
    Op(
        noise,
        f"(Tensor key, SymInt[] shape, {NOISE_SCHEMA}) -> Tensor",
        Noise,
        _noise_check,
        _noise_reference,
        lambda a: Cost(4 * torch.Size(a.shape).numel(), 0, torch.Size(a.shape).numel()),
    )
)
