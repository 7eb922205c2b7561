"""Orthogonal signs (sampler="hadamard"): known answers, orthogonality, sums by one transform, exact estimates."""

from __future__ import annotations

import itertools

import pytest
import small_models
import torch
from torch import nn
from z_test import assert_unbiased, estimates

import ulr_kernels as ulr
from ulr_kernels import ops

modules_may_draw = small_models.modules_may_draw  # used by every test of this file
SIGNS = {"dist": "rademacher", "sampler": "hadamard"}
NOT_SIGNS = "'dist' must be 'rademacher' where sampler is 'hadamard', got 'normal'"
BACKENDS = [
    pytest.param(name, marks=pytest.mark.pair(f"{name}/cpu") if name == "cpp" else ()) for name in ("torch", "cpp")
]


def signs(shape, key, draw, **how) -> torch.Tensor:
    return ulr.noise(shape, key, draw=draw, **SIGNS, **how)


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_answers(backend: str) -> None:
    """The formula of docs/noise.md, written out for single coordinates."""
    with ulr.use_backend(backend):
        for draw, row, col, positions, width in (
            (0, 0, 0, 1, 1),
            (5, 3, 7, 1, 40),
            (2**16 + 9, 2, 100, 5, 300),
            (2**32 - 1, 2**20 + 1, 129, 1000, 4097),
        ):
            at = {"row_offset": row, "col_offset": col, "width": width, "positions": positions}
            base = ulr.noise((1, 1), 11, dist="rademacher", draw=draw >> 16, row_offset=row, col_offset=col)
            slot = (row % positions) * (width | 1) + col
            expected = base * (-1) ** (draw & slot & 0xFFFF).bit_count()
            assert torch.equal(signs((1, 1), 11, draw, **at), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", [0, 64, 2**16 - 64, 3 * 2**16])
def test_draws_of_an_aligned_block_are_orthogonal(backend: str, first: int) -> None:
    with ulr.use_backend(backend):
        eps = torch.stack([signs((1, 64), 3, first + d)[0] for d in range(64)])
    assert torch.equal(eps @ eps.T, 64 * torch.eye(64))
    assert torch.equal(eps.T @ eps, 64 * torch.eye(64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_slice_is_a_part_of_the_whole(backend: str) -> None:
    with ulr.use_backend(backend):
        whole = signs((12, 300), 5, 77, positions=4)
        part = signs((5, 130), 5, 77, positions=4, row_offset=3, col_offset=37, width=300)
    assert torch.equal(part, whole[3:8, 37:167])


@pytest.mark.parametrize("draws,draw", [(1, 0), (5, 0), (64, 64), (7, 2**16 - 3), (100, 300)])
def test_combine_sums_in_the_order_of_the_contract(draws: int, draw: int) -> None:
    """Bitwise on both back ends, and to rounding the sum of single draws."""
    coefficients = torch.randn(draws, generator=torch.Generator().manual_seed(0))
    at = {"row_offset": [3], "col_offset": [2], "width": [50]}
    found = []
    for backend in ("torch", "cpp"):
        with ulr.use_backend(backend):
            tensor = torch.zeros(9, 33)
            ops.combine_([tensor], [7], coefficients, draw=draw, **SIGNS, **at)
            found.append(tensor)
    assert torch.equal(*found)
    place = {"row_offset": 3, "col_offset": 2, "width": 50, "positions": 100}
    each = torch.stack([signs((9, 33), 7, draw + p, **place) for p in range(draws)]).double()
    torch.testing.assert_close(
        found[0].double(), torch.einsum("p,prc->rc", coefficients.double(), each), atol=1e-4, rtol=0
    )


def test_a_parameter_has_all_rows_in_one_sample() -> None:
    weight = torch.zeros(9, 33)
    ops.perturb_([weight], [7], 1.0, draw=5, **SIGNS)
    expected = ulr.noise_like(weight, 7, draw=5, **SIGNS)
    assert torch.equal(weight, expected)
    assert torch.equal(signs((9, 33), 7, 5, positions=9), expected)
    products = ops.perturbed_linear(torch.eye(33), torch.zeros(9, 33), None, 1.0, 7, copies=3, draw=4, **SIGNS)
    assert torch.equal(products[1].T, expected)
    rows = ops.perturbed_embedding(torch.tensor([2, 5]), torch.zeros(9, 33), 1.0, 7, copies=3, draw=4, **SIGNS)
    assert torch.equal(rows[1], expected[[2, 5]])


def squared(outputs, targets):
    return (outputs - targets).square().sum(-1)


LAYERS = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), (8, 6), 16),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 3)),
        (5, 2, 4, 4),
        128,
    ),
}


def gradients(model: nn.Module, x, y, **how) -> list[torch.Tensor]:
    model.zero_grad()
    ulr.ULR(model, **{"sigma": 0.1, "antithetic": True, **SIGNS, **how}).backward(x, y, squared)
    return [p.grad.clone() for p in model.parameters()]


def expected_gradients(model: nn.Module, x, y) -> list[torch.Tensor]:
    model.zero_grad()
    squared(model(x), y).mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("how", [{}, {"memory": "recompute"}, {"max_rows": 24}], ids=str)
def test_an_estimate_whose_copies_cover_all_slots_is_exact(kind: str, how: dict) -> None:
    """Of a linear model with squared loss; a pair cancels the even terms."""
    torch.manual_seed(0)
    make, shape, copies = LAYERS[kind]
    model, x, y = make(), torch.randn(shape), torch.randn(shape[0], 3)
    for found, expected in zip(
        gradients(model, x, y, copies=copies, **how), expected_gradients(model, x, y), strict=True
    ):
        assert (found - expected).norm() < 1e-5 * expected.norm()


def test_noise_on_all_weights_of_one_layer_is_exact_too() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 5, bias=False), torch.randn(8, 6), torch.randn(8, 5)
    (found,) = gradients(model, x, y, copies=128, noise="weights")
    (expected,) = expected_gradients(model, x, y)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_losses_that_each_row_affects_get_the_same_noise() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(5, 6, 4), torch.randn(5, 6, 3)

    def by_row(outputs, targets):
        return (outputs - targets).square().sum(-1)

    def whole(outputs, targets):
        return by_row(outputs, targets).mean(-1)

    found = []
    for loss_fn, affects in ((whole, None), (by_row, torch.ones(6, 6))):
        model.zero_grad()
        ulr.ULR(model, copies=8, antithetic=True, **SIGNS).backward(x, y, loss_fn, affects)
        found.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("copies", [3, 4])
def test_the_mean_over_signs_is_the_enumerated_expectation(copies: int) -> None:
    """Of three coordinates: three copies are no aligned block, and four cover all slots."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(2, 3), torch.randn(2), torch.randn(3)

    def loss_fn(outputs, targets):
        return (outputs > 0.2).float().sum(-1) + squared(outputs, targets)

    sigma, clean = 0.7, model(x).detach()
    expected = torch.zeros(3)
    for each in itertools.product((1.0, -1.0), repeat=3):
        eps = torch.tensor(each)
        expected += loss_fn(clean + sigma * eps, y) * eps / sigma / 8
    how = {"antithetic": False, "baseline": "clean", "sigma": sigma, "noised_rows": 2**15}
    found = estimates(model, x, y, loss_fn, copies=copies, **SIGNS, **how)
    assert_unbiased(found, torch.cat([torch.outer(expected, x).flatten(), expected]))


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: ulr.noise((2, 3), 1, sampler="hadamard"), f"ulr::noise: {NOT_SIGNS}"),
        (lambda: signs((2, 3), 1, 0, positions=2, col_offset=1), "ulr::noise: 'width' must count the columns"),
        (lambda: signs((2, 3), 1, 0, col_offset=4, width=6), r"'width' must be at least 7 .*, or 0, got 6"),
        (
            lambda: ops.perturb_([torch.zeros(2, 3)], [1], 1.0, rank=2, **SIGNS),
            "'rank' must be None where sampler is 'hadamard'.*got 2",
        ),
        (
            lambda: ops.perturb_([torch.zeros(2)], [1], 1.0, sampler="sobol"),
            "'sampler' must be 'iid' or 'hadamard' for noise",
        ),
        (lambda: ulr.ULR(nn.Linear(2, 2), sampler="hadamard"), f"ulr.ULR: {NOT_SIGNS}"),
        (
            lambda: ulr.ULR(nn.Linear(2, 2), antithetic=False, **SIGNS),
            "'baseline' must be 'clean' .*: a mean is biased",
        ),
        (
            lambda: ulr.optim.ES(nn.Linear(2, 2), antithetic=False, **SIGNS),
            "'antithetic' must be True where sampler is 'hadamard'",
        ),
        (lambda: ulr.optim.EGGROLL(nn.Linear(2, 2), **SIGNS), "'rank' must be None where sampler is 'hadamard', got 1"),
        (lambda: ulr.optim.MeZO(nn.Linear(2, 2), sampler="hadamard"), NOT_SIGNS),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_step_of_many_probes_is_exact_along_each_weight() -> None:
    """As many probes as weights, of a linear function: the update is the gradient."""
    torch.manual_seed(0)
    model, direction = nn.Linear(8, 4, bias=False), torch.randn(4, 8)
    before = model.weight.detach().clone()
    optimizer = ulr.optim.MeZO(model, lr=0.5, eps=1e-3, probes=64, **SIGNS)
    optimizer.step(lambda: (model.weight * direction).sum())
    torch.testing.assert_close(before - model.weight, 0.5 * direction, atol=2e-3, rtol=0)
