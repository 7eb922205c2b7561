"""How a model is set while noised passes run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import nn


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block, each module's own flag again after it; compiled parts run as they were written.

    A compiled graph hides its calls. The compiler is asked only where it is imported already, which takes seconds.
    """
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
