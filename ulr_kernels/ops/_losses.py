"""The losses and activations of noisy_mlp_step, by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ulr_kernels.ops._op import Check

LOSSES = ("cross_entropy", "squared", "zero_one")
ACTIVATIONS = ("relu", "tanh", "sigmoid", "step")


def check_loss(check: Check, loss: str, label_smoothing: float) -> None:
    if loss not in LOSSES:
        check.fail("loss", f"be one of {', '.join(LOSSES)}", repr(loss))
    if not 0 <= label_smoothing <= 1:
        check.fail("label_smoothing", "be between 0 and 1", label_smoothing)
    if label_smoothing and loss != "cross_entropy":
        check.fail("label_smoothing", f"be 0 for the loss {loss!r}", label_smoothing)


def check_target(check: Check, loss: str, target: Tensor, rows: int, features: int, inputs: torch.dtype) -> None:
    if loss == "squared":
        check.dtype("target", target, (torch.float32,) if inputs == torch.float32 else (inputs, torch.float32))
        check.shape("target", target, (rows, features), "one row per sample, as many values as the model's outputs")
    else:
        check.dtype("target", target, (torch.int64,))
        check.shape("target", target, (rows,), "one class per sample")


def activate_(y: Tensor, activation: str) -> Tensor:
    """Apply an activation in place."""
    if activation == "relu":
        return y.relu_()
    if activation == "tanh":
        return y.tanh_()
    return y.sigmoid_() if activation == "sigmoid" else y.gt_(0)


IGNORED = -100
"""The class of rows whose cross-entropy is 0, torch's own default."""


def losses_of(logits: Tensor, target: Tensor, loss: str, label_smoothing: float) -> Tensor:
    """The loss of each row, fp32 `[..., R]`, of logits `[..., R, N]`; NaN where a class is not one of the N."""
    logits = logits.to(torch.float32)
    if loss == "squared":
        return (logits - target).square().mean(-1)
    known = (target >= 0) & (target < logits.shape[-1])
    classes = target.where(known, 0).expand(logits.shape[:-1])
    if loss == "zero_one":
        return (logits.argmax(-1) != classes).to(torch.float32).where(known, torch.nan)
    rows = logits.flatten(0, -2), classes.flatten()
    losses = F.cross_entropy(*rows, reduction="none", label_smoothing=label_smoothing).view(classes.shape)
    return losses.where(known, torch.nan).masked_fill(target == IGNORED, 0.0)
