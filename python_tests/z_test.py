"""Estimates of many steps held against their expectation, for the tests of unbiasedness."""

import pytest
import torch

import ulr_kernels as ulr

NOISED_ROWS, STEPS = 2**17, 12  # rows of all copies in one step
# A step sums rows of one sample over and over. Where they do not scatter (the last layer of a quadratic loss, in
# pairs), the addends of a gradient are equal, and each fp32 addition rounds the same way: by up to half a unit of a sum
# that is on average half of the last one. How much of it shows depends on how the product splits the rows, as on its
# number of threads.
EQUAL_ADDENDS = NOISED_ROWS * 2.0**-25


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def estimates(model, x, y, loss_fn, *, copies, noised_rows=NOISED_ROWS, **settings):
    """One estimate per step, `[steps, parameters]`, those of ln sigma last; x and y are one sample each."""
    rows = noised_rows // copies
    settings["copies"] = copies
    estimator = ulr.ULR(model, **settings)
    parameters = [p for p in model.parameters() if p.requires_grad] + estimator.parameters()
    x, y = (None if t is None else t.expand(rows, *t.shape) for t in (x, y))
    results = []
    for _ in range(STEPS):
        for parameter in parameters:
            parameter.grad = None
        estimator.backward(x, y, loss_fn)
        results.append(flat([p.grad for p in parameters]))
    return torch.stack(results)


def z_test(samples, expected):
    """Means against their expectation, along it and in every component."""
    samples, expected = samples.double(), expected.detach().double()
    slopes = samples @ expected / expected.square().sum()
    error = slopes.std() / len(slopes) ** 0.5
    assert abs(slopes.mean() - 1) < 4.5 * error + EQUAL_ADDENDS, f"slope {slopes.mean():.4f} +- {error:.4f}"
    errors = samples.std(0) / len(samples) ** 0.5 + 1e-5 * expected.abs().max()  # and of fp32
    distance = ((samples.mean(0) - expected).abs() - EQUAL_ADDENDS * expected.abs()).clamp(min=0)
    assert (distance / errors).max() < 8  # Student's t with 11 degrees of freedom


def assert_unbiased(samples, expected):
    z_test(samples, expected)
    for planted in (0.95, 1.05):
        with pytest.raises(AssertionError, match="slope"):
            z_test(planted * samples, expected)
