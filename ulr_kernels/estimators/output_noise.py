"""Noise on a network's outputs: that of the ops, and two heavier-tailed distributions in tensor code."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ulr_kernels import noise_contract, ops
from ulr_kernels.ops._op import Check, NoiseSpec

HEAVY_TAILED = ("logistic", "student_t")
DISTRIBUTIONS = (*noise_contract.DISTRIBUTIONS, *HEAVY_TAILED)
ANGLE_STREAM = 1  # folded into the key for Student's second uniform number
_LOGISTIC_SCALE = math.sqrt(3) / math.pi  # of variance 1


class OutputNoise(NamedTuple):
    """The noise of all copies of outputs `[samples, positions, columns]`; mean 0, variance 1.

    "logistic" and "student_t" are functions of the contract's Laplace noise, so they are pure functions of key, draw,
    row and column as well. A Laplace number of magnitude a has the uniform number U = exp(-sqrt(2) a) in (0, 1].

        logistic    |x| = ln((2 - U) / U): the inverse distribution function at U / 2
        student_t   |x| = sqrt(df (U^(-2 / df) - 1)) cos(pi V / 2), V a second uniform number: the polar method of
                    Bailey (Mathematics of Computation 62, 1994), for any df

    The sign is that of the Laplace number, and a factor makes the variance 1.
    """

    shape: tuple[int, int, int]
    dist: str
    df: float
    antithetic: bool
    sampler: str
    row_offset: int

    def check(self, rules: Check, copies: int, key: Tensor) -> None:
        """Raise ValueError if an argument breaks a rule of the noise; reads no tensor."""
        samples, positions, columns = self.shape
        for argument, value in (("copies", copies), ("row_offset", self.row_offset)):
            if isinstance(value, bool) or not isinstance(value, int):
                rules.fail(argument, "be an integer", repr(value))
        if not isinstance(self.antithetic, bool):
            rules.fail("antithetic", "be True or False", repr(self.antithetic))
        if self.dist not in DISTRIBUTIONS:
            rules.fail("dist", f"be one of {', '.join(DISTRIBUTIONS)}", repr(self.dist))
        if not isinstance(self.df, int | float) or not 2 < self.df < math.inf:
            rules.fail("df", "be a finite number above 2 (the variance is infinite at 2)", repr(self.df))
        if self.sampler == "hadamard" and self.dist != "rademacher":
            rules.fail("dist", "be 'rademacher' where sampler is 'hadamard'", repr(self.dist))
        if self.sampler == "sobol" and self.dist == "student_t":
            rules.fail("sampler", "be 'iid' where dist is 'student_t', which takes two numbers", repr(self.sampler))
        draws = rules.copies(copies, self.antithetic)
        rules.noise(NoiseSpec(key, **self._of_op), samples * positions, columns, draws)

    def added(self, outputs: Tensor, copies: int, sigma: Tensor, key: Tensor) -> Tensor:
        """outputs + sigma * eps, fp32 `[copies, rows, columns]`; `outputs`: fp32 `[rows, columns]`."""
        if self.dist in HEAVY_TAILED:
            return torch.addcmul(outputs, sigma, self.eps(copies, key))
        return ops.noise_add(outputs, sigma, key, copies=copies, **self._of_op)

    def weighted_score(self, loss_weight: Tensor, sigma: Tensor, key: Tensor) -> Tensor:
        """The sum over copies of loss_weight * score(eps) / sigma, fp32 `[rows, columns]`, of the same noise.

        `loss_weight`: fp32 `[copies, samples]`.
        """
        samples, positions, columns = self.shape
        if self.dist in HEAVY_TAILED:
            scores = self._score(self.eps(len(loss_weight), key)).view(-1, *self.shape)
            return (loss_weight[:, :, None, None] * scores).sum(0).flatten(0, 1) / sigma
        return ops.noise_score((samples * positions, columns), loss_weight, sigma, key, **self._of_op)

    def eps(self, copies: int, key: Tensor) -> Tensor:
        """The noise itself, fp32 `[copies, rows, columns]`, for the distributions that no op makes."""
        laplace = self._laplace(copies, key)
        minus_log_u = laplace.abs() * math.sqrt(2)
        if self.dist == "logistic":
            magnitude = _LOGISTIC_SCALE * (minus_log_u + torch.log1p(-torch.expm1(-minus_log_u)))
        else:
            v = torch.exp(self._laplace(copies, ops.fold_in(key, ANGLE_STREAM)).abs() * -math.sqrt(2))
            squared_radius = (self.df - 2) * torch.expm1(minus_log_u * (2 / self.df))
            magnitude = squared_radius.sqrt() * torch.cos(v * (math.pi / 2))
        return torch.copysign(magnitude, laplace)

    def _score(self, eps: Tensor) -> Tensor:
        """-d/d eps ln f(eps)."""
        if self.dist == "logistic":
            return torch.tanh(eps / (2 * _LOGISTIC_SCALE)) / _LOGISTIC_SCALE
        return (self.df + 1) * eps / (self.df - 2 + eps.square())

    def _laplace(self, copies: int, key: Tensor) -> Tensor:
        samples, positions, columns = self.shape
        nothing = torch.zeros(samples * positions, columns, device=key.device)
        return ops.noise_add(nothing, 1.0, key, copies=copies, **self._of_op)

    @property
    def _of_op(self) -> dict[str, Any]:
        """The noise that an op makes, by the names of its arguments."""
        dist = "laplace" if self.dist in HEAVY_TAILED else self.dist
        which = {"antithetic": self.antithetic, "dist": dist, "sampler": self.sampler}
        return which | {"positions": self.shape[1], "row_offset": self.row_offset}
