"""How a model is met: one file per layer type, each with a table of the torch functions that its layers call.

A table maps a torch function to a reader, `read(args, kwargs, origin) -> Call or None` (base class: `nn/call.py`).
`origin` tells what a tensor owes to parameters alone: it is one, or is computed from some (a transpose, a slice, a
reparametrised weight), or neither. Functions that no table has are met by `LocalCall`.

Nothing in the model is rewritten: `torch.overrides.TorchFunctionMode` shows these calls as they happen.
"""

from collections.abc import Callable
from typing import Any

from ulr_kernels.nn import attention, conv, embedding, linear, norm, recurrent

READERS: dict[Any, Callable] = {
    **linear.READERS,
    **conv.READERS,
    **norm.READERS,
    **embedding.READERS,
    **recurrent.READERS,
}
COMPOSITES: dict[Any, Callable] = {**attention.COMPOSITES, **recurrent.COMPOSITES}
LOOPS = recurrent.COMPOSITES.keys()  # shown only for noise inside: torch's own functions are faster
