# mypy: disable-error-code="assignment"
"""Scores on tiles, weighted by the losses and added up part by part (`noise_parts`); sums into buffers."""

import triton
import triton.language as tl

from ulr_kernels.backends.triton.noise_contract import score


@triton.jit
def add(buffer, value, inside):
    """buffer += value, rounded once to the buffer's dtype."""
    total = tl.load(buffer, mask=inside, other=0).to(tl.float32) + value
    tl.store(buffer, total.to(buffer.dtype.element_ty), mask=inside)


@triton.jit
def no_parts(P: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Zeros of the form of `noise_parts`."""
    zeros = ()
    for _ in tl.static_range(P):
        zeros = zeros + (tl.zeros([BR, BC // P], tl.float32),)
    return zeros


@triton.jit
def weighted(total, factor, parts, DIST: tl.constexpr):
    """total + factor * score, part by part."""
    result = ()
    for p in tl.static_range(len(parts)):
        result = result + (tl.fma(factor, score(parts[p], DIST), total[p]),)
    return result


@triton.jit
def log_weighted(total, factor, parts, DIST: tl.constexpr):
    """total + factor * (eps * score - 1), part by part."""
    result = ()
    for p in tl.static_range(len(parts)):
        result = result + (tl.fma(factor, parts[p] * score(parts[p], DIST) - 1, total[p]),)
    return result


@triton.jit
def weigh(
    reduced, reduced_log, parts, losses, mirror, row_inside, grad_log_sigma, DIST: tl.constexpr,
    ANTITHETIC: tl.constexpr,
):  # fmt: skip
    """Load the loss weights of a draw, at `losses`, and of its negative, `mirror` further on (0 if there is none).

    Returns both, and the sums over draws with this draw's scores added; those of ln sigma only if it has a gradient.
    """
    plus = tl.load(losses, mask=row_inside, other=0)[:, None]
    minus = tl.zeros_like(plus)
    if ANTITHETIC:
        minus = tl.load(losses + mirror, mask=row_inside, other=0)[:, None]
    reduced = weighted(reduced, plus - minus, parts, DIST)  # the score is odd
    if grad_log_sigma is not None:
        reduced_log = log_weighted(reduced_log, plus + minus, parts, DIST)
    return plus, minus, reduced, reduced_log
