"""Names of noise sites: qualified names of modules and parameters, without the prefixes that wrappers put."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_BY_FEATURE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel or DistributedDataParallel; parameters are the same objects."""
    *_, module = unwrapping(model)
    return module


def unwrapping(model: nn.Module) -> Iterator[nn.Module]:
    """A module, and what is inside each wrapper, from the outermost on."""
    inner: nn.Module | None = model
    while inner is not None:
        yield inner
        if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = inner.module
        else:  # known by its attribute: to name the compiler's class would import it, which takes seconds
            compiled = getattr(inner, "_orig_mod", None)
            inner = compiled if isinstance(compiled, nn.Module) else None


def parameter_names(model: nn.Module) -> dict[int, str]:
    """id(parameter) -> its qualified name; a tied parameter has its first one."""
    return {id(parameter): _strip(name) for name, parameter in model.named_parameters()}


def layer_names(model: nn.Module) -> dict[int, str]:
    """id(parameter) -> the name of its layer.

    A module with no other parameters of its own than `weight` and `bias` is a layer, known by its name, or where its
    weight is another's by that one's; any other parameter is known by its own.
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


def features(model: nn.Module) -> dict[int, torch.Size]:
    """id(parameter) -> `[features]` of its layer's output, where the noise may have a scale for each; else `[]`, as of
    a parameter that layers of different features share.
    """
    found: dict[int, torch.Size] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            several_axes = isinstance(module, nn.LayerNorm | nn.RMSNorm) and parameter.dim() > 1
            own = parameter.shape[:1] if isinstance(module, _BY_FEATURE) and not several_axes else torch.Size()
            found[id(parameter)] = own if found.get(id(parameter), own) == own else torch.Size()
    return found


def _strip(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPED)
