"""Estimates of many steps held against their expectation, for the tests of unbiasedness."""

import pytest
import torch

import ulr_kernels as ulr

NOISED_ROWS, STEPS = 2**17, 12  # rows of all copies in one step


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
    assert abs(slopes.mean() - 1) < 4.5 * error, f"slope {slopes.mean():.4f} +- {error:.4f}"
    errors = samples.std(0) / len(samples) ** 0.5 + 1e-5 * expected.abs().max()  # and of fp32
    assert ((samples.mean(0) - expected).abs() / errors).max() < 8  # Student's t with 11 degrees of freedom


def assert_unbiased(samples, expected):
    z_test(samples, expected)
    for planted in (0.95, 1.05):
        with pytest.raises(AssertionError, match="slope"):
            z_test(planted * samples, expected)
