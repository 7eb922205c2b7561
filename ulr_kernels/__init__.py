"""Training without a backward pass: gradients from noise that kernels make in registers and never store."""

import torch

from ulr_kernels._version import __version__, old_torch

try:
    from ulr_kernels import ops, optim
    from ulr_kernels.check import check
    from ulr_kernels.dispatch import BackendError, use_backend
    from ulr_kernels.doctor import describe
    from ulr_kernels.estimators import ULR, output_loss
    from ulr_kernels.noise_contract import fold_in
    from ulr_kernels.ops import noise, noise_like, philox4x32
except Exception as error:
    if sentence := old_torch(torch.__version__):
        raise ImportError(f"{sentence}: {error}") from None
    raise

__all__ = [
    "ULR",
    "BackendError",
    "__version__",
    "check",
    "describe",
    "fold_in",
    "noise",
    "noise_like",
    "ops",
    "optim",
    "output_loss",
    "philox4x32",
    "use_backend",
]
