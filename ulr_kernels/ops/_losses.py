"""Losses and activations that ops with a whole step know by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ulr_kernels.ops._op import Check

LOSSES = ("cross_entropy", "squared", "zero_one")
ACTIVATIONS = ("relu", "tanh", "sigmoid", "step")


def check_target(check: Check, loss: str, target: Tensor, rows: int, features: int, inputs: torch.dtype) -> None:
    if loss not in LOSSES:
        check.fail("loss", f"be one of {', '.join(LOSSES)}", repr(loss))
    if loss == "squared":
        check.dtype("target", target, (torch.float32,) if inputs == torch.float32 else (inputs, torch.float32))
        check.shape("target", target, (rows, features), "one row per sample, as many values as the model's outputs")
    else:
        check.dtype("target", target, (torch.int64,))
        check.shape("target", target, (rows,), "one class per sample")


def activate_(y: Tensor, activation: str) -> Tensor:
    """In place."""
    if activation == "relu":
        return y.relu_()
    if activation == "tanh":
        return y.tanh_()
    return y.sigmoid_() if activation == "sigmoid" else y.gt_(0)


def losses_of(logits: Tensor, target: Tensor, loss: str) -> Tensor:
    """The loss of each row, fp32 `[..., R]`, of logits `[..., R, N]`; NaN where a class is not one of the N."""
    logits = logits.to(torch.float32)
    if loss == "squared":
        return (logits - target).square().mean(-1)
    known = (target >= 0) & (target < logits.shape[-1])
    target = target.where(known, 0).expand(logits.shape[:-1])
    if loss == "zero_one":
        losses = (logits.argmax(-1) != target).to(torch.float32)
    else:
        losses = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)
    return losses.where(known, torch.nan)
