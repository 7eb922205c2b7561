"""The CUDA sources, compiled for the host and run by the emulator: the tests of the ops, on every kernel."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
import test_linear_grads
import test_mlp_step
import test_ops
import test_perturbed
import torch
from cuda_emulation import emulation
from samples import Sample, values
from test_contract import (  # noqa: F401 -- collected here, with this module's device
    test_fold_in_on_host_and_device,
    test_frozen_vectors,
    test_orthogonal_signs_by_integers,
    test_philox_known_answers,
    test_quantile_noise_by_exact_arithmetic,
    test_signs_by_integers,
)
from test_noise_add import (
    COMPARE,
    FAMILY,
    everything,
    run_samples,
    test_memory_format_changes_no_bit_and_is_kept,  # noqa: F401
)
from test_noise_add import (  # noqa: F401
    test_a_slice_makes_its_part_of_the_whole as test_a_slice_of_any_tensor,
)
from test_ops import (  # noqa: F401
    poison,
    test_a_slice_makes_its_part_of_the_whole,
    test_forward_noise_is_the_noise_op,
    test_integer_ops_are_bitwise_the_reference,
    test_noise_is_bitwise_the_contract,
)
from test_parameters import (  # noqa: F401
    test_adds_the_noise_of_noise_like,
    test_bitwise_the_reference,
    test_memory_format_does_not_enter,
    test_shards_make_their_part_of_the_whole,
    test_the_order_of_roundings_is_the_written_one,
)

from ulr_kernels import use_backend
from ulr_kernels.backends import cuda
from ulr_kernels.ops._op import FLOATS, NoiseSpec
from ulr_kernels.ops.noise import Noise

pytestmark = pytest.mark.pair("cuda/emulated")


@pytest.fixture(scope="module")
def library() -> emulation.Library:
    return emulation.Library(emulation.kernels())


@pytest.fixture
def device(library: emulation.Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(cuda, "provider", lambda op, device: library.provider(op))
    library.seed(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small: waiting for other threads would take most of the time
    with use_backend("cuda"):
        yield "cpu"
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", test_ops.LINEAR)
def test_linear(op, dtype, device) -> None:
    for sample_id in test_ops.samples(op, good=True):
        test_ops.test_linear(op, sample_id, dtype, device)


@pytest.mark.parametrize("op", FAMILY)
def test_any_tensor(op, device) -> None:
    run_samples(op, "cpu", torch.float32)
    for dtype in (torch.bfloat16, torch.float16) if op != "noise_score" else ():
        run_samples(op, "cpu", dtype)


@pytest.mark.parametrize("warps", [1, 24])
def test_noise_dot_by_warps_with_much_to_do(warps, device, monkeypatch) -> None:
    """Several turns of a warp, draws of several warps, ranges of several turns."""
    monkeypatch.setattr(cuda.elementwise, "WARPS", warps)
    run_samples("noise_dot", device, torch.float32)
    long = {"copies": 70, "positions": 4, "col_offset": 5, "width": 1600}
    for options in ({}, {"dist": "rademacher"}, {"dist": "rademacher", "sampler": "hadamard"}):
        x = values(1, 8, 1500 if options else 400, device=device, dtype=torch.float32)
        COMPARE["noise_dot"](Sample("long", (x, 0.3, 11), long | options))


def test_sums_over_rows_repeat_bitwise_in_any_order_of_threads(device, library) -> None:
    expected = everything(torch.bfloat16, "normal", (3, 41, 9, 11), 1)
    for seed in range(2, 5):
        library.seed(seed)
        for result, first in zip(everything(torch.bfloat16, "normal", (3, 41, 9, 11), 1), expected, strict=True):
            assert torch.equal(result, first)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_of_many_layers_in_one_launch(dtype, device) -> None:
    for sample_id in test_ops.samples("foreach_noisy_linear_grad_", good=True):
        test_linear_grads.compare(test_ops.pick("foreach_noisy_linear_grad_", sample_id, device, dtype))
    test_linear_grads.compare(test_linear_grads.many(dtype))


@pytest.mark.parametrize("dtype", test_mlp_step.DTYPES, ids=str)
def test_mlp_step_in_one_launch(dtype, device) -> None:
    for sample_id in test_ops.samples("noisy_mlp_step", good=True):
        test_mlp_step.compare(test_ops.pick("noisy_mlp_step", sample_id, device, dtype))


@pytest.mark.parametrize("dtype", test_mlp_step.DTYPES, ids=str)
def test_mlp_step_by_tiles_of_samples(dtype, device, monkeypatch) -> None:
    """Activations that do not fit at once, several panels of inputs, parts of gradients and copies."""
    monkeypatch.setattr(cuda.mlp, "ACTIVATION_BYTES", 2**14 * dtype.itemsize)
    monkeypatch.setattr(cuda.mlp, "processors", lambda device: 24)  # more parts than there are blocks
    cuda.mlp.plan.cache_clear()
    whole, plans = cuda.mlp.plan, []
    monkeypatch.setattr(cuda.mlp, "plan", lambda shape: plans.append((shape, whole(shape)[0])) or whole(shape))
    for sample in test_mlp_step.large(dtype):
        test_mlp_step.compare(sample)
    whole.cache_clear()
    assert any(numbers[2] < shape.rows for shape, numbers in plans)  # samples of a tile
    splits, fans = (max(numbers[at] for _, numbers in plans) for at in (6, 8))  # of the first layer
    assert splits > 1 and fans > 1


def test_mlp_step_repeats_bitwise_in_any_order_of_threads(device, library) -> None:
    sample = test_ops.pick("noisy_mlp_step", "layerwise", "cpu", torch.bfloat16)
    expected = test_mlp_step.compare(sample)
    for seed in (2, 3):
        library.seed(seed)
        for result, first in zip(test_mlp_step.compare(sample), expected, strict=True):
            assert torch.equal(result, first)


def large(op: str, dtype: torch.dtype) -> Iterator[Sample]:
    """Calls of several tiles along every axis, which the ops' own samples are too small for."""

    def v(seed: int, *shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return values(seed, *shape, device="cpu", dtype=dtype)

    def f(seed: int, *shape: int) -> torch.Tensor:
        return v(seed, *shape, dtype=torch.float32)

    pairs = {"antithetic": True}
    if op == "noisy_linear":
        yield Sample("tiles", (v(1, 140, 40), v(2, 270, 40), v(3, 270), 0.3, 11), {"copies": 2, "col_offset": 37})
        yield Sample("one-pair", (v(4, 2, 9, 70), v(2, 30, 70), v(3, 30), 0.3, 11), {"copies": 2, **pairs})
        yield Sample("pairs", (v(4, 4, 140, 20), v(2, 140, 20), v(3, 140), 0.3, 11), {"copies": 4, **pairs})
        return

    def call(rows: int, inputs: int, copies: int, buffers: torch.dtype, loss: float, x: torch.Tensor) -> tuple:
        layer = () if op == "noisy_linear_grad_" else (v(21, 40, inputs), v(22, 40))
        weight_and_bias = v(2, 40, inputs, dtype=buffers), v(3, 40, dtype=buffers)
        return (*weight_and_bias, x, *layer, loss * f(5, copies, rows), 0.3, 11)

    total, each = {"grad_log_sigma": f(7)}, {"grad_log_sigma": f(7, 40)}
    yield Sample("panels", call(140, 540, 4, torch.float32, 1.0, v(1, 140, 540)), {**total, **pairs})
    yield Sample("rounded-once", call(140, 540, 2, dtype, 1.0, v(1, 140, 540)), each)
    yield Sample("separate", call(140, 530, 2, torch.float32, 1.0, v(6, 2, 140, 530)), {"col_offset": 5, **pairs})
    signs = {"dist": "rademacher", "col_offset": 100}
    yield Sample("separate-signs", call(140, 150, 2, torch.float32, 1.0, v(6, 2, 140, 150)), signs)
    yield Sample("pairs-of-signs", call(140, 150, 4, dtype, 1.0, v(6, 4, 140, 150)), {**signs, **pairs})
    bias_alone = (None, *call(150, 20, 2, torch.float32, 1.0, v(6, 2, 150, 20))[1:])
    yield Sample("signs-bias-alone", bias_alone, signs)
    yield Sample("tiny-losses", call(40, 20, 2, torch.float32, 1e-9, v(1, 40, 20)), pairs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", test_ops.LINEAR)
def test_several_tiles(op, dtype, device) -> None:
    for sample in large(op, dtype):
        test_ops.compare_linear(op, sample)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", [op for op in test_perturbed.PERTURBED if op in cuda.ARGUMENTS])
def test_weight_noise(op, dtype, device) -> None:
    for sample_id in test_ops.samples(op, good=True):
        test_perturbed.compare(op, test_ops.pick(op, sample_id, device, dtype))
    for sample in test_perturbed.large(op, dtype):
        test_perturbed.compare(op, sample)
    for dist in ("normal", "rademacher"):
        if dtype == torch.float32:  # each goes through all dtypes
            test_perturbed.test_the_perturbed_weight_to_the_bit(op, dist, device)


@pytest.mark.parametrize("op", test_ops.LINEAR)
def test_results_repeat_bitwise_in_any_order_of_threads(op, device, library) -> None:
    sample = test_ops.pick(op, "wide", "cpu", torch.bfloat16)
    expected = test_ops.compare_linear(op, sample)
    for seed in range(2, 5):
        library.seed(seed)
        for result, first in zip(test_ops.compare_linear(op, sample), expected, strict=True):
            assert torch.equal(result, first)


def test_a_failed_launch_is_an_error_with_its_reason(library, device) -> None:
    launch = library.provider("noise")
    with pytest.raises(RuntimeError, match="noise: .*dtype"):
        launch(torch.empty(2, 8, dtype=torch.float16), Noise([2, 8], NoiseSpec(torch.tensor(1))))


def test_a_device_that_no_kernel_can_run_on_is_named(library, monkeypatch) -> None:
    assert library.library.ulr_cuda_usable(0) == 0
    code = library.library.ulr_cuda_usable(1)  # the emulation has one device
    assert code
    monkeypatch.setattr(cuda._native, "library", lambda part: library.library)
    assert cuda._why_unusable(1) == "its kernels cannot run on this device: invalid argument"
    cuda._why_unusable.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# The emulator itself: it must see mistakes.

PLANTED = (
    "missing_barrier",
    "divergent_barrier",
    "dynamic_overrun",
    "static_overrun",
    "missing_wait",
    "wrong_fragment",
    "missing_grid_barrier",
    "divergent_grid_barrier",
)
REVERSING = ("missing_barrier", "missing_grid_barrier")


@pytest.fixture(scope="module")
def planted() -> str:
    source = emulation.HERE / "planted.cu"
    return str(emulation.compile_library("planted", [source], emulation.SANITIZED))


def run_planted(library: str, kernel: str, mistaken: bool, seed: int) -> subprocess.CompletedProcess:
    script = str(emulation.HERE / "run_planted.py")
    command = [sys.executable, script, library, str(PLANTED.index(kernel)), str(int(mistaken)), str(seed)]
    return subprocess.run(command, env=emulation.sanitizer_environment(), capture_output=True, text=True)


@pytest.mark.parametrize("kernel", PLANTED)
def test_the_emulator_sees_a_planted_mistake(kernel, planted) -> None:
    expected = " ".join(str(i) for i in (range(64, 0, -1) if kernel in REVERSING else range(1, 65)))
    for seed in (1, 2):
        correct = run_planted(planted, kernel, False, seed)
        assert correct.returncode == 0 and correct.stdout.strip() == expected, correct.stderr
    mistaken = run_planted(planted, kernel, True, 1)
    if "overrun" in kernel:
        assert mistaken.returncode != 0
        assert "heap-buffer-overflow" in mistaken.stderr or "out of bounds" in mistaken.stderr
    else:
        assert mistaken.returncode == 0 and mistaken.stdout.strip() != expected
    assert "divergent" not in kernel or mistaken.stdout.strip() == "failed"


def test_kernels_under_sanitizers() -> None:
    """Samples of every op, in a process of its own that an out-of-bounds access or undefined behaviour ends."""
    library = emulation.kernels(emulation.SANITIZED)
    script = str(pathlib.Path(__file__).parent / "cuda_sanitized.py")
    command = [sys.executable, script, str(library)]
    done = subprocess.run(command, env=emulation.sanitizer_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout) >= 40  # samples run
