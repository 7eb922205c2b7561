"""Eval mode for the forwards of a step."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator

import torch
from torch import nn


@functools.cache
def _keep_freed_memory() -> None:
    """Let glibc keep freed activations for the next forward: free one large block, which is never touched.

    glibc takes blocks larger than any freed before from the kernel, and gives back freed memory of more than twice that
    size, so that each forward would fault its activations in again, page by page. After this the two limits are the
    highest that glibc sets by itself, 32 and 64 MiB. Nothing changes where they are set by hand, or in another C
    library.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")  # 32 MiB with malloc's header


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, and each module's own flag again after it. Compiled parts run uncompiled.

    A compiled graph hides its calls. torch's compiler is set only if it is imported already: that takes seconds.
    No `train` method is called: `ModuleState` calls those that modules have of their own.
    """
    _keep_freed_memory()
    training = [module for module in model.modules() if module.training]
    with contextlib.ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
