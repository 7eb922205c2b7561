"""How a model is met: one file per layer type, each with a table of the torch functions that its layers call.

A table maps a torch function to a reader, `read(args, kwargs, origin) -> call or None`. `origin` tells which parameter
a tensor is, and whether it is that parameter's transpose. The call that a reader returns is what the estimator uses:

    call.x                   the input
    call.parameters          the layer's own parameters, the one that names it first; empty if it has none
    call.clean()             the layer's output
    call.noised(...)         the output of C copies, with noise
    call.check_unchanged()   raises if its input was modified in place since
    call.add_gradient(...)   the likelihood-ratio gradient, added to `.grad` of the trainable parameters

Nothing in the model is rewritten: `torch.overrides.TorchFunctionMode` shows these calls as they happen.
"""

from ulr_kernels.nn import linear

READERS = {**linear.READERS}
