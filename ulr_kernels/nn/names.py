"""Names of layers and parameters: qualified names, without the prefixes that wrappers put before them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_PER_FEATURE_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel or DistributedDataParallel; parameters are the same objects."""
    *_, module = unwrapping(model)
    return module


def unwrapping(model: nn.Module) -> Iterator[nn.Module]:
    """A module, and the module inside each wrapper, from the outermost on."""
    inner: nn.Module | None = model
    while inner is not None:
        yield inner
        if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = inner.module
        else:  # recognised by an attribute: naming the compiler's class would import it, which takes seconds
            compiled = getattr(inner, "_orig_mod", None)
            inner = compiled if isinstance(compiled, nn.Module) else None


def parameter_names(model: nn.Module) -> dict[int, str]:
    """id(parameter) -> its qualified name; a tied parameter has the first of its names."""
    return {id(parameter): _strip(name) for name, parameter in model.named_parameters()}


def padding_rows(model: nn.Module) -> dict[str, int]:
    """Name of a table -> its row for padding (`padding_idx`), which no gradient reaches; of tables that have one."""
    names = parameter_names(model)
    rows: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None:
            if (name := names.get(id(module._parameters.get("weight")))) is not None:
                rows[name] = module.padding_idx
    return rows


def layer_names(model: nn.Module) -> dict[int, str]:
    """id(parameter) -> the name of its layer.

    A module whose own parameters are called `weight` and `bias` is a layer, and gives them its name; if its weight is
    tied to another layer's, it has that layer's name. Any other parameter is a layer of its own name.
    """
    names = parameter_names(model)
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if own.keys() <= {"weight", "bias"}:
            full = {name: _strip(f"{path}.{name}" if path else name) for name in own}
            tied = "weight" in own and names[id(own["weight"])] != full["weight"]
            layer = names[id(own["weight"])] if tied else _strip(path)
            for name, parameter in own.items():
                if names[id(parameter)] == full[name]:
                    names[id(parameter)] = layer
    return names


def recurrent_modules(model: nn.Module) -> dict[str, str]:
    """Layer -> the recurrent module that it belongs to, of layers that do: each of its parameters is one."""
    layers, names = layer_names(model), parameter_names(model)
    modules = ((path, m) for path, m in model.named_modules() if isinstance(m, nn.RNNBase | nn.RNNCellBase))
    return {layers[id(p)]: _strip(path) for path, m in modules for p in m.parameters() if id(p) in names}


def features(model: nn.Module) -> dict[int, torch.Size]:
    """id(parameter) -> the shape of its layer's noise scale: `[features]` of the layer's output where each feature can
    have its own, else `[]`, also for a parameter that layers of different features share.
    """
    found: dict[int, torch.Size] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            several_axes = isinstance(module, nn.LayerNorm | nn.RMSNorm) and parameter.dim() > 1
            own = parameter.shape[:1] if isinstance(module, _PER_FEATURE_LAYERS) and not several_axes else torch.Size()
            found[id(parameter)] = own if found.get(id(parameter), own) == own else torch.Size()
    return found


def _strip(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def value_of_layer(values: Mapping[str, Any], layer: str) -> Any:
    """The value of a layer in a mapping from names: its own, or that of the smallest module around it, or None."""
    return next((values[name] for name in _with_modules(layer) if name in values), None)


def unknown_names(values: Mapping[str, Any], layers: set[str]) -> list[str]:
    """The names in a mapping that are neither a layer's nor those of a module with layers."""
    return sorted(set(values) - {name for layer in layers for name in _with_modules(layer)})


def _with_modules(layer: str) -> Iterator[str]:
    """A layer's name, and those of the modules around it, up to "", the model."""
    yield layer
    while layer:
        layer = layer.rpartition(".")[0]
        yield layer
