"""A model as the estimator needs it: its parameters, their names, and which of them have noise themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import nn

from ulr_kernels.errors import fail
from ulr_kernels.nn.names import layer_names, padding_rows, parameter_names, recurrent_modules


@dataclasses.dataclass(frozen=True)
class ModelView:
    """The parameters of a model. Nothing here changes; whether a parameter is trained is read from it each time."""

    model: nn.Module  # without wrappers
    parameters: tuple[nn.Parameter, ...]  # all of them; holding them keeps them alive, as they are matched by identity
    layers: Mapping[int, str]  # id(parameter) -> the name of its layer
    names: Mapping[int, str]  # id(parameter) -> its own name
    noised: Mapping[str, nn.Parameter]  # name -> parameter, those that have noise themselves if they are trained
    followed: tuple[nn.Parameter, ...]  # the other parameters, by which calls of layers are recognised
    recurrent: Mapping[str, str]  # layer -> its recurrent module, whose weights have their noise in one pass
    padding: Mapping[str, int]  # name of a table -> its row for padding, which has no noise and no gradient

    @classmethod
    def of(cls, model: nn.Module, has_noise: Callable[[str], bool]) -> ModelView:
        """The view of a model without wrappers; `has_noise(layer)`: its parameters have noise, not its outputs."""
        parameters, layers, names = tuple(model.parameters()), layer_names(model), parameter_names(model)
        if not parameters:
            fail("model", "have a parameter", "none")
        for p in parameters:
            if isinstance(p, nn.parameter.UninitializedParameter):
                fail("model", "have run once, as lazy modules make their parameters then", f"no {names[id(p)]} yet")
            if p.requires_grad and p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                rule = "have trained parameters of float32, bfloat16 or float16 (model.float())"
                fail("model", rule, f"{names[id(p)]} of {p.dtype}")
        noised = {names[id(p)]: p for p in parameters if has_noise(layers[id(p)])}
        followed = tuple(p for p in parameters if names[id(p)] not in noised)
        recurrent = recurrent_modules(model)
        return cls(model, parameters, layers, names, noised, followed, recurrent, padding_rows(model))

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return self.parameters[0].device

    @property
    def trained(self) -> tuple[bool, ...]:
        """For each parameter whether it is trained now."""
        return tuple(p.requires_grad for p in self.parameters)

    @property
    def noised_layers(self) -> dict[str, str]:
        """Name of each trained parameter with noise -> its layer."""
        return {name: self.layers[id(p)] for name, p in self.noised.items() if p.requires_grad}

    def check_parameters(self) -> None:
        """Raise `RuleError` if the model has other parameters by now."""
        if [*map(id, self.model.parameters())] != [*map(id, self.parameters)]:
            fail("model", "have the parameters that it had (make a new estimator after replacing any)", "other ones")
