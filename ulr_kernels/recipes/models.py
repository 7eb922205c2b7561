"""The models that recipes train, initialised from a seed and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from ulr_kernels import contract
from ulr_kernels.ops import noise_like

_INITIAL_VALUES = contract.site_id("ulr_kernels.recipes.models")  # keeps their noise apart from that of every step


def mlp(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Pixels-256-128-classes with ReLU."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


MODELS: dict[str, Callable[[tuple[int, int, int], int], nn.Module]] = {"mlp": mlp}


def build(name: str, shape: tuple[int, int, int], classes: int, seed: int, device: torch.device) -> nn.Module:
    """A model with initial values that depend on `seed` alone: not on torch's generators, the device or the back end.

    Weights are normal with variance 2 / fan-in (He et al., *Delving deep into rectifiers*, 2015); biases are zero.

    Args:
        name: a key of `MODELS`.
        shape: channels, height, width of an image.
        classes: the number of outputs.
        seed: any integer that is a key.
    """
    with torch.device("meta"):  # torch's own initial values would come from, and advance, its global generator
        model = MODELS[name](shape, classes)
    model.to_empty(device=device)
    with torch.no_grad():
        for site, parameter in model.named_parameters():
            if parameter.dim() > 1:
                key = contract.fold_in(contract.fold_in(seed, _INITIAL_VALUES), contract.site_id(site))
                parameter.copy_(noise_like(parameter, key) * math.sqrt(2 / parameter[0].numel()))
            else:
                parameter.zero_()
    return model
