"""Custom functions of torch.autograd, made visible to modes: torch itself calls them past every override."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

from torch.autograd import Function
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils.checkpoint import CheckpointFunction


@dataclasses.dataclass(frozen=True)
class AutogradFunction:
    """The `apply` of a custom function, as a function that a mode gets."""

    cls: type[Function]

    @property
    def __name__(self) -> str:
        return self.cls.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _apply(self.cls, *args, **kwargs)

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Torch's own `apply`: a mode that is on sees the functions inside instead of this one."""
        return super(_BASE, self.cls).apply(*args, **kwargs)  # type: ignore[misc]


_BASE: Any = Function.__bases__[0]  # `Function.apply` ends in that of its base, also where a model kept it by a name
_lock = threading.Lock()
_users = 0


def _apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
    if not has_torch_function(args):  # no mode is on
        return AutogradFunction(cls).apply(*args, **kwargs)
    if cls is CheckpointFunction:  # it would hide the layers of the function that it is given
        run, _, *inputs = args
        return run(*inputs)
    return handle_torch_function(AutogradFunction(cls), args, *args, **kwargs)


@contextlib.contextmanager
def overridable_autograd_functions() -> Iterator[None]:
    """Inside the block modes see `torch.autograd.Function.apply` as they see torch's own functions."""
    global _users
    with _lock:
        _users += 1
        _BASE.apply = classmethod(_apply)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                del _BASE.apply
