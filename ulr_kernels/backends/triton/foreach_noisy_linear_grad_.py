# mypy: disable-error-code="assignment"
"""foreach_noisy_linear_grad_: each program makes a tile of one layer's gradient, which a table in memory describes.

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
from ulr_kernels.backends.triton.device_tables import on_device
from ulr_kernels.backends.triton.launch import Launch, cdiv, noise_arguments, noise_code, table, tiled
from ulr_kernels.backends.triton.noisy_linear_grad_ import gradient_tile, noisy_linear_grad_
from ulr_kernels.ops._linear import LinearGradient
from ulr_kernels.ops.foreach_noisy_linear_grad_ import LinearGradients

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
    """The properties that the layers of one launch have in common."""

    weight: torch.dtype
    bias: torch.dtype | None
    shared: bool


def _is_plain(layer: LinearGradient) -> bool:
    grad_weight, x = layer.grad_weight, layer.x
    assert grad_weight is not None
    rows = (*x.stride()[:-1], *grad_weight.stride()[:-1], x.shape[-1], x.data_ptr(), grad_weight.data_ptr())
    return x.stride(-1) == grad_weight.stride(-1) == 1 and not any(number % 16 for number in rows)


def launches(a: LinearGradients) -> Iterator[Launch]:
    """A launch for each form of layer."""
    groups: dict[Form, list[LinearGradient]] = {}
    for layer in a.layers():
        sizes, weight, bias = layer.sizes, layer.grad_weight, layer.grad_bias
        assert weight is not None
        if sizes.features and sizes.rows:
            form = Form(weight.dtype, None if bias is None else bias.dtype, sizes.shared)
            groups.setdefault(form, []).append(layer)
    for form, layers in groups.items():
        layers.sort(key=lambda layer: layer.loss_weight.shape[0] * layer.x.shape[-2], reverse=True)
        yield _launch(form, layers)


def _launch(form: Form, layers: list[LinearGradient]) -> Launch:
    x, noise = layers[0].x, layers[0].noise
    tile = (tiles.GRADIENTS if form.shared else tiles.GRADIENTS_PER_DRAW)[noise.dist, x.element_size()]
    entries: list[tuple[int, ...]] = []
    programs: list[int] = []
    for layer in layers:
        entry, count = _entry(layer, tile)
        entries.append((sum(programs), *entry))
        programs.append(count)
    table_of_entries, owners = on_device(tuple(entries), tuple(programs), x.device)
    return tiled(
        gradients_kernel,
        sum(programs),
        {
            "entries": table_of_entries,
            "owners": owners,
            "table": table(noise.dist, x.device),
            "directions": noise_contract.sobol_directions(x.device) if noise.sampler == "sobol" else None,
            "draw": noise.draw,
            "PLAIN": all(map(_is_plain, layers)),
            "DTYPE": _DTYPES[x.dtype],
            "WEIGHT_DTYPE": _DTYPES[form.weight],
            "BIAS_DTYPE": None if form.bias is None else _DTYPES[form.bias],
            "SHARED": form.shared,
            "ANTITHETIC": noise.antithetic,
            "DIST": noise_code(noise.dist, noise.sampler),
        },
        tile,
    )


def _entry(layer: LinearGradient, tile: tiles.Tile) -> tuple[tuple[int, ...], int]:
    """A layer's row of the table without its first program, and its number of programs."""
    weight, bias, x, loss_weight, sigma = layer.grad_weight, layer.grad_bias, layer.x, layer.loss_weight, layer.sigma
    copies, rows, inputs, features, shared = layer.sizes
    assert weight is not None
    noise = noise_arguments(layer.noise, features)
    tensors = (weight, bias, x, loss_weight, sigma, layer.noise.key)
    entry = (
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        *(rows, features, inputs, layer.noise.draws(copies), layer.noise.row_offset),
        *(noise[name] for name in ("first", "shift", "positions", "width")),
        *(*weight.stride(), 0 if bias is None else bias.stride(0)),
        *(x[None] if shared else x).stride(),
        *(*loss_weight.stride(), sigma.stride(0) if sigma.dim() else 0),
    )
    return entry, cdiv(features + noise["shift"], tile.cols) * max(cdiv(inputs, tile.inputs), 1)


def foreach_noisy_linear_grad_(a: LinearGradients) -> None:
    # A capture's x and losses have new addresses, so that no earlier call can have made a table of them. The kernel of
    # several layers counts in 32 bits, that of one layer in 64 where needed.
    largest = max(size for tensor in (*a.grad_weights, *a.xs) for size in tensor.shape)
    if capturing(a.xs[0].device) or largest > torch.iinfo(torch.int32).max:
        for layer in a.layers():
            noisy_linear_grad_(layer)
        return
    if a.xs[0].device.type == "cuda":
        rehearse(a.layers())
    for launch in launches(a):
        launch.run()


_rehearsed: set[tuple] = set()


def rehearse(layers: Iterable[LinearGradient]) -> None:
    """Run the kernel of one layer on scratch buffers, the first time that there is such a layer.

    A capture will use these kernels, and may neither compile nor load any.
    """
    for layer in layers:
        tensors = (*layer.buffers, layer.x, layer.loss_weight, layer.sigma)
        form = tuple(map(_form, (*tensors, *layer.noise)))
        if form not in _rehearsed:
            weight, bias, log_sigma = (None if b is None else torch.zeros_like(b) for b in layer.buffers)
            noisy_linear_grad_(layer._replace(grad_weight=weight, grad_bias=bias, grad_log_sigma=log_sigma))
            _rehearsed.add(form)


def _form(argument: Any) -> Any:
    """The properties of an argument for which Triton compiles a kernel of its own."""
    if isinstance(argument, Tensor):
        sizes = map(_form, (*argument.shape, *argument.stride(), argument.data_ptr()))
        return argument.dtype, argument.device, *sizes
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument.bit_length() > 31
    return argument
