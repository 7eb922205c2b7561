"""The CUDA sources, compiled for the host and run by the emulator: the tests of the ops, on every kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_ops
import torch
from cuda_emulation import emulation
from test_contract import (  # noqa: F401 -- collected here, with this module's device
    test_fold_in_on_host_and_device,
    test_frozen_vectors,
    test_philox_known_answers,
    test_quantile_noise_by_exact_arithmetic,
    test_signs_by_integers,
)
from test_ops import (  # noqa: F401
    poison,
    test_a_slice_makes_its_part_of_the_whole,
    test_forward_noise_is_the_noise_op,
    test_integer_ops_are_bitwise_the_reference,
    test_noise_is_bitwise_the_contract,
)

from ulr_kernels import backends, use_backend
from ulr_kernels.backends import cuda

pytestmark = pytest.mark.pair("cuda/emulated")


@pytest.fixture(scope="module")
def library() -> emulation.Library:
    return emulation.Library(emulation.kernels())


@pytest.fixture
def device(library: emulation.Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(cuda, "provider", lambda op, device: library.provider(op))
    library.seed(1)
    with use_backend("cuda"):
        yield "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", test_ops.LINEAR)
def test_linear(op, dtype, device) -> None:
    for sample_id in test_ops.samples(op, good=True):
        test_ops.test_linear(op, sample_id, dtype, device)
