"""The ops with weight noise of the cpp back end: instruction sets, threads, memory. Values: test_perturbed.py."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from test_cpp_backend import ISAS, MEGABYTE, restore, values  # noqa: F401
from test_perturbed import PERTURBED, shown_weight
from torch import Tensor

import ulr_kernels as ulr
from ulr_kernels.backends import cpp
from ulr_kernels.backends.cpp import perturbed

pytestmark = pytest.mark.pair("cpp/cpu")


def everything(dtype: torch.dtype, dist: str) -> list[Tensor]:
    """W' as each op shows it, of full and of low rank, and the ops on lists. A product with ones and zeros is exact, as
    is one of a single input with what low rank adds to it."""
    weight = values(90, 70).to(dtype)
    pair = {"copies": 2, "antithetic": True, "dist": dist, "row_offset": 3}
    results = [
        shown_weight(op, weight, rows, col_offset=col_offset, rank=rank, **pair)
        for op, ways, ranks in zip(PERTURBED, ((1, 70), (70,), (70,)), ((None,), (None, 3), (None, 3)), strict=True)
        for rows in ways
        for rank in ranks
        for col_offset in (0, 5)
    ]
    x = values(33, 1, key=2).to(dtype)
    results.append(ulr.ops.perturbed_linear(x, weight[:, :1], None, 0.3, 6, rank=2, **pair))
    parameters = [weight.clone(), values(2100, key=4).to(dtype)]
    ulr.ops.perturb_(parameters, [7, 8], 0.1, dist=dist, stochastic=dtype == torch.bfloat16)
    ulr.ops.combine_(parameters, [7, 8], values(5, key=5), dist=dist, rank=2)
    return [*results, *parameters]


@pytest.mark.parametrize("dist", ["normal", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_instruction_sets_and_threads_give_the_same_bits(dtype: torch.dtype, dist: str) -> None:
    torch.set_num_threads(1)
    cpp.set_isa("portable")
    expected = everything(dtype, dist)
    for isa in ISAS:
        cpp.set_isa(isa)
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for i, (result, want) in enumerate(zip(everything(dtype, dist), expected, strict=True)):
                assert torch.equal(result, want), (isa, threads, i)


# ---------------------------------------------------------------------------------------------------------------------
# Memory: a weight of 64 MiB. So large a block is never kept by the allocator, so that a second call takes it anew.

WEIGHT_BYTES = 64 * MEGABYTE
MOST = 16 * MEGABYTE  # four panels
CLEAR = pathlib.Path("/proc/self/clear_refs")


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that the process held during a second call beyond what it held before, native scratch included."""

    def status(field: str) -> int:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    call()
    before = status("VmRSS")
    CLEAR.write_text("5")  # sets the recorded peak to what is held now
    call()
    return status("VmHWM") - before


WAYS: dict[str, Callable[[Tensor], object]] = {
    "few rows": lambda w: ulr.ops.perturbed_linear(w[:1], w, None, 0.1, 3),
    "few rows of copies": lambda w: ulr.ops.perturbed_linear(w[:4], w, None, 0.1, 3, copies=4, antithetic=True),
    "many rows": lambda w: ulr.ops.perturbed_linear(w[:40], w, None, 0.1, 3),
    "a pair": lambda w: ulr.ops.perturbed_linear(w[:40], w, None, 0.1, 3, copies=2, antithetic=True),
    "low rank": lambda w: ulr.ops.perturbed_linear(w[:40], w, None, 0.1, 3, copies=2, rank=2),
    "convolution": lambda w: ulr.ops.perturbed_conv2d(image(w), w.view(1024, 1024, 4, 4), None, 0.1, 3),
    "channels last": lambda w: ulr.ops.perturbed_conv2d(
        image(w), w.view(1024, 4, 4, 1024).movedim(-1, 1), None, 0.1, 3, copies=2, antithetic=True
    ),
    "embedding": lambda w: ulr.ops.perturbed_embedding(torch.arange(40), w, 0.1, 3, copies=2),
    "perturb_": lambda w: ulr.ops.perturb_([w], [3], 1e-3),
    "combine_": lambda w: ulr.ops.combine_([w], [3], torch.ones(4)),
}


def image(weight: Tensor) -> Tensor:
    return weight.view(-1)[: 1024 * 25].view(1, 1024, 5, 5)


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    """Of each way, and of a plain copy of the weight; in a process of its own, whose allocator nobody has adjusted."""
    if not CLEAR.exists():
        pytest.skip("the system does not keep a process's peak of memory as Linux does")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("way", WAYS)
def test_no_memory_of_the_size_of_the_weight(way: str, peaks: dict[str, int]) -> None:
    assert peaks["copy"] + MEGABYTE >= WEIGHT_BYTES >= 4 * MOST  # the measure sees a copy
    assert peaks[way] <= MOST


def test_panels_of_a_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels of a part of a group, of one group, and of several; the last panel has fewer."""
    x, weight, bias = values(2, 6, 5, 4), values(12, 2, 3, 3), values(12)
    how = {"groups": 3, "copies": 2, "antithetic": True, "mask": weight > 0}
    expected = ulr.ops.perturbed_conv2d(x, weight, bias, 0.1, 3, **how)
    for filters in (1, 3, 4, 8):
        monkeypatch.setattr(perturbed, "PANEL", filters * 18)
        found = ulr.ops.perturbed_conv2d(x, weight, bias, 0.1, 3, **how)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("antithetic", [False, True])
def test_copies_in_batches(dtype: torch.dtype, antithetic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the last is smaller: as each copy's product by itself."""
    weight, bias = values(13, 20).to(dtype), values(10, 13, key=3).to(dtype)
    how = {"copies": 10, "antithetic": antithetic, "draw": 2, "mask": weight > -1}
    monkeypatch.setattr(perturbed, "PANEL", 4 * weight.numel())
    for x in (values(40, 20, key=2).to(dtype), values(10, 40, 20, key=2).to(dtype)):
        for own_bias in (None, bias[0], bias):
            found = ulr.ops.perturbed_linear(x, weight, own_bias, 0.1, 3, **how)
            with ulr.use_backend("torch"):
                expected = ulr.ops.perturbed_linear(x, weight, own_bias, 0.1, 3, **how)
            close = 1e-5 if dtype == torch.float32 else 4e-2
            torch.testing.assert_close(found, expected, rtol=close, atol=close)


if __name__ == "__main__":
    large = values(4096, WEIGHT_BYTES // 4096 // 4)
    found = {name: peak_bytes(functools.partial(run, large)) for name, run in WAYS.items()}
    print(json.dumps(found | {"copy": peak_bytes(large.clone)}))
