"""Layer types: one file for each, with a table of the torch functions that its layers call.

A table maps a torch function to a reader, `read(args, kwargs, parameters_of) -> Call or None` (base class:
`nn/call.py`). `parameters_of` gives the parameters that a tensor was computed from, if no sample was involved (a
transpose, a slice, a reparametrised weight). Functions that no table has become an `AutogradCall` (`nn/generic.py`).

Nothing in the model is rewritten: `torch.overrides.TorchFunctionMode` shows these calls as they happen
(`nn/interceptor.py`).
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
# These run by their form only for noise inside: torch's functions are faster.
RECURRENT_FUNCTIONS = recurrent.COMPOSITES.keys()
