"""Noise on weights instead of outputs: each copy of the batch has weights of its own, W + sigma * eps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from ulr_kernels import ops
from ulr_kernels.nn.call import gradient_buffer
from ulr_kernels.nn.perturbed import NoisedParameter, PerturbedWeights, WeightDraws


class WeightNoise(NamedTuple):
    """The noise of some parameters in one pass; it is added on their way into the functions that use them."""

    parameters: list[NoisedParameter]  # with their keys and scales
    antithetic: bool  # copies come as pairs
    dist: str
    sampler: str

    def all_copies(self, model: nn.Module, copies: int, draw: int, samples: int) -> PerturbedWeights:
        """The mode for one forward in which the rows of each copy have its weights."""
        draws = WeightDraws(
            draw, copies, self.antithetic and copies > 1, self.dist, self.sampler
        )  # the clean pass has one copy
        return PerturbedWeights(model, self.parameters, draws, copies * samples)

    def by_copy(self, model: nn.Module, copies: int, draw: int) -> Iterator[PerturbedWeights]:
        """The modes for a forward of each copy, in which all rows have its weights."""
        draws = copies // 2 if self.antithetic and copies > 1 else copies
        for copy in range(copies):
            minus = [each._replace(sigma=-each.sigma) for each in self.parameters] if copy >= draws else self.parameters
            yield PerturbedWeights(model, minus, WeightDraws(draw + copy % draws, dist=self.dist, sampler=self.sampler))

    def add_gradients(self, loss_weight: Tensor) -> None:
        """Add sum over c of (sum over samples of loss_weight[c]) * score(eps_c) / sigma to `.grad`.

        `loss_weight`: fp32 `[copies, samples]`; all samples of a copy have the same weights.
        """
        for noised in self.parameters:
            parameter = noised.parameter
            rows, *others = parameter.shape if parameter.dim() > 1 else (1, parameter.numel())
            score = ops.noise_score(
                (rows, math.prod(others)),
                loss_weight.sum(1, keepdim=True).to(noised.key.device),
                noised.sigma,
                noised.key,
                antithetic=self.antithetic,
                dist=self.dist,
                sampler=self.sampler,
                positions=rows,
            )
            score = score.view(parameter.shape)
            if noised.still is not None:
                score[noised.still] = 0
            gradient_buffer(parameter).add_(score)
