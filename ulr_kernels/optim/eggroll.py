"""EGGROLL: evolution strategies whose noise has low rank, so that a member costs little more than its rows."""

from __future__ import annotations

from torch import nn
from typing_extensions import Unpack

from ulr_kernels.optim.es import ES
from ulr_kernels.optim.optimizer import Common


class EGGROLL(ES):
    """Evolution strategies with noise E = A B^T / sqrt(rank) of matrices (Sarkar et al., arXiv 2511.16652).

    A member's product is x W^T + sigma * (x B) A^T / sqrt(rank): the weight is shared by the population, and the sum
    over its members is of high rank. Vectors have a noise value of their own per element.

    Args:
        rank: of E, >= 1. The other arguments are those of `ES`.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        sigma: float = 1e-2,
        population: int = 64,
        rank: int = 1,
        seed: int = 0,
        *,
        antithetic: bool = True,
        shaping: str = "zscore",
        maximize: bool = False,
        dist: str = "normal",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(
            model,
            lr,
            sigma,
            population,
            seed,
            antithetic=antithetic,
            shaping=shaping,
            maximize=maximize,
            dist=dist,
            rank=rank,
            **common,
        )
