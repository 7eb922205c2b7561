"""ulr.output_loss: a loss without a derivative, as the end of a network that is trained by backpropagation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ulr_kernels import noise_contract, ops
from ulr_kernels.baselines import BASELINES, loss_weights
from ulr_kernels.estimators.output_noise import OutputNoise
from ulr_kernels.nn.batch import Batch, LossFunction
from ulr_kernels.ops._op import FLOATS, Check, key_tensor, sigma_tensor

OP = "output_loss"
OUTPUTS = noise_contract.site_id("ulr_kernels.output_loss")  # folded into keys that are made of outputs


def output_loss(
    outputs: Tensor,
    targets: Any,
    loss_fn: LossFunction,
    sigma: float | Tensor,
    copies: int = 32,
    *,
    key: int | Tensor | None = None,
    antithetic: bool = False,
    dist: str = "normal",
    df: float = 5.0,
    sampler: str = "iid",
    baseline: str = "mean",
    row_offset: int = 0,
) -> Tensor:
    """The mean loss under noise at a network's outputs, whose backward needs no derivative of the loss.

    The value is the mean of L(outputs + sigma * eps) over samples and copies. Its gradient in the outputs is the
    likelihood ratio estimate

        (mean over copies of (L - b) * score(eps)) / (sigma * samples)

    which is unbiased for the mean over all noise, a smooth function of the outputs whatever L is (with `rademacher`
    only as sigma goes to 0). From there on autograd goes through the network as usual. So the network trains by
    backpropagation on accuracy, a rank, a reward, or the score of another program, and runs forward once a step.

        loss = ulr.output_loss(model(x), y, loss_fn, sigma=1.0, copies=100, key=ulr.fold_in(seed, step))
        loss.backward()

    Source: OVLR, *Efficient, Scalable, and Robust Training via Output-Level Variance-Reduced Likelihood Ratio*, ICML
    2026; the estimator is that of arXiv 2305.08960, Theorem 1, for a last layer that is the identity.

    Args:
        outputs: `[samples, ...]`, fp32, bf16 or fp16. If they need no gradient, the value is all there is.
        targets: a tensor, or a tuple, list or mapping of such, with samples first; a list or array with an entry for
            each sample; or None. They get no gradient.
        loss_fn: `loss_fn(noised_outputs, targets)` -> the loss of each row, `[rows]`, of any dtype and on any device.
            It runs once, on all copies of all samples, without autograd. It gets fp32 `[copies * samples, ...]`, row
            c * samples + i for sample i, and as many copies of the targets. A loss that is infinite or NaN makes the
            value and the gradient so, as with torch's losses; nothing looks for it, as that would synchronise.
        sigma: noise scale in units of the outputs, > 0: a number, or fp32 `[]` or `[N]`, N the size of the last axis.
            It gets no gradient.
        copies: noised copies of each sample. All are in memory at once.
        key: of this step's noise: an integer in [-2^63, 2^64) or an int64 scalar tensor on the outputs' device. Each
            step needs its own, such as `ulr.fold_in(seed, step)`. None: one made of the bits of the outputs, so that
            other outputs have other noise; micro-batches are then no slices of one noise.
        antithetic: copies come as pairs eps, -eps; their number must be even.
        dist: "normal", "laplace", "rademacher", "logistic" or "student_t"; all of variance 1.
        df: degrees of freedom of "student_t", > 2. They change nothing for others.
        sampler: "iid"; "sobol": the copies of a sample are a scrambled Sobol sequence (not with `rademacher` and
            `student_t`); "hadamard": orthogonal signs (`rademacher` alone). The last two need antithetic pairs or
            another baseline than "mean": their copies depend on one another.
        baseline: "mean": of the sample's other copies or pairs; "clean": the loss without noise, for which `loss_fn`
            runs once more; "none".
        row_offset: rows of noise before these outputs in the whole batch. A sample has one row, or with outputs `[B, T,
            N]` T of them. A micro-batch or rank with its own offset has its part of the whole batch's noise.

    Returns:
        fp32 `[]`, on the outputs' device.

    Raises:
        ValueError: an argument, or what `loss_fn` returns, breaks these rules.
        RuntimeError: from autograd, where a second derivative is taken.
    """
    rules = Check(OP)
    if not isinstance(outputs, Tensor):
        rule = "be a tensor (several: torch.cat of each one's flatten(1), taken apart in loss_fn)"
        rules.fail("outputs", rule, type(outputs).__name__)
    rules.dtype("outputs", outputs, FLOATS)
    batch = Batch(outputs, targets, f"ulr::{OP}", names=("outputs", "targets"))
    columns = outputs.shape[-1] if outputs.dim() > 1 else 1
    shape = (batch.samples, math.prod(outputs.shape[1:-1]), columns)
    key = _key_of(outputs) if key is None else key_tensor(OP, key, outputs.device)
    sigma = _sigma(rules, sigma, outputs.device)
    noise = OutputNoise(shape, dist, df, antithetic, sampler, row_offset)
    noise.check(rules, copies, key)
    if sigma.dim() and sigma.shape != (columns,):
        rules.fail("sigma", f"be a scalar or [{columns}], one for each column of outputs", list(sigma.shape))
    rules.device("outputs", outputs.device, sigma=sigma, key=key)
    _check_baseline(rules, baseline, sampler, antithetic)
    with torch.no_grad():
        clean = outputs.detach().to(torch.float32)
        noised = noise.added(clean.reshape(-1, columns), copies, sigma, key)
        losses = batch.losses(noised.view(copies * batch.samples, *outputs.shape[1:]), loss_fn, copies)
        losses = losses.to(outputs.device)
        without = batch.losses(clean, loss_fn, 1)[0].to(outputs.device) if baseline == "clean" else None
        weights = loss_weights(losses, without, baseline, antithetic)
    return _MeanLoss.apply(outputs, losses, weights, sigma, key, noise)


@torch.no_grad()
def _key_of(outputs: Tensor) -> Tensor:
    """A key that depends on each bit of the outputs, and on nothing else."""
    bits = outputs.detach().to(torch.float32).reshape(-1).contiguous().view(torch.int32).to(torch.int64)
    places = torch.arange(1, 2 * len(bits), 2, device=bits.device)  # odd: a bit's share does not vanish modulo 2^64
    return ops.fold_in((bits * places).sum(), OUTPUTS)


class _MeanLoss(torch.autograd.Function):
    """The mean of the losses; backward, the estimate of its gradient in the outputs."""

    @staticmethod
    def forward(outputs, losses, weights, sigma, key, noise):
        return losses.mean()

    @staticmethod
    def setup_context(ctx, inputs, output):
        outputs, _, weights, sigma, key, noise = inputs
        ctx.save_for_backward(outputs, weights, sigma, key)
        ctx.noise = noise

    @staticmethod
    def backward(ctx, grad):
        outputs, weights, sigma, key = ctx.saved_tensors
        estimate = _Estimate.apply(outputs, weights, sigma, key, ctx.noise)
        return (grad * estimate).to(outputs.dtype), None, None, None, None, None


class _Estimate(torch.autograd.Function):
    """The gradient of the mean loss in the outputs, fp32 of their shape; its own derivative is refused."""

    @staticmethod
    def forward(outputs, weights, sigma, key, noise):
        return noise.weighted_score(weights, sigma, key).view(outputs.shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(f"ulr::{OP}: its gradient is an estimate that has no derivative; a second one was taken")


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_baseline(rules: Check, baseline: str, sampler: str, antithetic: bool) -> None:
    if baseline not in BASELINES:
        rules.fail("baseline", f"be {' or '.join(map(repr, BASELINES))}", repr(baseline))
    if sampler != "iid" and baseline == "mean" and not antithetic:
        # The scores of a sample's copies sum to about 0, so the mean of the others scales the estimate by C / (C - 1).
        rule = f"be 'clean' (or antithetic=True) where sampler is {sampler!r}: a mean is biased"
        rules.fail("baseline", rule, repr(baseline))


def _sigma(rules: Check, sigma: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(sigma, Tensor) and sigma.requires_grad:
        rules.fail("sigma", "need no gradient (sigma.detach())", "one that requires grad")
    return sigma_tensor(OP, sigma, device, zero=False)
