"""Sharded parameters: the part that a rank holds, and its place in the noise of the whole."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from torch import Tensor, nn
from typing_extensions import TypeIs

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Shard(NamedTuple):
    """The part of a parameter that this process holds, and its first row and column in the whole one's noise.

    width: the columns of the whole one's noise; 0: as many as the part has.
    """

    tensor: Tensor
    row_offset: int = 0
    col_offset: int = 0
    width: int = 0


def is_sharded(parameter: Tensor) -> TypeIs[DTensor]:
    """Whether a parameter is a DTensor, as FSDP2 and tensor parallelism hold theirs."""
    module = sys.modules.get("torch.distributed.tensor")  # not imported: there is none
    return module is not None and isinstance(parameter, module.DTensor)


def shard(parameter: Tensor) -> Shard:
    """The local part of a DTensor; any other tensor is whole.

    Raises:
        ValueError: a part that is no range of rows or of columns of the parameter's noise.
    """
    if not is_sharded(parameter):
        return Shard(parameter)
    from torch.distributed.tensor import Shard as Split

    sizes, starts = list(parameter.shape), [0] * parameter.dim()
    coordinate = parameter.device_mesh.get_coordinate() or ()
    for axis, placement in enumerate(parameter.placements):
        if placement.is_replicate():
            continue
        if type(placement) is not Split:
            _refuse(parameter)
        # As torch.chunk deals: all parts of one size but for the last ones.
        size = -(-sizes[placement.dim] // parameter.device_mesh.size(axis))
        start = min(coordinate[axis] * size, sizes[placement.dim])
        starts[placement.dim] += start
        sizes[placement.dim] = min(size, sizes[placement.dim] - start)
    if parameter.dim() < 2:
        return Shard(parameter.to_local(), 0, sum(starts), parameter.numel())
    if any(size != whole for size, whole in zip(sizes[2:], parameter.shape[2:], strict=True)):
        _refuse(parameter)
    col_offset, width = starts[1] * math.prod(parameter.shape[2:]), math.prod(parameter.shape[1:])
    return Shard(parameter.to_local(), starts[0], col_offset, width)


def _refuse(parameter: DTensor) -> NoReturn:
    raise ValueError(
        "ulr.optim: a sharded parameter must be split along its first two axes only, evenly as torch.chunk does, got "
        f"{list(parameter.shape)} with {parameter.placements}"
    )


def like(parameter: DTensor, local: Tensor) -> Tensor:
    """A DTensor of other values, laid out as `parameter`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def drop_gathered(model: nn.Module) -> None:
    """Let FSDP2 forget the whole parameters that it kept for a backward pass: they are those before an update."""
    module = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing is sharded by it
    if module is not None:
        for part in model.modules():
            if isinstance(part, module.FSDPModule):
                part.reshard()
