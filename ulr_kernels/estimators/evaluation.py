"""How a model is set while noised passes run."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator

import torch
from torch import nn


@functools.cache
def _expect_activations() -> None:
    """Let glibc keep the activations that one pass frees for the next one's: free a large block once, never touched.

    Blocks larger than any that it has seen freed come from the kernel, and freed memory of more than twice that goes
    back, so that each pass would fault its activations in again, page by page. Now the limits are the highest that
    glibc sets by itself, 32 and 64 MiB. Where they are set by hand, and in other C libraries, this does nothing.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")  # 32 MiB with what malloc adds


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, each module's own flag again after it; compiled parts run as they were written.

    A compiled graph hides its calls. The compiler is asked only where it is imported already, which takes seconds.
    """
    _expect_activations()
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
