"""From losses to the weights of the estimator: a baseline that is independent of a copy's noise scales nothing."""

from __future__ import annotations

from torch import Tensor

BASELINES = ("mean", "clean", "none")


def loss_weights(losses: Tensor, clean: Tensor | None, baseline: str, antithetic: bool) -> Tensor:
    """(L - b) / (number of losses): the weight of each copy of each sample in the gradient of the mean loss.

    Args:
        losses: fp32 `[C, B]`, or `[C, B, Q]` where a sample has Q losses; antithetic copies come as two halves.
        clean: fp32 `[B]` or `[B, Q]`, the losses without noise; used by the baseline "clean".
        baseline: "none"; "clean"; or "mean": of the sample's *other* copies, or of its other antithetic pairs, so that
            b is independent of the copy's own noise and the estimate is not scaled (a mean over all copies would
            shrink it by 1 - 1/C). b is 0 where there is no other.
        antithetic: whether the copies are antithetic pairs.

    Returns:
        fp32, of the losses' shape.
    """
    count = losses.numel()
    if baseline == "clean":
        assert clean is not None
        return (losses - clean) / count
    groups = losses.unflatten(0, (2, -1)).mean(0) if antithetic else losses
    others = groups.shape[0] - 1
    if baseline == "none" or others == 0:
        return losses / count
    # With m the group's mean of n groups' mean M, the mean of the others is m - (m - M) n / (n - 1).
    from_others = (groups - groups.mean(0)) * ((others + 1) / others)
    if not antithetic:
        return from_others / count
    return ((losses.unflatten(0, (2, -1)) - groups + from_others) / count).flatten(0, 1)
