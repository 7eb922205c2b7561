"""The statistics of the noise: moments, tails, independence, and the error of the quantile functions.

Keys are fixed, so a test passes or fails for good. Its bounds are set as if the key were new: each check of each test
would reject true noise with probability FALSE_POSITIVE. Every test is also given noise with a planted defect, which it
must reject. The number of samples is part of the tests' names: back ends without native code get fewer, and the bounds,
which are standard errors and p-values, widen with that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

import ulr_kernels as ulr
from ulr_kernels import dispatch, noise_contract

FALSE_POSITIVE = 1e-7  # of one check; the file makes about 150
NATIVE = not isinstance(dispatch.find("cpp", "noise", "cpu"), str)
LOG2_SAMPLES = 26 if NATIVE else 20  # of one distribution's moments and tails
LOG2_PLANTED = 22 if NATIVE else 20  # where a defect was planted, and fewer show it
LOG2_PAIRS = 23 if NATIVE else 18  # of neighbours along one coordinate
BLOCK = (2048, 1024) if NATIVE else (256, 1024)
SEED = 20230508

CDF = {"normal": scipy.special.ndtr, "laplace": scipy.stats.laplace(scale=0.5**0.5).cdf}
QUANTILE = {"normal": scipy.special.ndtri, "laplace": scipy.stats.laplace(scale=0.5**0.5).ppf}
# E[eps^k] for even k; odd ones are 0. Unit variance each.
MOMENTS = {
    "normal": {2: 1.0, 4: 3.0, 6: 15.0, 8: 105.0},
    "laplace": {k: math.factorial(k) / 2 ** (k // 2) for k in (2, 4, 6, 8)},
    "rademacher": {2: 1.0, 4: 1.0, 6: 1.0, 8: 1.0},
}

sized = pytest.mark.parametrize("log2_samples", [LOG2_SAMPLES], ids=[f"2^{LOG2_SAMPLES}"])
planted = pytest.mark.parametrize("log2_samples", [LOG2_PLANTED], ids=[f"2^{LOG2_PLANTED}"])
paired = pytest.mark.parametrize("log2_pairs", [LOG2_PAIRS], ids=[f"2^{LOG2_PAIRS}"])
every_dist = pytest.mark.parametrize("dist", noise_contract.DISTRIBUTIONS)
continuous = pytest.mark.parametrize("dist", ["normal", "laplace"])

Defect = Callable[[Tensor], Tensor]


def samples(dist: str, log2_samples: int, defect: Defect) -> Iterator[Tensor]:
    """Blocks of noise, 2^log2_samples values together, over rows of two draws."""
    blocks = 2**log2_samples // math.prod(BLOCK)
    for block in range(blocks):
        rows = block // 2 * BLOCK[0]
        yield defect(ulr.noise(BLOCK, ulr.fold_in(SEED, 0), draw=block % 2, dist=dist, row_offset=rows))


def sound(eps: Tensor) -> Tensor:
    return eps


def z_bound() -> float:
    return float(scipy.special.ndtri(1 - FALSE_POSITIVE / 2))


# --- moments ---------------------------------------------------------------------------------------------------------


def moment_scores(dist: str, log2_samples: int, defect: Defect = sound) -> list[float]:
    """Of the first four raw moments: how many standard errors they are from the truth (0 where there is no spread)."""
    sums, truth = torch.zeros(4, dtype=torch.float64), MOMENTS[dist]
    for eps in samples(dist, log2_samples, defect):
        eps, power = eps.double(), torch.ones((), dtype=torch.float64)
        for k in range(4):
            power = power * eps
            sums[k] += power.sum()
    scores = []
    for k, mean in enumerate(sums / 2**log2_samples, start=1):
        expected = truth.get(k, 0.0)
        error = math.sqrt((truth[2 * k] - expected**2) / 2**log2_samples)
        difference = abs(mean.item() - expected)
        scores.append(difference / error if error else 0.0 if difference == 0 else math.inf)
    return scores


@sized
@every_dist
def test_moments(dist: str, log2_samples: int) -> None:
    assert max(moment_scores(dist, log2_samples)) < z_bound()


@planted
@every_dist
@pytest.mark.parametrize(
    "defect", [lambda eps: eps * 1.01**0.5, lambda eps: eps + 0.01], ids=["variance of 1.01", "mean of 0.01"]
)
def test_moments_can_fail(dist: str, log2_samples: int, defect: Defect) -> None:
    assert max(moment_scores(dist, log2_samples, defect)) > z_bound()


# --- tails -----------------------------------------------------------------------------------------------------------


def tail_thresholds(dist: str, log2_samples: int) -> list[int]:
    """1 to 5 standard deviations, as far as 18 samples are expected on a side: enough for none to be a failure."""
    return [t for t in range(1, 6) if CDF[dist](-t) * 2**log2_samples >= 18]


def tail_probabilities(dist: str, log2_samples: int, defect: Defect = sound) -> list[float]:
    """For each threshold and side, the probability of a count as extreme as the one seen (binomial, two-sided)."""
    thresholds = tail_thresholds(dist, log2_samples)
    counts = {(t, side): 0 for t in thresholds for side in (-1, 1)}
    for eps in samples(dist, log2_samples, defect):
        for t, side in counts:
            counts[t, side] += int(torch.count_nonzero(eps > t if side == 1 else eps < -t))
    result = []
    for (t, _), count in counts.items():
        law = scipy.stats.binom(2**log2_samples, CDF[dist](-t))
        result.append(min(1.0, 2 * min(law.cdf(count), law.sf(count - 1))))
    return result


@sized
@continuous
def test_tails(dist: str, log2_samples: int) -> None:
    if log2_samples == 26:
        assert tail_thresholds(dist, log2_samples)[-1] == 5
    assert min(tail_probabilities(dist, log2_samples)) > FALSE_POSITIVE


@planted
@continuous
def test_tails_can_fail(dist: str, log2_samples: int) -> None:
    farthest = tail_thresholds(dist, log2_samples)[-1]
    clipped = tail_probabilities(dist, log2_samples, lambda eps: eps.clamp(-farthest, farthest))
    assert min(clipped) < FALSE_POSITIVE


# --- independence ----------------------------------------------------------------------------------------------------

COORDINATES = ("row", "col", "call", "draw", "key", "site", "step")


def pairs(coordinate: str, dist: str, log2_pairs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of neighbours along a coordinate; "call" is the same word of the next Philox call, 4 columns on."""
    step_key = ulr.fold_in(SEED, 7)
    rows, cols = BLOCK
    keys = {
        "key": (step_key, step_key + 1),
        "site": tuple(ulr.fold_in(step_key, noise_contract.site_id(name)) for name in ("layers.0", "layers.1")),
        "step": (ulr.fold_in(SEED, 7), ulr.fold_in(SEED, 8)),
    }
    beside = {"row": (1, 0), "col": (0, 1), "call": (0, 4)}
    for block in range(2**log2_pairs // (rows * cols)):

        def noise(key: int, shape: tuple[int, int] = BLOCK, draw: int = 0, start: int = block * rows) -> Tensor:
            return ulr.noise(shape, key, draw=draw, dist=dist, row_offset=start)

        if coordinate in keys:
            yield noise(keys[coordinate][0]), noise(keys[coordinate][1])
        elif coordinate == "draw":
            yield noise(step_key, draw=3), noise(step_key, draw=4)
        else:
            down, right = beside[coordinate]
            whole = noise(step_key, (rows + down, cols + right))
            yield whole[:rows, :cols], whole[down:, right:]


def cells(eps: Tensor, dist: str) -> Tensor:
    """The cell of each value, one of 16 that are equally likely (2 for signs)."""
    if dist == "rademacher":
        return (eps > 0).long()
    edges = torch.tensor(QUANTILE[dist](numpy.arange(1, 16) / 16), dtype=torch.float32)
    return torch.bucketize(eps.contiguous(), edges)


def dependence(
    coordinate: str, dist: str, log2_pairs: int, plant: Callable[[Tensor, Tensor], Tensor] = lambda a, b: b
) -> float:
    """The smaller of two probabilities: of a correlation, and of a joint histogram, as far from independence as seen.

    The histogram's chi-square has 255 degrees of freedom (3 for signs), as its margins are known.
    """
    products, size = 0.0, 2 if dist == "rademacher" else 16
    counts = torch.zeros(size * size, dtype=torch.int64)
    for first, second in pairs(coordinate, dist, log2_pairs):
        second = plant(first, second)
        products += float((first * second).sum(dtype=torch.float64))
        counts += torch.bincount((cells(first, dist) * size + cells(second, dist)).flatten(), minlength=size * size)
    score = abs(products) / math.sqrt(2**log2_pairs)
    return min(2 * scipy.stats.norm.sf(score), scipy.stats.chisquare(counts.numpy()).pvalue)


@paired
@every_dist
@pytest.mark.parametrize("coordinate", COORDINATES)
def test_neighbours_are_independent(coordinate: str, dist: str, log2_pairs: int) -> None:
    assert dependence(coordinate, dist, log2_pairs) > 2 * FALSE_POSITIVE


def correlated(first: Tensor, second: Tensor) -> Tensor:
    return second * (1 - 0.02**2) ** 0.5 + first * 0.02


def same_size(first: Tensor, second: Tensor) -> Tensor:
    """Uncorrelated and dependent: every 20th column has its neighbour's size and its own sign."""
    planted = second.clone()
    planted[:, ::20] = first[:, ::20].abs().copysign(second[:, ::20])
    return planted


@paired
@continuous
@pytest.mark.parametrize("plant", [correlated, same_size])
def test_independence_can_fail(dist: str, log2_pairs: int, plant: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert dependence("draw", dist, log2_pairs, plant) < 2 * FALSE_POSITIVE


@paired
def test_independence_of_signs_can_fail(log2_pairs: int) -> None:
    def repeated(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first[:, :20], second[:, 20:]], dim=1)

    assert dependence("draw", "rademacher", log2_pairs, repeated) < 2 * FALSE_POSITIVE


# --- quantiles -------------------------------------------------------------------------------------------------------


def dense_words(per_octave: int = 2**15) -> Tensor:
    """Words of either sign, spread evenly over each octave of their magnitude, its first and last among them."""
    octaves = [
        torch.linspace(2**k, 2 ** (k + 1) - 1, min(per_octave, 2**k), dtype=torch.float64).long() for k in range(31)
    ]
    magnitudes = torch.cat(octaves)
    return torch.cat([magnitudes, magnitudes | 0x80000000])


def quantile_error(dist: str, scale: float = 1.0) -> float:
    """The greatest error of |eps| < 6 against scipy's inverse distribution function; |eps| = -F^-1(m / 2^32)."""
    words = dense_words()
    magnitude = ((words & 0x7FFFFFFF) | 1).double().numpy() / 2**32
    truth = QUANTILE[dist](magnitude)  # the left half of the distribution
    truth = numpy.where(words.numpy() & 0x80000000, truth, -truth)
    error = numpy.abs(scale * noise_contract.quantile(words, dist).double().numpy() - truth)
    return float(error[numpy.abs(truth) < 6].max())


@continuous
def test_quantiles(dist: str) -> None:
    assert quantile_error(dist) <= 1e-5


@continuous
def test_quantiles_can_fail(dist: str) -> None:
    assert quantile_error(dist, scale=1 + 1e-5) > 1e-5
