# mypy: disable-error-code="assignment"
"""noisy_linear_grads_: programs that each take a tile of one layer's gradient, told of it by a table in device memory.

A launch takes the layers of one form: their copies share x or do not, their buffers are of one dtype. Those with the
most noise come first, so that the last programs to finish are short ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ulr_kernels import noise_contract
from ulr_kernels.backends.capture import capturing
from ulr_kernels.backends.triton import tiles
from ulr_kernels.backends.triton.launch import DISTRIBUTION_CODES, Launch, cdiv, noise_arguments, table
from ulr_kernels.backends.triton.listed import on_device
from ulr_kernels.backends.triton.noisy_linear_grad_ import gradient_tile, noisy_linear_grad_
from ulr_kernels.ops.noisy_linear_grads_ import calls

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# A row of the table: the layer's first program, the addresses of its tensors, its sizes and noise, strides.
# fmt: off
(
    FIRST, GRAD_WEIGHT, GRAD_BIAS, X, LOSS_WEIGHT, SIGMA, KEY,
    ROWS, FEATURES, INPUTS, DRAWS, ROW_OFFSET, FIRST_CALL, SHIFT, POSITIONS, WIDTH,
    GRAD_COL, GRAD_INPUT, BIAS, X_COPY, X_ROW, X_INPUT, LOSS_COPY, LOSS_SAMPLE, SIGMA_COL, FIELDS,
) = (tl.constexpr(i) for i in range(26))
# fmt: on


@triton.jit
def _integer(entry, field: tl.constexpr):
    return tl.load(entry + field).to(tl.int32)


@triton.jit
def _address(entry, field: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(entry + field).to(tl.pointer_type(DTYPE))


@triton.jit(do_not_specialize=["draw"])
def gradients_kernel(
    entries,
    owners,
    table,
    directions,
    draw: tl.uint32,
    PLAIN: tl.constexpr,
    DTYPE: tl.constexpr,
    WEIGHT_DTYPE: tl.constexpr,
    BIAS_DTYPE: tl.constexpr,
    SHARED: tl.constexpr,
    ANTITHETIC: tl.constexpr,
    DIST: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """`PLAIN`: rows of x and of the weights' buffers are vectors that can be moved at once."""
    program = tl.program_id(0)
    entry = entries + tl.load(owners + program).to(tl.int64) * FIELDS
    grad_weight, x = _address(entry, GRAD_WEIGHT, WEIGHT_DTYPE), _address(entry, X, DTYPE)
    inputs = _integer(entry, INPUTS)
    stride_grad_col = tl.load(entry + GRAD_COL)
    stride_x_copy, stride_x_row = tl.load(entry + X_COPY), tl.load(entry + X_ROW)
    if PLAIN:
        stride_grad_input: tl.constexpr = 1
        stride_x_input: tl.constexpr = 1
        grad_weight, x, inputs = tl.multiple_of(grad_weight, 16), tl.multiple_of(x, 16), tl.multiple_of(inputs, 16)
        stride_grad_col = tl.multiple_of(stride_grad_col, 16)
        stride_x_copy, stride_x_row = tl.multiple_of(stride_x_copy, 16), tl.multiple_of(stride_x_row, 16)
    else:
        stride_grad_input = tl.load(entry + GRAD_INPUT)
        stride_x_input = tl.load(entry + X_INPUT)
    grad_bias = None
    if BIAS_DTYPE is not None:
        grad_bias = _address(entry, GRAD_BIAS, BIAS_DTYPE)
    gradient_tile(
        program - _integer(entry, FIRST),
        None, grad_weight, grad_bias, None, None, None, x, None, None, _address(entry, LOSS_WEIGHT, tl.float32),
        _address(entry, SIGMA, tl.float32), _address(entry, KEY, tl.int64), table, directions, _integer(entry, ROWS),
        _integer(entry, FEATURES), inputs, _integer(entry, DRAWS), tl.cast(draw, tl.uint32),
        tl.load(entry + ROW_OFFSET).to(tl.uint32), tl.load(entry + FIRST_CALL).to(tl.uint32), _integer(entry, SHIFT),
        _integer(entry, POSITIONS), tl.load(entry + WIDTH), stride_grad_col, stride_grad_input, tl.load(entry + BIAS),
        0, stride_x_copy, stride_x_row, stride_x_input, 0, 0, 0, tl.load(entry + LOSS_COPY),
        tl.load(entry + LOSS_SAMPLE), tl.load(entry + SIGMA_COL), SHARED, ANTITHETIC, DIST, BR, BC, BK,
    )  # fmt: skip


class Form(NamedTuple):
    """What the layers of one launch have in common."""

    weight: torch.dtype
    bias: torch.dtype | None
    shared: bool


def _is_plain(grad_weight: Tensor, x: Tensor) -> bool:
    rows = (*x.stride()[:-1], *grad_weight.stride()[:-1], x.shape[-1], x.data_ptr(), grad_weight.data_ptr())
    return x.stride(-1) == grad_weight.stride(-1) == 1 and not any(number % 16 for number in rows)


def launches(*args) -> Iterator[Launch]:
    """A launch for each form of layer."""
    groups: dict[Form, list[tuple]] = {}
    for call in calls(*args):
        weight, bias, _, x = call[:4]
        if weight.shape[0] and x.shape[-2]:
            form = Form(weight.dtype, None if bias is None else bias.dtype, x.dim() == 2)
            groups.setdefault(form, []).append(call)
    for form, members in groups.items():
        members.sort(key=lambda call: call[4].shape[0] * call[3].shape[-2], reverse=True)
        yield _launch(form, members)


def _launch(form: Form, members: list[tuple]) -> Launch:
    x = members[0][3]
    antithetic, dist, sampler, _, draw = members[0][7:12]
    tile = (tiles.GRADIENTS if form.shared else tiles.GRADIENTS_PER_DRAW)[dist, x.element_size()]
    entries: list[tuple[int, ...]] = []
    programs: list[int] = []
    for call in members:
        entry, count = _entry(call, tile)
        entries.append((sum(programs), *entry))
        programs.append(count)
    table_of_entries, owners = on_device(tuple(entries), tuple(programs), x.device)
    return Launch(
        gradients_kernel,
        sum(programs),
        {
            "entries": table_of_entries,
            "owners": owners,
            "table": table(dist, x.device),
            "directions": noise_contract.sobol_directions(x.device) if sampler == "sobol" else None,
            "draw": draw,
            "PLAIN": all(_is_plain(call[0], call[3]) for call in members),
            "DTYPE": _DTYPES[x.dtype],
            "WEIGHT_DTYPE": _DTYPES[form.weight],
            "BIAS_DTYPE": None if form.bias is None else _DTYPES[form.bias],
            "SHARED": form.shared,
            "ANTITHETIC": antithetic,
            "DIST": DISTRIBUTION_CODES[dist],
            "BR": tile.rows,
            "BC": tile.cols,
            "BK": tile.inputs,
        },
        tile.warps,
        tile.stages,
    )


def _entry(call: tuple, tile: tiles.Tile) -> tuple[tuple[int, ...], int]:
    """A layer's row of the table but for its first program; and how many programs it takes."""
    weight, bias, _, x, loss_weight, sigma, key, antithetic, dist, sampler, positions, draw, row_offset, col_offset = (
        call
    )
    features, inputs, copies = weight.shape[0], x.shape[-1], loss_weight.shape[0]
    noise = noise_arguments(key, dist, sampler, positions, draw, row_offset, col_offset, features)
    tensors = (weight, bias, x, loss_weight, sigma, key)
    entry = (
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        *(x.shape[-2], features, inputs, copies // 2 if antithetic else copies, row_offset),
        *(noise[name] for name in ("first", "shift", "positions", "width")),
        *(*weight.stride(), 0 if bias is None else bias.stride(0)),
        *(x if x.dim() == 3 else x[None]).stride(),
        *(*loss_weight.stride(), sigma.stride(0) if sigma.dim() else 0),
    )
    return entry, cdiv(features + noise["shift"], tile.cols) * max(cdiv(inputs, tile.inputs), 1)


def noisy_linear_grads_(*args) -> None:
    weights, xs = args[0], args[2]
    # A capture's x and losses lie where no call before had them, so that no table of them can be there; and the kernel
    # of several layers counts in 32 bits, that of one layer in as many as it takes.
    largest = max(size for tensor in (*weights, *xs) for size in tensor.shape)
    if capturing(xs[0].device) or largest > torch.iinfo(torch.int32).max:
        for call in calls(*args):
            noisy_linear_grad_(*call)
        return
    if xs[0].device.type == "cuda":
        rehearse(calls(*args))
    for launch in launches(*args):
        launch.run()


_rehearsed: set[tuple] = set()


def rehearse(each: Iterable[tuple]) -> None:
    """Run the kernels of one layer, on sums that nobody reads, the first time that there is such a layer: a capture
    will take them, and may neither compile nor load any."""
    for call in each:
        form = tuple(map(_form, call))
        if form not in _rehearsed:
            sums = (None if buffer is None else torch.zeros_like(buffer) for buffer in call[:3])
            noisy_linear_grad_(*sums, *call[3:])
            _rehearsed.add(form)


def _form(argument: Any) -> Any:
    """What Triton compiles a kernel of its own for."""
    if isinstance(argument, Tensor):
        sizes = map(_form, (*argument.shape, *argument.stride(), argument.data_ptr()))
        return argument.dtype, argument.device, *sizes
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument.bit_length() > 31
    return argument
