"""FZOO: signs as directions, many of them in one forward, and a step divided by how much the losses differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ulr_kernels.optim.optimizer import Common, ForwardOptimizer
from ulr_kernels.optim.probes import Probe, Probed


class FZOO(ForwardOptimizer):
    """FZOO (Dang et al., arXiv 2506.09034): one-sided differences, normalised by the losses' standard deviation.

        l_0 = L(W),   l_i = L(W + eps u_i),   u_i of signs
        g = 1 / (eps n) * sum over i of (l_i - l_0) u_i,   s = standard deviation of l_1 ... l_n (over n - 1)
        W <- W - lr * (g / s + weight_decay * W)

    `step_batch` evaluates the directions together, which is where its speed comes from; `step` one after the other.

    Args:
        model, lr, seed, rank, common: as in `MeZO`.
        eps: scale of the probes' noise, > 0.
        probes: directions u_i of a step, n >= 2.
        dist: of u; the paper's is "rademacher".

    Raises:
        ValueError: an argument breaks these rules.
    """

    SCALE = "eps"
    SETTINGS = ("probes",)

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-6,
        eps: float = 1e-3,
        probes: int = 8,
        dist: str = "rademacher",
        seed: int = 0,
        *,
        rank: int | None = None,
        **common: Unpack[Common],
    ) -> None:
        self._check_settings({"probes": probes})
        self.probes = int(probes)
        super().__init__(model, lr, eps, dist, rank, seed, common)

    @classmethod
    def _check_settings(cls, settings: Mapping[str, Any]) -> None:
        cls._count("probes", settings["probes"], 2)

    def _probes(self) -> Sequence[Probe]:
        return [Probe(0, 0), *(Probe(draw, 1) for draw in range(self.probes))]

    def _coefficients_from(self, losses: Tensor) -> Probed:
        clean, *_ = means = losses.squeeze(1)
        # Equal losses move nothing, whatever their difference, 0 or next to it, is divided by.
        deviation = means[1:].std().clamp_min(torch.finfo(torch.float32).tiny)
        return Probed(clean, (means[1:] - clean) / (self.probes * deviation))
