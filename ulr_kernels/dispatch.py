"""The table of back ends: which provider runs an op on a device, and why each other one is absent.

A provider is a function of an op's output (if it has one) and its bound arguments (`Op.arguments`). Four back ends have
providers: `torch` (the references in `ops/`), `cpp`, `cuda` and `triton`. The first call of an op on a device takes the
first back end of the order below that can run it, and later calls find it in a dictionary. An explicit request
(`use_backend`) never falls back.
"""

from __future__ import annotations

import contextlib
import contextvars
import importlib
from collections.abc import Callable, Iterator

import torch

ORDER = {"cpu": ("cpp", "torch"), "cuda": ("cuda", "triton", "torch")}
NAMES = ("torch", "cpp", "cuda", "triton")

_references: dict[str, Callable] = {}
_chosen: dict[tuple[str, torch.device], Callable] = {}  # one GPU of a machine may run what another cannot
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("ulr_backend", default=None)


class BackendError(RuntimeError):
    """The requested back end cannot run this op here; the message says why."""


def allocating(provider: Callable) -> Callable:
    """Mark a provider that takes an `ops._op.Output`, not a tensor, and allocates and returns the output itself.

    It is for providers whose output is the result of another library's product, which would allocate it again.
    """
    provider.allocates = True  # type: ignore[attr-defined]
    return provider


def add_op(name: str, reference: Callable) -> None:
    """Enter an op, with its torch provider, which runs on every device."""
    _references[name] = reference


def op_names() -> list[str]:
    return sorted(_references)


def find(backend: str, op: str, device: torch.device | str) -> Callable | str:
    """The provider, or a sentence on why there is none."""
    if backend == "torch":
        return _references[op]
    # backends/cpp, cuda and triton each have provider(op, device) -> a function, or a sentence on why there is none.
    return importlib.import_module(f"ulr_kernels.backends.{backend}").provider(op, torch.device(device))


def lookup(op: str, device: torch.device) -> Callable:
    """The provider that runs `op` on tensors of `device` now."""
    forced = _forced.get()
    if forced is not None:
        found = find(forced, op, device)
        if isinstance(found, str):
            raise BackendError(f"ulr::{op}: back end '{forced}' cannot run on {device}: {found}")
        return found
    provider = _chosen.get((op, device))
    if provider is None:
        provider = _chosen[op, device] = next(
            p for p in (find(name, op, device) for name in ORDER[device.type]) if not isinstance(p, str)
        )
    return provider


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on one back end: "torch", "cpp", "cuda" or "triton".

    Raises:
        ValueError: the name is unknown.
        BackendError: (from the op's call) the back end cannot run that op on that device; the message says why.
    """
    if name not in NAMES:
        raise ValueError(f"ulr.use_backend: 'name' must be one of {', '.join(NAMES)}, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
