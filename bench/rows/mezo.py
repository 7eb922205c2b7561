"""A step of MeZO on a pre-trained model, beside the two forwards that it cannot do without and MeZO as published."""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import rivals
from bench.rows.row import Contestant, Row, ours
from ulr_kernels.finetune.models import PACKAGED, build
from ulr_kernels.ops._op import Cost
from ulr_kernels.optim import MeZO

LR, EPS = 1e-6, 1e-3
WORDS = ("negative", "positive")  # which a causal model's head is made of
ROWS, LENGTH = 8, 128  # 1,024 tokens a forward
PARAMETERS = {"minilm": (22_566_146, 10_617_600), "smollm2": (134_516_162, 106_169_472)}  # all; those in products


def installed() -> list[str]:
    """The models whose packages are there: they are extras, and wanted by these rows only."""
    return [name for name in PARAMETERS if rivals.installed(PACKAGED[name][1])]


@functools.cache
def loaded(name: str) -> nn.Module:
    return build(name, 2, tune="all", words=WORDS if name == "smollm2" else ()).model


def loss(model: nn.Module, ids: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(ids, mask), targets)


def forwards(ids: Tensor, mask: Tensor, targets: Tensor, model: nn.Module) -> None:
    loss(model, ids, mask, targets)
    loss(model, ids, mask, targets)


def step(ids: Tensor, mask: Tensor, targets: Tensor, optimizer: MeZO) -> None:
    optimizer.step(lambda: loss(optimizer.model, ids, mask, targets))


def published(ids: Tensor, mask: Tensor, targets: Tensor, model: nn.Module) -> None:
    rivals.mezo_step(model, lambda: loss(model, ids, mask, targets), LR, EPS, seed=1)


def mezo_row(name: str, dist: str, names=(None,)) -> Row:
    """A step on 1,024 tokens. What each way keeps is a model of its own, so that memory counts the weights too."""

    def make(i: int) -> tuple:
        ids = 1000 + torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) * 7 % 5000
        return ids, torch.ones_like(ids), torch.arange(ROWS) % 2

    def own(*inputs: Tensor) -> nn.Module:
        return copy.deepcopy(loaded(name))

    everything, products = PARAMETERS[name]
    contestants = {
        label: Contestant(mine.run, lambda *inputs: MeZO(own(), lr=LR, eps=EPS, dist=dist), backend=mine.backend)
        for label, mine in ours(step, names).items()
    }
    return Row(
        name=f"MeZO step, {name}, {dist}, {ROWS * LENGTH} tokens",
        inputs=make,
        contestants={
            **contestants,
            "two plain forwards": Contestant(forwards, own),
            "MeZO as published": Contestant(published, own),
        },
        cost=Cost(
            bytes=4 * (2 * products + 2 * everything),
            flops=2 * 2 * products * ROWS * LENGTH,
            noise=2 * products + everything,
        ),
        dist=dist,
        memory=True,
        in_cache=True,
    )
