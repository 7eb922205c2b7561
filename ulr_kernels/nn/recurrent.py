"""Recurrent layers and cells: nn.RNN, GRU, LSTM and their cells, whose functions hide the projections; these forms show
them, one for each time step.

The noise is on the gates before their activations, which are linear in all parameters: a step is a linear layer of
[x_t, h_t-1] with the columns [W_ih W_hh], so that one eps is the score of both weights and both biases. A GRU's new gate
tanh(a + r * b) is no function of a + b: its two parts, a of the input and b of the state, have columns of their own, in
which all parameters are linear again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import wrap_torch_function

from ulr_kernels.nn import linear
from ulr_kernels.nn.call import Call, Origin
from ulr_kernels.nn.local import RowsCall

# Functions of this file that modes see as one, as they see torch's.
_seen = wrap_torch_function(lambda first, *_: (first,))


@_seen
def projection(x: Tensor, weight: Tensor, bias: Tensor | None, time: int | None) -> Tensor:
    """`F.linear` in a time step."""
    return F.linear(x, weight, bias)


@_seen
def initial(state: Tensor, x: Tensor) -> Tensor:
    """A first state, which has a row for each sample of x, be it of zeros that no sample made or of a parameter."""
    return state.clone()


@_seen
def _rnn_tanh(gates: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    return (torch.tanh(gates),)


@_seen
def _rnn_relu(gates: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    return (torch.relu(gates),)


@_seen
def _gru(gates: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    r, z, of_input, of_state = gates.chunk(4, 1)
    n = torch.tanh(of_input + torch.sigmoid(r) * of_state)
    return (n + torch.sigmoid(z) * (h - n),)


@_seen
def _lstm(gates: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    i, f, g, o = gates.chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _side_by_side(weight_ih: Tensor, weight_hh: Tensor, *biases: Tensor | None) -> tuple[Tensor, Tensor | None]:
    of_input, of_state = biases or (None, None)
    bias = None if of_input is None or of_state is None else of_input + of_state
    return torch.cat((weight_ih, weight_hh), 1), bias


def _new_gate_apart(weight_ih: Tensor, weight_hh: Tensor, *biases: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Of the gates r and z, of the new gate's part that the input makes, and of that which the state makes."""
    weight, bias = _side_by_side(weight_ih, weight_hh, *biases)
    (inputs, states), gates = (weight_ih.shape[1], weight_hh.shape[1]), 2 * weight_ih.shape[0] // 3
    new = F.pad(weight_ih[gates:], (0, states)), F.pad(weight_hh[gates:], (inputs, 0))
    if bias is not None:
        bias = torch.cat((bias[:gates], *(each[gates:] for each in biases if each is not None)))
    return torch.cat((weight[:gates], *new)), bias


class Cell(NamedTuple):
    """A kind of cell.

    Attributes:
        joined: (W_ih, W_hh, b_ih, b_hh) -> the weight and the bias of its gates.
        update: (gates, h, ...) -> the new states, h first.
    """

    joined: Callable
    update: Callable

    def step(self, x: Tensor, states: tuple[Tensor, ...], weights: Any, time: int | None) -> tuple[Tensor, ...]:
        """The states after a time step; `weights`: those of the gates, and of the projection of h or None."""
        weight, bias, of_h = weights
        h, *rest = self.update(projection(torch.cat((x, states[0]), 1), weight, bias, time), *states)
        return h if of_h is None else projection(h, of_h, None, time), *rest


CELLS = {
    "rnn_tanh": Cell(_side_by_side, _rnn_tanh),
    "rnn_relu": Cell(_side_by_side, _rnn_relu),
    "gru": Cell(_new_gate_apart, _gru),
    "lstm": Cell(_side_by_side, _lstm),
}


def _layers(cell: Cell) -> Callable:
    def form(*args: Any, **others: Any) -> Any:
        """`torch.lstm` and the like, as nn's modules call them; `NotImplemented` for packed sequences."""
        if others or not isinstance(args[3], bool) or args[0].dim() != 3:
            return NotImplemented
        x, given, parameters, biases, layers, dropout, training, bidirectional, batch_first = args
        x = x if batch_first else x.transpose(0, 1)
        given = (given,) if isinstance(given, Tensor) else given
        first = [initial(each.transpose(0, 1), x).unbind(1) for each in given]
        count = len(parameters) // len(first[0])  # of a layer in one direction
        last: list[tuple[Tensor, ...]] = []
        for layer in range(layers):
            if layer and dropout and training:
                x = F.dropout(x, dropout)
            outputs = []
            for direction in range(2 if bidirectional else 1):
                place = len(last)
                own = parameters[place * count : (place + 1) * count]
                gates, others = own[: 4 if biases else 2], own[4 if biases else 2 :]
                weights = *cell.joined(*gates), others[0] if others else None
                states, steps = tuple(each[place] for each in first), x.unbind(1)
                made = []
                for time, x_t in enumerate(reversed(steps) if direction else steps):
                    states = cell.step(x_t, states, weights, time)
                    made.append(states[0])
                last.append(states)
                outputs.append(torch.stack(made[::-1] if direction else made, 1))
            x = torch.cat(outputs, 2) if bidirectional else outputs[0]
        return x if batch_first else x.transpose(0, 1), *(torch.stack(each) for each in zip(*last, strict=True))

    return form


def _cell(cell: Cell) -> Callable:
    def form(x: Tensor, given: Any, *parameters: Tensor | None, **others: Any) -> Any:
        """`torch.lstm_cell` and the like, as nn's modules call them."""
        if others:
            return NotImplemented
        given = (given,) if isinstance(given, Tensor) else given
        states = tuple(initial(each, x) for each in given)
        states = cell.step(x, states, (*cell.joined(*parameters), None), None)
        return states if len(states) > 1 else states[0]

    return form


def _projection(args: tuple, kwargs: dict[str, Any], origin: Origin) -> Call | None:
    *given, time = args
    call = linear.READERS[F.linear](tuple(given), kwargs, origin)
    if call is not None:
        call.time = time
    return call


def _initial(args: tuple, kwargs: dict[str, Any], origin: Origin) -> Call | None:
    owned = origin(args[0])
    return None if owned is None else RowsCall(owned)


READERS = {projection: _projection, initial: _initial}
COMPOSITES = {getattr(torch, name): _layers(cell) for name, cell in CELLS.items()} | {
    getattr(torch, f"{name}_cell"): _cell(cell) for name, cell in CELLS.items()
}
