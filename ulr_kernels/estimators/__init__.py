"""Gradient estimators that need forward passes only."""

from ulr_kernels.estimators.output_loss import output_loss
from ulr_kernels.estimators.ulr import ULR

__all__ = ["ULR", "output_loss"]
