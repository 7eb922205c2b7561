"""Watch for a model's modules that run in another thread: torch's modes see the functions of their own thread only."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

_CALL = nn.Module._call_impl.__code__


@contextlib.contextmanager
def refuse_other_threads(modules: Sequence[nn.Module], owner: str) -> Iterator[None]:
    """Raise at the end of the block if one of these modules ran in another thread within it.

    Threads that start inside the block are watched by their own calls. A hook of all modules, which costs about a
    microsecond a call, watches those that are alive before it, if there are any.

    Raises:
        ValueError: one did. Functions of parameters outside modules are not seen.
    """
    here, seen = threading.get_ident(), list[nn.Module]()

    def note(module: nn.Module, args: Any = None) -> None:
        if threading.get_ident() != here and any(module is own for own in modules):
            seen.append(module)

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if done:
            sys.setprofile(None)
        elif event == "call" and frame.f_code is _CALL:
            note(frame.f_locals["self"])

    done, before = False, threading.getprofile()
    hook = register_module_forward_pre_hook(note) if threading.active_count() > 1 else None
    threading.setprofile(profile)
    try:
        yield
    finally:
        done = True
        threading.setprofile(before)  # type: ignore[arg-type]
        if hook is not None:
            hook.remove()
    if seen:
        raise ValueError(
            f"{owner}: 'closure' must run the model in the thread that it is called in, as no noise reaches another "
            f"thread, got {type(seen[0]).__name__} in another"
        )
