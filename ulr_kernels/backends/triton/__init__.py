"""The Triton back end: kernels in Python for NVIDIA GPUs; under TRITON_INTERPRET=1, Triton's interpreter on the CPU.

`noise_contract.py` is the noise contract on tiles, `launch.py` describes a launch, `tiles.py` holds the tiles' sizes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch

# The module of each op. It has the op's launch, `<op>_launch`, or, if there is more to do, its provider, `<op>`.
_MODULES = {
    "philox4x32": "noise",
    "fold_in": "noise",
    "noise": "noise",
    "noise_add": "noise_add",
    "noise_dot": "noise_dot",
    "noise_score": "noise_score",
    "scale_shift_grad_": "scale_shift_grad_",
    "noisy_conv2d": "noisy_conv2d",
    "noisy_conv2d_grad_": "noisy_conv2d_grad_",
    "noisy_conv2d_recompute_": "noisy_conv2d_grad_",
    "noisy_linear": "noisy_linear",
    "perturbed_conv2d": "perturbed_conv2d",
    "perturbed_embedding": "perturbed_embedding",
    "perturbed_linear": "perturbed_linear",
    "noisy_linear_grad_": "noisy_linear_grad_",
    "foreach_noisy_linear_grad_": "foreach_noisy_linear_grad_",
    "noisy_linear_recompute_": "noisy_linear_grad_",
    "perturb_": "parameters",
    "combine_": "parameters",
}


# The reasons why this back end lacks an op.
_WITHOUT = {
    "noisy_mlp_step": "a step in one launch is CUDA C++ alone: the kernel takes a table of layers as an argument, "
    "which Triton cannot pass; ulr.ULR runs the same step op by op",
}


def provider(op: str, device: torch.device) -> Callable | str:
    """The function that runs `op` on tensors of `device`, or a sentence on why there is none."""
    if op not in _MODULES:
        return _WITHOUT.get(op, f"there is no Triton kernel for {op}")
    reason = _absence(device)
    if reason:
        return reason
    module = importlib.import_module(f"{__name__}.{_MODULES[op]}")
    if hasattr(module, op):
        return getattr(module, op)
    return functools.partial(importlib.import_module(f"{__name__}.launch").run, getattr(module, f"{op}_launch"))


def _absence(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import triton

    interpreted = triton.knobs.runtime.interpret
    if device.type == "cpu":
        return None if interpreted else "Triton compiles for GPUs; TRITON_INTERPRET=1 runs its interpreter on the CPU"
    if interpreted:
        return "TRITON_INTERPRET=1 is set, which runs the kernels on the CPU"
    if torch.version.hip is not None:
        return "the kernels contain PTX, which needs an NVIDIA GPU"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None
