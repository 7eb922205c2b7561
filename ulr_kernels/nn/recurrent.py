"""Recurrent layers and cells: nn.RNN, GRU, LSTM. torch's function is one call for all time steps; here each is a call.

A step of an RNN or a GRU is a function with one output, the new state, which gets the noise; torch's derivative of the
cell takes the score back to its parameters. A GRU's gates have four times as many numbers (its new gate tanh(a + r * b)
is no function of a + b), and noise there needs four times the copies.

An LSTM's cell has two outputs. Its noise is on the gates before their activations: a linear layer of [x_t, h_t-1] with
the columns [W_ih W_hh], so that one eps is the score of both weights and both biases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import wrap_torch_function

from ulr_kernels import ops
from ulr_kernels.nn import linear
from ulr_kernels.nn.call import Call, ParametersOf
from ulr_kernels.nn.generic import AutogradCall, RowsCall
from ulr_kernels.noise_contract import score

States = tuple[Tensor, ...]
_seen: Callable = wrap_torch_function(lambda x, *_: (x,))  # modes see a function of this file as they see torch's


@_seen
def initial(state: Tensor, x: Tensor) -> Tensor:
    """A first state with a row for each sample of x, made of zeros or of a parameter."""
    return state.clone()


def _initial(args: tuple, kwargs: dict[str, Any], parameters_of: ParametersOf) -> RowsCall | None:
    derived = parameters_of(args[0])
    return None if derived is None else RowsCall(derived)


# --- RNN and GRU: noise on the new state -----------------------------------------------------------------------------


class StateCall(AutogradCall):
    """A new state of a cell. One derivative gives the gradients of all copies, as steps are small and many."""

    def _scores(self, loss_weight: Tensor, draw: int, log_sigma: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
        if self._shared:
            yield from super()._scores(loss_weight, draw, log_sigma)
            return
        self._add_log_sigma(loss_weight, draw, log_sigma)
        noise, copies = self.noise, len(loss_weight)
        nothing = torch.full(self._shape, -0.0, device=loss_weight.device)  # to which -0. adds up to -0.
        eps = ops.noise_add(nothing, 1.0, noise.key, copies=copies, draw=draw, **self._spec(1))
        scores = score(eps, noise.dist) * (loss_weight / noise.sigma).unsqueeze(-1)
        yield scores.flatten(0, 1), *self._operands


@_seen
def new_state(x: Tensor, h: Tensor, cell: Callable, weights: list[Tensor], time: int) -> Tensor:
    """The new state of a cell after a time step."""
    return cell(x, h, *weights)


def _new_state(args: tuple, kwargs: dict[str, Any], parameters_of: ParametersOf) -> StateCall | None:
    x, h, cell, weights, time = args
    call = _cell_reader(cell)((x, h, *weights), kwargs, parameters_of)
    if call is not None:
        call.time = time
    return call


def _cell_reader(cell: Callable) -> Callable:
    def read(args: tuple, kwargs: dict[str, Any], parameters_of: ParametersOf) -> StateCall | None:
        x, state, *weights = args
        if kwargs or parameters_of(x) or parameters_of(state):
            return None
        derived = [each for each in map(parameters_of, weights) if each is not None]
        return StateCall(
            cell, args, kwargs, [x, state], derived
        )  # a state has rows, be it of zeros that no sample made

    return read


def _steps_of(cell: Callable) -> Callable:
    def prepared(weights: list[Tensor], biases: bool) -> Callable:
        return lambda x, states, time: (new_state(x, *states, cell, weights, time),)

    return prepared


# --- LSTM: noise on the gates ----------------------------------------------------------------------------------------


@_seen
def projection(x: Tensor, weight: Tensor, bias: Tensor | None, time: int | None) -> Tensor:
    """`F.linear` in a time step; None: in a cell, whose steps are calls."""
    return F.linear(x, weight, bias)


def _projection(args: tuple, kwargs: dict[str, Any], parameters_of: ParametersOf) -> Call | None:
    *given, time = args
    call = linear.READERS[F.linear](tuple(given), kwargs, parameters_of)
    if call is not None:
        call.time = time
    return call


@_seen
def _lstm_states(gates: Tensor, c: Tensor) -> States:
    i, f, g, o = gates.chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _lstm_steps(weights: list[Tensor], biases: bool) -> Callable:
    """A step (x, (h, c), t) -> (h, c); an odd number of weights ends with the projection of h."""
    weight = torch.cat(weights[:2], 1)
    bias = weights[2] + weights[3] if biases else None
    of_h = weights[-1] if len(weights) % 2 else None

    def step(x: Tensor, states: States, time: int | None) -> States:
        h, c = _lstm_states(projection(torch.cat((x, states[0]), 1), weight, bias, time), states[1])
        return h if of_h is None else projection(h, of_h, None, time), c

    return step


def lstm_cell(x: Tensor, given: States, *weights: Tensor | None, **others: Any) -> Any:
    """`torch.lstm_cell`, as nn.LSTMCell calls it."""
    if others:
        return NotImplemented
    used = [each for each in weights if each is not None]
    return _lstm_steps(used, len(used) == 4)(x, tuple(initial(each, x) for each in given), None)


# --- layers of either ------------------------------------------------------------------------------------------------


def _layers(steps: Callable) -> Callable:
    """The form of torch's function; `steps(weights, biases)` gives a layer's step, (x, states, t) -> new states."""

    def form(*args: Any, **others: Any) -> Any:
        """`torch.lstm` and the like, as nn's modules call them; `NotImplemented` for packed sequences."""
        if others or not isinstance(args[3], bool) or args[0].dim() != 3:
            return NotImplemented
        x, given, weights, biases, layers, dropout, training, bidirectional, batch_first = args
        x = x if batch_first else x.transpose(0, 1)
        given = (given,) if isinstance(given, Tensor) else given
        first = [initial(each.transpose(0, 1), x).unbind(1) for each in given]
        directions = 2 if bidirectional else 1
        count = len(weights) // (layers * directions)
        last: list[States] = []
        for layer in range(layers):
            if layer and dropout and training:
                x = F.dropout(x, dropout)
            outputs = []
            for backward in range(directions):
                place = len(last)
                step = steps(weights[place * count : (place + 1) * count], biases)
                states, made = tuple(each[place] for each in first), []
                for time, x_t in enumerate(reversed(x.unbind(1)) if backward else x.unbind(1)):
                    states = step(x_t, states, time)
                    made.append(states[0])
                last.append(states)
                outputs.append(torch.stack(made[::-1] if backward else made, 1))
            x = torch.cat(outputs, 2) if bidirectional else outputs[0]
        return x if batch_first else x.transpose(0, 1), *(torch.stack(each) for each in zip(*last, strict=True))

    return form


CELLS = (torch.rnn_tanh_cell, torch.rnn_relu_cell, torch.gru_cell)
READERS = {initial: _initial, new_state: _new_state, projection: _projection} | {
    cell: _cell_reader(cell) for cell in CELLS
}
COMPOSITES = {
    torch.rnn_tanh: _layers(_steps_of(torch.rnn_tanh_cell)),
    torch.rnn_relu: _layers(_steps_of(torch.rnn_relu_cell)),
    torch.gru: _layers(_steps_of(torch.gru_cell)),
    torch.lstm: _layers(_lstm_steps),
    torch.lstm_cell: lstm_cell,
}
