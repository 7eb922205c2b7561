"""MeZO: SPSA whose perturbation is a pure function, so that a step needs the memory of inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from ulr_kernels.optim.optimizer import Common, ForwardOptimizer
from ulr_kernels.optim.probes import Probe, Probed


class MeZO(ForwardOptimizer):
    """SPSA (Spall, 1992) as MeZO does it (Malladi et al., arXiv 2305.17333, algorithm 1), without writing the weights.

        g = 1 / n * sum over p of (L(W + eps z_p) - L(W - eps z_p)) / (2 eps) * z_p        (two-sided)
        g = 1 / n * sum over p of (L(W + eps z_p) - L(W)) / eps * z_p                      (one-sided)
        W <- W - lr * (g + weight_decay * W),      or by momentum or Adam on g

    The weights are not touched while the probes are evaluated, and change once a step, in one pass over each tensor
    whatever the number of probes.

    Args:
        model: any module. Its trained parameters (`requires_grad`) are tuned; for LoRA wrap it by peft.
        lr: learning rate, >= 0; torch's schedulers may change it.
        eps: scale of the probes' noise, > 0.
        probes: directions z_p of a step, n.
        dist: of z: "normal", "rademacher" or "laplace".
        seed: integer in [-2^63, 2^64). Seed, step and parameter name are all that enters the noise.
        two_sided: two forwards a direction; or one, and one for all at the unperturbed weights.
        rank: of the noise of matrices, E = A B^T / sqrt(rank); None for full rank, which vectors always have.
        common: the arguments that all optimisers here take, see `Common`.

    Raises:
        ValueError: an argument breaks these rules.
    """

    SCALE = "eps"
    SETTINGS = ("probes", "two_sided")

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-6,
        eps: float = 1e-3,
        probes: int = 1,
        dist: str = "normal",
        seed: int = 0,
        *,
        two_sided: bool = True,
        rank: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        self._check_settings({"probes": probes, "two_sided": two_sided})
        self.probes, self.two_sided = int(probes), two_sided
        super().__init__(model, lr, eps, dist, rank, seed, common)

    @classmethod
    def _check_settings(cls, settings: Mapping[str, Any]) -> None:
        cls._count("probes", settings["probes"], 1)
        cls._flag("two_sided", settings["two_sided"])

    def _probes(self) -> Sequence[Probe]:
        plus = [Probe(draw, 1) for draw in range(self.probes)]
        if self.two_sided:
            return plus + [Probe(draw, -1) for draw in range(self.probes)]
        return [Probe(0, 0), *plus]

    def _coefficients_from(self, losses: Tensor) -> Probed:
        means = losses.squeeze(1)
        if self.two_sided:
            plus, minus = means.unflatten(0, (2, self.probes))
            return Probed(means.mean(), (plus - minus) / (2 * self.probes))
        return Probed(means[0], (means[1:] - means[0]) / self.probes)
