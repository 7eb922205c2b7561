"""Recurrent cells with one output: nn.RNNCell, nn.GRUCell. What nn.LSTMCell, nn.LSTM, nn.GRU call has several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ulr_kernels.nn.call import Origin
from ulr_kernels.nn.local import LocalCall


def _reader(func: Callable) -> Callable:
    def read(args: tuple, kwargs: dict[str, Any], origin: Origin) -> LocalCall | None:
        x, state, *weights = args
        if kwargs or origin(x) or origin(state):
            return None
        owned = [each for each in map(origin, weights) if each is not None]
        return LocalCall(func, args, kwargs, [x, state], owned)  # a state has rows, be it of zeros that no sample made

    return read


READERS = {func: _reader(func) for func in (torch.rnn_tanh_cell, torch.rnn_relu_cell, torch.gru_cell)}
