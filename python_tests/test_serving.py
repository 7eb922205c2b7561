"""ulr.optim.ServedWeights: an engine's workers perturb, restore and update the weights that they serve."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from serving_run import COEFFICIENTS, INNER, RANKS, SEEDS, SIGMA, Block, run
from small_models import unfilled
from torch import nn

import ulr_kernels as ulr
from ulr_kernels import noise_contract
from ulr_kernels.optim import ServedWeights, Shard


def test_ranks_have_the_weights_of_one_worker_bit_for_bit(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("serving_run.py"))
    command = [sys.executable, script]
    ranks = [subprocess.Popen([*command, str(r), str(tmp_path / "store"), str(tmp_path / "out")]) for r in range(RANKS)]
    assert [rank.wait(120) for rank in ranks] == [0] * RANKS
    whole = run(0, 1)
    parts = [torch.load(tmp_path / f"out{rank}.pt") for rank in range(RANKS)]
    size = INNER // RANKS
    for step, (expected, *of_ranks) in enumerate(zip(whole[:-1], *(part[:-1] for part in parts), strict=True)):
        query, value = ([part["merged"][each] for part in of_ranks] for each in (slice(size), slice(size, None)))
        assert torch.equal(torch.cat([*query, *value]), expected["merged"]), step
        assert torch.equal(torch.cat([part["out"] for part in of_ranks], 1), expected["out"])
        assert torch.equal(torch.cat([part["bias"] for part in of_ranks]), expected["bias"])
        assert all(torch.equal(part["norm"], expected["norm"]) for part in of_ranks)
    before, perturbed, restored, updated = whole[:-1]
    for name in before:
        assert torch.equal(restored[name], before[name])  # in bf16 too
        assert not torch.equal(perturbed[name], before[name]) and not torch.equal(updated[name], before[name])
    for part in parts:
        torch.testing.assert_close(part[-1]["y"], whole[-1]["y"])


def test_the_noise_is_the_contracts_by_the_name_of_the_whole_parameter() -> None:
    model = Block()
    served = ServedWeights(model, model.shards(0))
    before = model.merged.detach().clone()

    def eps(seed: int, name: str) -> torch.Tensor:
        return ulr.noise((INNER, 8), noise_contract.fold_in(seed, noise_contract.site_id(name)))

    served.perturb(SEEDS[0], -SIGMA)
    expected = torch.cat([eps(SEEDS[0], "query"), eps(SEEDS[0], "value")])
    assert torch.equal(model.merged, noise_contract.fma(torch.tensor(-SIGMA), expected, before.float()).bfloat16())
    served.restore()
    served.update(SEEDS, COEFFICIENTS)
    total = before.float()
    for seed, coefficient in zip(SEEDS, COEFFICIENTS, strict=True):  # one sum of fp32, rounded once
        step = torch.cat([eps(seed, "query"), eps(seed, "value")])
        total = noise_contract.fma(torch.tensor(coefficient), step, total)
    assert torch.equal(model.merged, total.bfloat16())


def test_no_two_parameters_have_correlated_noise() -> None:
    """Also none of equal shapes, whose noise a generator seeded anew for each parameter would repeat."""
    model = nn.ModuleList(unfilled(nn.Linear, 64, 64) for _ in range(4))
    for parameter in model.parameters():
        parameter.data.zero_()
    served = ServedWeights(model)
    noises = []
    for seed in (0, 1):
        served.perturb(seed, 1.0)
        noises += [layer.weight.detach().flatten().double() for layer in model]
        served.restore()
    for a, b in itertools.combinations(noises, 2):
        assert abs(float(a @ b)) / math.sqrt(len(a)) < 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.perturb(1.5, 0.1), r"'seed' must be an integer in .*, got 1.5"),
        (lambda s: s.perturb(1, math.nan), "'sigma' must be finite, got nan"),
        (lambda s: s.update([1, 2], [0.1]), "'coefficients' must have one number for each of 2 seeds, got 1"),
        (lambda s: s.update([1, 2], [0.1, math.inf]), "'coefficients' must be finite, got inf"),
        (lambda s: (s.perturb(1, 0.1), s.perturb(1, 0.1)), "'perturb' must be called after restore"),
        (lambda s: (s.perturb(1, 0.1), s.update([1], [0.1])), "'update' must be called after restore"),
    ],
)
def test_what_is_refused_writes_nothing(call, message: str) -> None:
    model = Block()
    before = model.merged.detach().clone()
    served = ServedWeights(model)
    with pytest.raises(ValueError, match=rf"ulr.optim.ServedWeights: {message}"):
        call(served)
    served.restore()
    assert torch.equal(model.merged, before)


def test_shards_that_are_none_are_refused() -> None:
    for shards, message in (
        ({"others": [Shard("others")]}, "'shards' must have names of the model's parameters, got others"),
        ({"merged": [Shard("a", stop=99)]}, "'shards' must have parts of the 24 rows of merged, one after the other"),
        ({"merged": [Shard("a", stop=9), Shard("b", start=8)]}, "'shards' must have parts"),
    ):
        with pytest.raises(ValueError, match=message):
            ServedWeights(Block(), shards)
    with pytest.raises(ValueError, match="'dist' must be one of normal, laplace, rademacher, got 'cauchy'"):
        ServedWeights(Block(), dist="cauchy")
