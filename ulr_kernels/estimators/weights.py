"""Noise on weights instead of outputs: each copy of the batch sees weights of its own, W + sigma * eps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from ulr_kernels import ops
from ulr_kernels.nn.call import gradient_buffer
from ulr_kernels.ops._parameters import grid
from ulr_kernels.optim.probing import Draws, Probing, Site


class WeightNoise(NamedTuple):
    """Parameters with noise, which is added on their way into the functions that use them.

    Attributes:
        sites: the parameters, with their keys and scales.
        antithetic: copies come as pairs.
        dist: of the noise.
    """

    sites: list[Site]
    antithetic: bool
    dist: str

    def together(self, model: nn.Module, copies: int, draw: int, samples: int) -> Probing:
        """For one forward in which the rows of each copy see its weights."""
        antithetic = self.antithetic and copies > 1  # the clean pass has one
        return Probing(model, self.sites, Draws(draw, copies, antithetic, self.dist), copies * samples)

    def by_copy(self, model: nn.Module, copies: int, draw: int) -> Iterator[Probing]:
        """For a forward of each copy, in which all rows see its weights."""
        draws = copies // 2 if self.antithetic and copies > 1 else copies
        for copy in range(copies):
            sites = self.sites if copy < draws else [site._replace(sigma=-site.sigma) for site in self.sites]
            yield Probing(model, sites, Draws(draw + copy % draws, dist=self.dist))

    def add_gradients(self, loss_weight: Tensor) -> None:
        """Add sum over c of (sum over samples of loss_weight) * score(eps_c) / sigma to `.grad`: all samples of a copy
        see the same weights."""
        for site in self.sites:
            rows, cols = grid(site.parameter)
            weight = loss_weight.sum(1, keepdim=True).to(site.key.device)
            score = ops.noise_score(
                (rows, cols),
                weight,
                site.sigma,
                site.key,
                antithetic=self.antithetic,
                dist=self.dist,
                positions=rows,
            )
            gradient_buffer(site.parameter).add_(score.view(site.parameter.shape))
