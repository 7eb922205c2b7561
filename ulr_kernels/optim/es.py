"""Evolution strategies: a population around the weights, and a step along its noise, weighted by shaped losses.

EGGROLL is evolution strategies whose noise has low rank, so that a member costs little more than its rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from ulr_kernels.optim.optimizer import Common, ForwardOptimizer
from ulr_kernels.optim.probes import Probe, Probed
from ulr_kernels.optim.shaping import SHAPINGS


class ES(ForwardOptimizer):
    """Evolution strategies (Salimans et al., arXiv 1703.03864, algorithm 2).

        W <- W - lr * (g + weight_decay * W),   g = 1 / (population * sigma) * sum over members of w_i eps_i

    with w the shaped losses of the members W + sigma * eps_i. Losses need not be differentiable or even continuous: an
    error count, a reward (with `maximize`). `step_batch` evaluates many members in one forward.

    Args:
        model, lr, seed, rank, common: as in `MeZO`.
        sigma: scale of the members' noise, > 0.
        population: members.
        antithetic: members come as pairs eps, -eps; their number must be even.
        shaping: of losses to weights: "rank", centred ranks; "zscore"; "group", z-scores on each sample, averaged (for
            `step_batch`); "none", the losses less their mean.
        maximize: the closure or loss_fn gives a fitness, which should grow.
        dist: of the noise.

    Raises:
        ValueError: an argument breaks these rules.
    """

    SETTINGS = ("population", "antithetic", "shaping", "maximize")

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-2,
        sigma: float = 1e-2,
        population: int = 64,
        seed: int = 0,
        *,
        antithetic: bool = False,
        shaping: str = "rank",
        maximize: bool = False,
        dist: str = "normal",
        rank: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        self._check_settings(
            {"population": population, "antithetic": antithetic, "shaping": shaping, "maximize": maximize}
        )
        self.population, self.antithetic = int(population), antithetic
        self.shaping, self.maximize = shaping, maximize
        super().__init__(model, lr, sigma, dist, rank, seed, common)
        if self._rule.sampler == "hadamard" and not antithetic:
            # Weights that sum to 0 cancel where all members have the same sign: 1 / population of the coordinates.
            self._fail("antithetic", "be True where sampler is 'hadamard'", antithetic)

    @classmethod
    def _check_settings(cls, settings: Mapping[str, Any]) -> None:
        population, shaping = settings["population"], settings["shaping"]
        cls._count("population", population, 2)
        for name in ("antithetic", "maximize"):
            cls._flag(name, settings[name])
        if settings["antithetic"] and population % 2:
            cls._fail("population", "be even where antithetic is set", population)
        if shaping not in list(SHAPINGS):
            cls._fail("shaping", f"be {' or '.join(map(repr, SHAPINGS))}", repr(shaping))

    def _probes(self) -> Sequence[Probe]:
        if not self.antithetic:
            return [Probe(draw, 1) for draw in range(self.population)]
        return [Probe(draw, sign) for sign in (1, -1) for draw in range(self.population // 2)]

    def _reduce_losses(self, losses: Tensor) -> Tensor:
        """fp64, which shaping takes means in; every loss where it compares members on each sample."""
        return losses if self.shaping == "group" else losses.double().mean(1, keepdim=True)

    def _coefficients_from(self, losses: Tensor) -> Probed:
        weights = SHAPINGS[self.shaping](-losses if self.maximize else losses) / self.population
        if self.antithetic:
            plus, minus = weights.unflatten(0, (2, -1))
            weights = plus - minus
        return Probed(losses.mean().float(), weights)


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
        antithetic: bool = False,
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
