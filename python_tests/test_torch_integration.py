"""The ops as citizens of torch: opcheck, torch.compile, fake tensors, autograd, version counters, autocast."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch._dynamo.testing
from samples import values
from torch.utils._pytree import tree_leaves, tree_map_only

import ulr_kernels as ulr
from ulr_kernels import dispatch, noise_contract
from ulr_kernels.backends import cpp, cuda, triton
from ulr_kernels.ops._op import OPS


def v(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return values(seed, *shape, device="cpu", dtype=dtype)


SCALE, KEY = torch.tensor(0.5), torch.tensor(11)
WINDOW = ([2, 2], [1, 1, 1, 1], [1, 1], 2, False)

CALLS = {
    "philox4x32": lambda: (torch.arange(8).view(2, 4), torch.tensor([1, 2])),
    "fold_in": lambda: (torch.tensor([1, 2]), torch.tensor(3)),
    "noise": lambda: (KEY, [3, 5]),
    "noise_add": lambda: (v(1, 2, 5, 3), SCALE, KEY, 1, 4, True, True),
    "noise_score": lambda: (v(7, 4, 2), SCALE, KEY, [2, 5, 3], 1, True, "normal", "iid", 3),
    "scale_shift_grad_": lambda: (v(4, 5), v(5, 5), v(6, 5), v(1, 6, 5), v(7, 4, 6), SCALE, KEY, -1, True, True),
    "noisy_conv2d": lambda: (v(1, 2, 4, 6, 5), v(2, 6, 2, 3, 3), v(3, 6), SCALE, KEY, *WINDOW, 4, True),
    "noisy_conv2d_grad_": lambda: (
        *(v(4, 6, 2, 3, 3), v(5, 6), v(6, 6), v(1, 2, 4, 6, 5), v(7, 4, 2), SCALE, KEY, [3, 3], *WINDOW, True),
        *("normal", "iid", 9),
    ),
    "noisy_conv2d_recompute_": lambda: (
        *(v(4, 6, 2, 3, 3), v(5, 6), None, v(1, 2, 4, 6, 5), v(2, 6, 2, 3, 3), v(3, 6), v(7, 4, 2), SCALE, KEY),
        *(*WINDOW, True, "normal", "iid", 9),
    ),
    "noisy_linear": lambda: (v(1, 6, 8), v(2, 5, 8), v(3, 5), SCALE, KEY, 4, True),
    "noisy_linear_grad_": lambda: (v(4, 5, 8), v(5, 5), v(6, 5), v(1, 6, 8), v(7, 4, 6), SCALE, KEY, True),
    "foreach_noisy_linear_grad_": lambda: (
        *([v(4, 5, 8), v(5, 3, 4)], [v(6, 5), v(7, 3)], [v(1, 6, 8), v(2, 2, 3, 4)], [v(3, 2, 6), v(8, 2, 3)]),
        *([SCALE, SCALE], [KEY, torch.tensor(12)], True),
    ),
    "noisy_linear_recompute_": lambda: (
        *(v(4, 5, 8), v(5, 5), None, v(1, 6, 8), v(2, 5, 8), v(3, 5), v(7, 4, 6), SCALE, KEY, True),
    ),
    "perturb_": lambda: ([v(4, 5, 8), v(5, 5)], torch.tensor([1, 2]), SCALE),
    "combine_": lambda: (
        *([v(4, 5, 8), v(5, 5)], torch.tensor([1, 2]), v(6, 3), [], [v(7, 5, 8), v(8, 5)]),
        *([v(9, 5, 8).abs(), v(10, 5).abs()], SCALE, torch.tensor(3), 0.1),
    ),
    "noise_dot": lambda: (v(1, 6, 8), SCALE, KEY, 4),
    "noisy_mlp_step": lambda: (
        *([v(4, 5, 8), v(5, 3, 5)], [v(6, 5), v(7, 3)], v(1, 6, 8), torch.arange(6) % 3),
        *([v(2, 5, 8), v(8, 3, 5)], [v(3, 5), v(9, 3)], SCALE.expand(2), torch.tensor([1, 2]), 4),
    ),
    "perturbed_linear": lambda: (v(1, 6, 8), v(2, 5, 8), v(3, 5), SCALE, KEY, 4, True),
    "perturbed_conv2d": lambda: (v(1, 2, 3, 5, 4), v(2, 6, 3, 3, 3), v(3, 6), SCALE, KEY, [1, 2], [1] * 4),
    "perturbed_embedding": lambda: (torch.tensor([3, 0, 3]), v(2, 5, 8), SCALE, KEY, 4, True),
}


def test_every_op_is_here_and_public() -> None:
    assert set(CALLS) == set(OPS)
    assert {op.function for op in OPS.values()} <= {getattr(ulr.ops, name) for name in ulr.ops.__all__}


def test_every_op_has_kernels() -> None:
    """But for what docs/install.md says."""
    assert set(OPS) == set(cpp._PROVIDERS) == set(cuda.ARGUMENTS)
    assert set(OPS) - set(triton._MODULES) == set(triton._WITHOUT) == {"noisy_mlp_step"}


@pytest.mark.parametrize("op", CALLS)
def test_opcheck(op, device) -> None:
    args = tree_map_only(torch.Tensor, lambda a: a.to(device), CALLS[op]())
    torch.library.opcheck(getattr(torch.ops.ulr, op).default, args)


@pytest.mark.parametrize("op", CALLS)
def test_torchs_defaults_change_nothing(op, device) -> None:
    """Memory that a kernel takes for fp32 on its device must not follow the defaults that a program sets."""
    results = []
    for dtype, where in ((torch.float32, "cpu"), (torch.bfloat16, "meta"), (torch.float64, "meta")):
        args = tree_map_only(torch.Tensor, lambda a: a.to(device, copy=True), CALLS[op]())
        torch.set_default_dtype(dtype)
        try:
            with torch.device(where):
                results.append((getattr(torch.ops.ulr, op)(*args), args))
        finally:
            torch.set_default_dtype(torch.float32)
    expected, *others = map(tree_leaves, results)
    for found in others:
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


@pytest.mark.parametrize("op", CALLS)
def test_public_docstrings_say_what_goes_in_and_out(op) -> None:
    text = inspect.getdoc(OPS[op].function)
    assert text and "Args:" in text and "Raises:" in text
    documented = text.split("Args:")[1]
    for name in inspect.signature(OPS[op].function).parameters:
        assert name in documented, f"{op}: '{name}' is not documented"


def test_compile_builds_one_graph_for_all_keys_and_scales(device) -> None:
    x, w = v(1, 6, 8).to(device), v(2, 5, 8).to(device)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def step(sigma, key):
        return ulr.ops.noisy_linear(x, w, None, sigma, key, copies=2).relu()

    for number in range(4):
        sigma, key = torch.tensor(0.1 * (number + 1), device=device), torch.tensor(number, device=device)
        expected = ulr.ops.noisy_linear(x, w, None, sigma, key, copies=2).relu()
        torch.testing.assert_close(step(sigma, key), expected)
    assert counter.frame_count == 1


def test_compile_takes_python_numbers(device) -> None:
    x, w = v(1, 6, 8).to(device), v(2, 5, 8).to(device)
    torch._dynamo.reset()
    step = torch.compile(lambda key: ulr.ops.noisy_linear(x, w, None, 0.1, key), fullgraph=True, backend="aot_eager")
    for key in (1, 2, -(2**63), 2**63 - 1):
        torch.testing.assert_close(step(key), ulr.ops.noisy_linear(x, w, None, 0.1, key))


def test_compiled_inductor_gradient_accumulates(device) -> None:
    x, loss = v(1, 6, 8).to(device), v(7, 4, 6).to(device)
    torch._dynamo.reset()

    def accumulate(grad):
        ulr.ops.noisy_linear_grad_(grad, None, x, loss, 0.5, 11)
        return grad * 2

    expected = accumulate(torch.zeros(5, 8, device=device))
    torch.testing.assert_close(torch.compile(accumulate, fullgraph=True)(torch.zeros(5, 8, device=device)), expected)


def test_fake_tensors_take_the_same_checks() -> None:
    with torch._subclasses.FakeTensorMode():
        y = ulr.ops.noisy_linear(torch.empty(6, 8), torch.empty(5, 8), None, 0.1, 1, copies=3)
        assert y.shape == (3, 6, 5)
        with pytest.raises(ValueError, match="ulr::noisy_linear: 'x' must have 8 features"):
            ulr.ops.noisy_linear(torch.empty(6, 7), torch.empty(5, 8), None, 0.1, 1)


@pytest.mark.parametrize("op", ["noisy_linear_grad_", "noisy_linear_recompute_", "scale_shift_grad_"])
def test_autograd_notices_what_was_written(op, device) -> None:
    args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in CALLS[op]()]
    leaf = torch.ones_like(args[0], requires_grad=True)
    saved = args[0]
    product = (leaf * saved).sum()
    getattr(torch.ops.ulr, op)(*args)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_pathwise_gradients(device) -> None:
    """Against autograd of the same expression with the noise as a constant."""
    for shared in (True, False):
        x = v(1, 6, 8) if shared else v(1, 4, 6, 8)
        leaves = [t.to(device).requires_grad_() for t in (x, v(2, 5, 8), v(3, 5), v(8, 5).abs() + 0.1)]
        y = ulr.ops.noisy_linear(*leaves, 11, copies=4, antithetic=True)
        grads = torch.autograd.grad(y.square().sum(), leaves)
        x, w, b, s = twins = [t.detach().clone().requires_grad_() for t in leaves]
        half = torch.stack([ulr.noise((6, 5), 11, draw=c, device=device) for c in range(2)])
        z = x @ w.T + b + s * torch.cat([half, -half])
        for ours, theirs in zip(grads, torch.autograd.grad(z.square().sum(), twins), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_autocast_casts_like_a_product(device) -> None:
    x, w, b = (t.to(device) for t in (v(1, 6, 8), v(2, 5, 8), v(3, 5)))
    with torch.autocast(device, dtype=torch.bfloat16):
        y = ulr.ops.noisy_linear(x, w, b, 0.1, 1)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ulr.ops.noisy_linear(x.bfloat16(), w.bfloat16(), b.bfloat16(), 0.1, 1))
    with torch.autocast(device, dtype=torch.bfloat16):
        grad = torch.autograd.grad(ulr.ops.noisy_linear(x, w.requires_grad_(), b, 0.1, 1).float().sum(), w)[0]
        assert (
            torch.autograd.grad(ulr.ops.noisy_linear(x.bfloat16(), w, b, 0.1, 1).float().sum(), w)[0].shape == w.shape
        )
    torch.testing.assert_close(grad, x.sum(0).expand(5, 8), rtol=0.02, atol=0.02)


def test_sigma_on_the_host_is_checked_and_a_scalar_tensor_will_do(device) -> None:
    x, w = v(1, 6, 8).to(device), v(2, 5, 8).to(device)
    a = ulr.ops.noisy_linear(x, w, None, 0.25, 3)
    b = ulr.ops.noisy_linear(x, w, None, torch.tensor(0.25, dtype=torch.float64, device=device), 3)
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match="'sigma' must be finite and at least 0, got -1.0"):
        ulr.ops.noisy_linear(x, w, None, torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0]), 3)
    for dtype, sigma in ((torch.float64, 1e-46), (torch.float64, 1e300), (torch.float32, 1e-40)):
        with pytest.raises(ValueError, match="'sigma' must be a normal fp32 number"):
            ulr.ops.noisy_linear_grad_(w, None, x, torch.ones(2, 6), torch.tensor(sigma, dtype=dtype), 3)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_count_changes_no_bit_of_noise(threads, device) -> None:
    expected = ulr.noise((37, 1001), 5, device=device)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(ulr.noise((37, 1001), 5, device=device), expected)
    finally:
        torch.set_num_threads(before)


def test_an_absent_back_end_says_why() -> None:
    with pytest.raises(ValueError, match="ulr.use_backend: 'name' must be one of torch, cpp, cuda, triton, got 'gpu'"):
        with ulr.use_backend("gpu"):
            pass
    with (
        ulr.use_backend("cuda"),
        pytest.raises(ulr.BackendError, match="ulr::noise: back end 'cuda' cannot run on cpu: "),
    ):
        ulr.noise((3,), 1)


def test_each_gpu_has_the_back_ends_that_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    monkeypatch.setattr(cuda, "_why_unusable", lambda device: None)
    for name in ("library", "launcher"):
        monkeypatch.setattr(cuda._native, name, lambda *which: object())
    assert dispatch.lookup("noise", torch.device("cuda", 0)).__module__ == cuda.__name__
    assert dispatch.lookup("noise", torch.device("cuda", 1)).__module__ != cuda.__name__
    reason = dispatch.find("cuda", "noise", "cuda:1")
    assert reason == "it needs compute capability 8.0, this device has 7.5"


def test_noise_like_views_a_parameter_as_rows_and_columns(device) -> None:
    kernel = torch.empty(4, 3, 2, 2, device=device)
    assert torch.equal(ulr.noise_like(kernel, 9), ulr.noise((4, 12), 9, device=device).view(4, 3, 2, 2))
    assert torch.equal(ulr.noise_like(kernel[0, 0, 0], 9), ulr.noise((2,), 9, device=device))
    assert ulr.noise_like(kernel[0, 0, 0, 0], 9).shape == () and ulr.noise_like(kernel[:0], 9).shape == (0, 3, 2, 2)
    assert noise_contract.CONTRACT_VERSION == 1


def test_buffers_may_share_rows_but_not_elements(device) -> None:
    x, loss = v(1, 6, 8).to(device), v(7, 4, 6).to(device)
    both = torch.zeros(5, 9, device=device)
    apart = torch.zeros(5, 8, device=device), torch.zeros(5, device=device)
    ulr.ops.noisy_linear_grad_(both[:, :8], both[:, 8], x, loss, 0.5, 11)
    ulr.ops.noisy_linear_grad_(*apart, x, loss, 0.5, 11)
    torch.testing.assert_close(both, torch.cat([apart[0], apart[1][:, None]], 1))
    with pytest.raises(ValueError, match="'grad_weight' must not overlap 'grad_bias', got shared memory"):
        ulr.ops.noisy_linear_grad_(both[:, :8], both[:, 7], x, loss, 0.5, 11)
    with pytest.raises(ValueError, match="'grad_weight' must not overlap 'grad_bias', got shared memory"):
        ulr.ops.noisy_linear_grad_(both[:, 1:], both.flatten()[3:8], x, loss, 0.5, 11)


def test_forward_mode_is_refused_rather_than_silently_zero(device) -> None:
    x, w = v(1, 6, 8).to(device), v(2, 5, 8).to(device)
    with pytest.raises(NotImplementedError, match="ulr::noisy_linear: forward-mode derivatives are not implemented"):
        torch.func.jvp(lambda x: ulr.ops.noisy_linear(x, w, None, 0.1, 1), (x,), (x,))
