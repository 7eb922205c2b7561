"""Random numbers in a forward of several copies: the rows of all copies draw the same ones, as if each ran alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree

_FILLS = {
    getattr(Tensor, f"{name}_")
    for name in "bernoulli cauchy exponential geometric log_normal normal random uniform".split()
}
_OF_TENSORS = _FILLS | {
    torch.rand_like, torch.randn_like, torch.randint_like, torch.bernoulli, Tensor.bernoulli, torch.binomial,
    torch.multinomial, Tensor.multinomial, torch.normal, torch.poisson, torch.dropout, F.dropout, F.dropout1d,
    F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, F.gumbel_softmax, F.rrelu,
}  # fmt: skip
_OF_SIZES = {torch.rand, torch.randn, torch.randint, torch.normal}
_DRAWS = _OF_TENSORS | _OF_SIZES


def draw_rows(
    func: Callable,
    args: tuple,
    kwargs: dict[str, Any],
    copies: int,
    rows: int,
    holds_samples: Callable[[Tensor], bool],
) -> Any:
    """The result of a function that draws random numbers for `rows` rows, those of all copies; else NotImplemented.

    A row count that is no number of samples is found by the comparison with a forward of one copy.
    """
    if func not in _DRAWS:
        return NotImplemented
    if func in _OF_SIZES and (sized := _with_rows(args, kwargs, rows, rows // copies)) is not None:
        own = func(*sized[0], **sized[1])
        return own.repeat(copies, *(1,) * (own.dim() - 1))
    if func not in _OF_TENSORS:
        return NotImplemented
    leaves = [leaf for leaf in _pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    parts = {
        id(leaf): leaf.unflatten(0, (copies, -1)).unbind()
        for leaf in leaves
        if leaf.dim() and leaf.shape[0] % rows == 0 and (leaf.shape[0] == rows or holds_samples(leaf))
    }
    if not parts:
        return NotImplemented
    generator = kwargs.get("generator") or _generator(leaves[0].device)
    state, results = generator.get_state(), []
    for number in range(copies):
        generator.set_state(state)
        own_args, own_kwargs = _pytree.tree_map(
            lambda leaf, number=number: parts[id(leaf)][number] if id(leaf) in parts else leaf, (args, kwargs)
        )
        results.append(func(*own_args, **own_kwargs))
    return args[0] if func in _FILLS or kwargs.get("inplace") else torch.cat(results)


def _with_rows(
    args: tuple, kwargs: dict[str, Any], rows: int, own: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments with `own` rows in the place of `rows`; None if the size has another first number."""
    if args and all(type(arg) is int for arg in args) and "size" not in kwargs:  # rand(2, 3)
        return ((own, *args[1:]), kwargs) if args[0] == rows else None
    found = kwargs.get("size", next((arg for arg in args if isinstance(arg, tuple | list)), None))
    if not found or found[0] != rows:
        return None
    size = (own, *found[1:])
    if "size" in kwargs:
        return args, {**kwargs, "size": size}
    return tuple(size if arg is found else arg for arg in args), kwargs


def _generator(device: torch.device) -> torch.Generator:
    if device.type != "cuda":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
