"""Names of noise sites: qualified names of modules and parameters, without the prefixes that wrappers put."""

from __future__ import annotations

from torch import nn

WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel or DistributedDataParallel; parameters are the same objects."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled  # known by its attribute: to name its class would import the compiler, which takes seconds
        else:
            return model


def parameter_names(model: nn.Module) -> dict[int, str]:
    """id(parameter) -> its qualified name; a tied parameter has its first one."""
    return {id(parameter): _strip(name) for name, parameter in model.named_parameters()}


def layer_names(model: nn.Module) -> dict[int, str]:
    """id(parameter) -> the name of its layer: that of its module for nn.Linear, else the parameter's own."""
    names = parameter_names(model)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            for name, parameter in module.named_parameters(recurse=False):
                if names[id(parameter)] == _strip(f"{path}.{name}" if path else name):
                    names[id(parameter)] = _strip(path)
    return names


def _strip(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPED)
