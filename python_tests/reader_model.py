"""A model with every kind of parameter that the optimisers perturb, and its noise by the contract's words alone."""

from __future__ import annotations

import pytest
import torch
from small_models import filled
from torch import Tensor, nn

import ulr_kernels as ulr
from ulr_kernels import dispatch, noise_contract


class Reader(nn.Module):
    """Tokens to classes: tables, a norm, attention, a convolution, a bare parameter, a head tied to the table."""

    def __init__(self, words: int = 11, width: int = 8, positions: int = 5) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.MultiheadAttention(width, 2, batch_first=True)
        self.patch = nn.Conv2d(1, 3, (2, 3), padding=1)
        self.scale = nn.Parameter(torch.empty(width))
        self.body = nn.Linear(3 * (positions + 1) * width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        h = self.norm(self.words(tokens) + self.places(torch.arange(tokens.shape[1])[None]))
        h = h + self.mix(h, h, h, need_weights=False)[0]
        h = torch.relu(self.patch((h * self.scale).unsqueeze(1))).flatten(1)
        return self.head(torch.tanh(self.body(h)))


def reader() -> tuple[nn.Module, Tensor, Tensor]:
    tokens = torch.arange(30).view(6, 5) * 7 % 11
    return filled(Reader(), 0.3).eval(), tokens, tokens[:, 0]


def site_noise(model: nn.Module, seed: int, step: int, draw: int, dist: str = "normal") -> dict[str, Tensor]:
    """The noise of each parameter, by the contract's words alone."""
    step_key = ulr.fold_in(seed, step)
    return {
        name: ulr.noise_like(p, ulr.fold_in(step_key, noise_contract.site_id(name)), draw=draw, dist=dist)
        for name, p in model.named_parameters()
    }


def shifted(model: nn.Module, noise: dict[str, Tensor], scale: float, tokens: Tensor) -> Tensor:
    weights = {name: p.detach() + scale * noise[name] for name, p in model.named_parameters()}
    return torch.func.functional_call(model, weights, tokens)


def moved(model: nn.Module, start: dict[str, Tensor]) -> Tensor:
    return torch.cat([(p.detach() - start[name]).flatten() for name, p in model.named_parameters()])


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def needs(device: str, *names: str) -> None:
    for name in names:
        try:
            dispatch.lookup(name, torch.device(device))
        except dispatch.BackendError as error:
            pytest.skip(str(error))
