"""noise_add, noise_dot, noise_score and scale_shift_grad_ against their definitions in fp64, on all back ends here."""

from __future__ import annotations

import pytest
import torch
import truth
from samples import Sample
from test_ops import clone, pick, poison, samples  # noqa: F401
from torch import Tensor

import ulr_kernels as ulr
from ulr_kernels import noise_contract
from ulr_kernels.backends import cpp
from ulr_kernels.ops._op import FLOATS, OPS

FAMILY = ("noise_add", "noise_dot", "noise_score", "scale_shift_grad_")


def columns_last(tensor: Tensor, feature_dim: int) -> Tensor:
    """One copy as rows and columns, element by element as the contract counts them."""
    axes = [i for i in range(tensor.dim()) if i != feature_dim % tensor.dim()]
    return tensor.cpu()[None].permute(0, *(1 + i for i in axes), 1 + feature_dim % tensor.dim()).flatten(0, -2)


def weighted_scores(
    rows, cols, loss_weight, sigma, key, *, antithetic=False, draw=0, dist="normal", positions=1, **spec
):
    """fp64 `[C, R, N]`: loss_weight * score / sigma and loss_weight * (eps * score - 1)."""
    copies = loss_weight.shape[0]
    spec |= {"dist": dist, "positions": positions}
    eps = truth.signed_noise(copies, rows, cols, key, antithetic, draw, **spec)
    score = eps if dist != "laplace" else torch.copysign(torch.tensor(2.0).double().sqrt(), eps)
    loss = loss_weight.cpu().double().repeat_interleave(positions, 1)[:, :, None]
    return loss * score / torch.as_tensor(sigma).cpu().double(), loss * (eps * score - 1)


def assert_close(output: Tensor, value: Tensor, magnitude: Tensor, terms: int) -> None:
    allowed = truth.tolerance(value, magnitude, output.dtype, torch.float32, terms)
    error = (output.cpu().double() - value).abs()
    assert output.shape == value.shape
    assert not (error.isnan() | (error > allowed)).any(), f"worst {(error / allowed).max():.3g} of the tolerance"


def compare_add(sample: Sample) -> list[Tensor]:
    x, sigma, key = sample.args
    options = {"feature_dim": -1, "copies": 1, "shared": True, "antithetic": False, "draw": 0} | sample.kwargs
    feature_dim, copies, shared, antithetic, draw = (options.pop(name) for name in list(options)[:5])
    y = ulr.ops.noise_add(*sample.args, **sample.kwargs)
    clean = [columns_last(x if shared else x[c], feature_dim) for c in range(copies)]
    eps = truth.signed_noise(copies, *clean[0].shape, key, antithetic, draw, **options)
    for copy in range(copies):
        # Exact but for the one rounding of the sum: sigma * eps has at most 48 bits.
        exact = clean[copy].double() + torch.as_tensor(sigma).cpu().float().double() * eps[copy]
        assert torch.equal(columns_last(y[copy], feature_dim), exact.float().to(x.dtype)), f"copy {copy}"
    assert y.shape == (copies, *(x.shape if shared else x.shape[1:])) and y.dtype == x.dtype
    return [y]


def compare_score(sample: Sample) -> list[Tensor]:
    shape, loss_weight, sigma, key = sample.args
    options = dict(sample.kwargs)
    feature_dim = options.pop("feature_dim", -1)
    out = ulr.ops.noise_score(*sample.args, **sample.kwargs)
    matrix = columns_last(out, feature_dim)
    value, _ = weighted_scores(*matrix.shape, loss_weight, sigma, key, **options)
    assert out.is_contiguous() and out.shape == torch.Size(shape)
    assert_close(matrix, value.sum(0), value.abs().sum(0), loss_weight.shape[0])
    return [out]


def compare_noise_dot(sample: Sample) -> list[Tensor]:
    x, sigma, key = sample.args
    options = {"feature_dim": -1, "copies": 1, "antithetic": False, "draw": 0, "positions": 1} | sample.kwargs
    feature_dim, copies, antithetic, draw = (options.pop(name) for name in list(options)[:4])
    out = ulr.ops.noise_dot(*sample.args, **sample.kwargs)
    inputs, positions = columns_last(x, feature_dim).double(), options["positions"]
    eps = truth.signed_noise(copies, *inputs.shape, key, antithetic, draw, **options)
    terms = torch.as_tensor(sigma).cpu().double() * eps * inputs
    value, magnitude = (t.sum(-1).unflatten(1, (-1, positions)).sum(-1) for t in (terms, terms.abs()))
    assert_close(out, value, magnitude, positions * inputs.shape[1])
    return [out]


def compare_dot(sample: Sample) -> list[Tensor]:
    grad_weight, grad_bias, x, loss_weight, sigma, key = sample.args
    options = {"feature_dim": -1, "shared": True, "grad_log_sigma": None} | sample.kwargs
    feature_dim, shared, grad_log_sigma = (options.pop(name) for name in list(options)[:3])
    copies = loss_weight.shape[0]
    inputs = torch.stack([columns_last(x if shared else x[c], feature_dim) for c in range(copies)]).double()
    by_bias, by_log_sigma = weighted_scores(*inputs.shape[1:], loss_weight, sigma, key, **options)
    terms = (by_bias * inputs, by_bias, by_log_sigma)
    buffers = [clone(b) for b in (grad_weight, grad_bias, grad_log_sigma)]
    kwargs = sample.kwargs | ({} if grad_log_sigma is None else {"grad_log_sigma": buffers[2]})
    ulr.ops.scale_shift_grad_(*buffers[:2], *sample.args[2:], **kwargs)
    for buffer, before, term in zip(buffers, (grad_weight, grad_bias, grad_log_sigma), terms, strict=True):
        if buffer is not None:
            over = (0, 1) if buffer.dim() else (0, 1, 2)
            start = before.cpu().double()
            assert_close(buffer, start + term.sum(over), start.abs() + term.abs().sum(over), term.numel())
    return [b for b in buffers if b is not None]


COMPARE = {
    "noise_add": compare_add,
    "noise_dot": compare_noise_dot,
    "noise_score": compare_score,
    "scale_shift_grad_": compare_dot,
}


# In the half types, which are read and written in other ways and computed in the same.
HALF = ("separate", "image", "image-separate", "channels-last", "same-dtype", "strided", "cropped", "image-signs")


def run_samples(op: str, device: str, dtype: torch.dtype) -> None:
    for sample_id in samples(op, good=True):
        if dtype == torch.float32 or sample_id in HALF:
            COMPARE[op](pick(op, sample_id, device, dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("op", FAMILY)
def test_each_sample_is_its_definition(op, dtype, device) -> None:
    run_samples(op, device, dtype)


def test_memory_format_changes_no_bit_and_is_kept(device) -> None:
    x = ulr.noise((2, 13, 5, 4), 3, device=device)
    last = x.contiguous(memory_format=torch.channels_last)
    first, second = (ulr.ops.noise_add(t, 0.5, 7, feature_dim=1, copies=2) for t in (x, last))
    assert torch.equal(first, second)
    assert first.is_contiguous() and second[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dist", ["normal", "rademacher"])
def test_a_slice_makes_its_part_of_the_whole(dist, device) -> None:
    x = ulr.noise((4, 150, 3, 2), 3, device=device)
    options = {"dist": dist, "feature_dim": 1}
    whole = ulr.ops.noise_add(x, 0.5, 7, copies=4, **options)
    assert torch.equal(whole[2:], ulr.ops.noise_add(x, 0.5, 7, copies=2, draw=2, **options))
    assert torch.equal(whole[:, 1:3], ulr.ops.noise_add(x[1:3], 0.5, 7, copies=4, row_offset=6, **options))
    assert torch.equal(whole[:, :, 130:], ulr.ops.noise_add(x[:, 130:], 0.5, 7, copies=4, col_offset=130, **options))
    loss = ulr.noise((4, 4), 5, device=device)
    score = ulr.ops.noise_score(x.shape, loss, 0.5, 7, positions=6, **options)
    part = ulr.ops.noise_score((2, 150, 3, 2), loss[:, 1:3], 0.5, 7, positions=6, row_offset=6, **options)
    torch.testing.assert_close(score[1:3], part)


def test_its_noise_is_the_noise_op(device) -> None:
    tokens = torch.zeros(3, 5, 21, device=device)
    assert torch.equal(
        ulr.ops.noise_add(tokens, 1.0, 77, copies=2)[1], ulr.noise((3, 5, 21), 77, draw=1, device=device)
    )
    image = ulr.ops.noise_add(torch.zeros(3, 21, 4, 5, device=device), 1.0, 77, feature_dim=1)[0]
    assert torch.equal(image.movedim(1, -1), ulr.noise((3, 4, 5, 21), 77, device=device))


def test_copies_of_their_own_by_one_call_each(device) -> None:
    """One call of `noise_score` a copy adds up to the whole, as its docstring says of inputs that are not shared."""
    loss = ulr.noise((6, 4), 5, device=device)
    whole = ulr.ops.noise_score((4, 9), loss, 0.5, 7, antithetic=True, draw=3)
    parts = [
        ulr.ops.noise_score((4, 9), sign * loss[c : c + 1], 0.5, 7, draw=3 + c % 3)
        for c, sign in enumerate((1, 1, 1, -1, -1, -1))
    ]
    torch.testing.assert_close(whole, torch.stack(parts).sum(0))


def affine_gradients(copies: int, planted: float, device: str) -> tuple[Tensor, Tensor]:
    """Gradients of a quadratic loss by likelihood ratio and by calculus, of a normalisation's weight and bias.

    A quadratic loss has the same gradient with noise as without. `planted`: a factor on the noise of the forward.
    """
    rows, cols, sigma = 24, 6, 0.5
    x, slope = ulr.noise((rows, cols), 1, device=device), ulr.noise((cols,), 2, device=device) + 2
    weight, bias = ulr.noise((cols,), 3, device=device) + 1, ulr.noise((cols,), 4, device=device)
    clean = weight * x + bias
    y = ulr.ops.noise_add(clean, sigma * planted, 5, copies=copies, antithetic=True)
    loss = (0.5 * slope * y.square()).sum(-1)
    buffers = torch.zeros(cols, device=device), torch.zeros(cols, device=device)
    ulr.ops.scale_shift_grad_(*buffers, x, (loss / copies).contiguous(), sigma, 5, antithetic=True)
    true = slope * clean
    return torch.cat(buffers).cpu().double(), torch.cat([(true * x).sum(0), true.sum(0)]).cpu().double()


def test_unbiased_for_a_quadratic_loss() -> None:
    """The slope of the estimate on the truth is 1 to a third of a per cent; 3 % on the noise are seen."""

    def slope(planted: float) -> float:
        estimate, true = affine_gradients(2**15, planted, "cpu")
        return float(estimate @ true / (true @ true))

    assert abs(slope(1.0) - 1) < 0.01 < abs(slope(1.03) - 1)


def test_pathwise_gradients(device) -> None:
    for shared, shape in ((True, (3, 5, 4)), (False, (4, 3, 5, 4))):
        for sigma in (torch.tensor(0.5, device=device), ulr.noise((5,), 4, device=device).abs() + 0.1):
            leaves = [t.requires_grad_() for t in (ulr.noise(shape, 3, device=device), sigma)]
            y = ulr.ops.noise_add(*leaves, 7, feature_dim=1, copies=4, shared=shared, antithetic=True)
            twins = [t.detach().clone().requires_grad_() for t in leaves]
            eps = torch.stack([ulr.noise((3, 4, 5), 7, draw=c, device=device).movedim(-1, 1) for c in range(2)])
            scale = twins[1] if twins[1].dim() == 0 else twins[1][:, None]
            z = twins[0] + scale * torch.cat([eps, -eps])
            for ours, theirs in zip(
                torch.autograd.grad(y.square().sum(), leaves), torch.autograd.grad(z.square().sum(), twins), strict=True
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_forward_mode_is_refused(device) -> None:
    x = torch.zeros(3, 4, device=device)
    with pytest.raises(NotImplementedError, match="ulr::noise_add: forward-mode derivatives are not implemented"):
        torch.func.jvp(lambda x: ulr.ops.noise_add(x, 0.1, 1), (x,), (x,))


def test_compiled_calls(device) -> None:
    torch._dynamo.reset()
    x, loss = ulr.noise((2, 5, 3, 4), 3, device=device), ulr.noise((4, 2), 5, device=device)

    def step(x: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        buffers = torch.zeros(5, device=device), torch.zeros(5, device=device)
        y = ulr.ops.noise_add(x, 0.1, key, feature_dim=1, copies=4)
        ulr.ops.scale_shift_grad_(*buffers, x, loss, 0.1, key, feature_dim=1, positions=12)
        score = ulr.ops.noise_score(x.shape, loss, 0.1, key, feature_dim=1, positions=12)
        return y.relu(), buffers[0] * 2, score

    key = torch.tensor(noise_contract.fold_in(1, 2), device=device)
    for inputs in (x, x.contiguous(memory_format=torch.channels_last)):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for result, expected in zip(compiled(inputs, key), step(inputs, key), strict=True):
            torch.testing.assert_close(result, expected)


def test_every_op_of_the_family_is_tested() -> None:
    assert set(COMPARE) == set(FAMILY) <= set(OPS)


def everything(dtype: torch.dtype, dist: str, shape: tuple[int, ...], feature_dim: int) -> list[Tensor]:
    """The outputs of all four ops, and of `noise_dot` for a sample of many rows too."""
    x, options = ulr.noise(shape, 3).to(dtype), {"feature_dim": feature_dim, "dist": dist, "antithetic": True}
    rows = x.numel() // x.shape[feature_dim]
    loss, buffers = ulr.noise((6, rows), 4), [torch.zeros(x.shape[feature_dim]), torch.zeros(())]
    log_sigma = None if dist == "rademacher" else torch.zeros(x.shape[feature_dim])
    ulr.ops.scale_shift_grad_(*buffers, x, loss, 0.3, 6, grad_log_sigma=log_sigma, **options)
    results = [ulr.ops.noise_add(x, 0.3, 6, copies=6, **options), *buffers]
    results.append(ulr.ops.noise_score(shape, loss, 0.3, 6, **options))
    results += [ulr.ops.noise_dot(x, 0.3, 6, copies=6, positions=p, **options) for p in (1, rows // shape[0])]
    return results if log_sigma is None else [*results, log_sigma]


@pytest.mark.pair("cpp/cpu")
@pytest.mark.parametrize("dist", ["normal", "laplace", "rademacher"])
@pytest.mark.parametrize(("shape", "feature_dim"), [((3, 21, 9, 11), 1), ((700, 10), -1)])
def test_instruction_sets_and_threads_give_the_same_bits(dist, shape, feature_dim) -> None:
    before = torch.get_num_threads()
    cases = [(isa, threads) for isa in reversed(cpp.available_isas()) for threads in (1, 3)]
    results = []
    try:
        with ulr.use_backend("cpp"):
            for isa, threads in cases:
                cpp.set_isa(isa)
                torch.set_num_threads(threads)
                results.append(everything(torch.bfloat16, dist, shape, feature_dim))
    finally:
        torch.set_num_threads(before)
        cpp.set_isa(None)
    for case, result in zip(cases, results, strict=True):
        for value, expected in zip(result, results[0], strict=True):
            assert torch.equal(value, expected), case
