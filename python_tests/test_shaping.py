"""Shaping against the published formulas of evosax and EvoTorch, written out here."""

from __future__ import annotations

import pytest
import torch

import ulr_kernels as ulr
from ulr_kernels.optim import shaping

LOSSES = ulr.noise((17, 5), 3)
WITH_TIES = torch.tensor([2.0, 1.0, 2.0, 5.0, 2.0, 0.0])[:, None]


def close(found, expected):
    torch.testing.assert_close(found, expected.to(torch.float32), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("losses", [LOSSES, WITH_TIES])
def test_ranks_are_evosax_centered_ranks(losses):
    """evosax, core/fitness_shaping.py, centered_rank: (rankdata(f) - 1) / (n - 1) - 0.5, ties at their mean rank."""
    stats = pytest.importorskip("scipy.stats")
    fitness = losses.mean(1)
    close(shaping.rank(losses), torch.from_numpy(stats.rankdata(fitness.numpy()) - 1) / (len(fitness) - 1) - 0.5)


def test_a_member_that_failed_is_the_worst():
    ranks = shaping.rank(torch.tensor([1.0, torch.nan, 3.0, 2.0])[:, None])
    close(ranks, torch.tensor([-0.5, 0.5, 1 / 6, -1 / 6]))


def test_ranks_are_evotorch_centered_ranks():
    """EvoTorch, tools/ranking.py, centered: weights arange(n) / (n - 1) - 0.5 put where argsort says."""
    fitness = LOSSES.mean(1)
    expected = torch.empty(17)
    expected[fitness.argsort()] = torch.arange(17) / 16 - 0.5
    close(shaping.rank(LOSSES), expected)


def test_zscores_are_evosax_standardized_fitness():
    """evosax, standardize: jax.nn.standardize, (f - mean) / sqrt(variance + 1e-8), variance over n."""
    fitness = LOSSES.mean(1).double()
    variance = (fitness - fitness.mean()).square().mean()
    close(shaping.zscore(LOSSES), (fitness - fitness.mean()) / (variance + 1e-8).sqrt())


def test_zscores_are_evotorch_normalized_but_for_its_n_minus_1():
    """EvoTorch, normalized: (f - mean) / std over n - 1."""
    fitness = LOSSES.mean(1).double()
    close(shaping.zscore(LOSSES) * (16 / 17) ** 0.5, (fitness - fitness.mean()) / fitness.std())


def test_group_relative_scores_are_the_mean_of_each_samples_zscores():
    """GRPO (arXiv 2402.03300, 4.1.2): the advantage (r - mean(r)) / std(r) among the answers to one question."""
    columns = [(c - c.mean()) / c.std(correction=0) for c in LOSSES.double().T]
    close(shaping.group(LOSSES), torch.stack(columns).mean(0))
    scaled = LOSSES * torch.tensor([1.0, 10.0, 100.0, 1e3, 1e4]) + torch.arange(5) * 7.0  # harder samples count no more
    torch.testing.assert_close(shaping.group(scaled), shaping.group(LOSSES), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", shaping.SHAPINGS)
def test_weights_sum_to_nothing_and_ascend(name):
    column = LOSSES[:, :1]
    weights = shaping.SHAPINGS[name](column)
    assert abs(weights.sum()) < 1e-5
    assert weights.argsort().tolist() == column[:, 0].argsort().tolist()
    equal = shaping.SHAPINGS[name](torch.full((8, 3), 0.7))
    assert not equal.any()
