"""The CPU library on 64-bit ARM: compiled for it, run by an emulator, and held bit for bit to portable C++ here."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

import pytest
import test_cpp_backend
import test_cpp_conv
import test_cpp_perturbed
import test_mlp_step
import test_noise_add
import test_perturbed
import torch
from arm_emulation import emulation
from samples import Sample, samples_of
from test_contract import (  # noqa: F401 -- collected here, with this module's device
    test_fold_in_on_host_and_device,
    test_frozen_vectors,
    test_orthogonal_signs_by_integers,
    test_philox_known_answers,
    test_quantile_noise_by_exact_arithmetic,
    test_signs_by_integers,
    test_sobol_is_torchs_sequence_shifted,
)
from test_ops import clone, poison  # noqa: F401 -- poison applies itself

import ulr_kernels as ulr
from ulr_kernels.backends import _native, cpp
from ulr_kernels.ops._losses import ACTIVATIONS
from ulr_kernels.ops._op import FLOATS, OPS

pytestmark = pytest.mark.pair("cpp/arm")
SOURCES = pathlib.Path(__file__).parents[1] / "csrc/cpu"
INTEGERS = {"philox4x32", "fold_in"}
# Launchers that do not take every dtype.
NOT_IN = {torch.float32: set(), torch.bfloat16: {"noise"}, torch.float16: {"noise", "noisy_mlp"}}


@pytest.fixture(scope="module")
def library() -> Iterator[emulation.Library]:
    library = emulation.Library(emulation.compile_program())
    yield library
    library.close()


@pytest.fixture
def device(library: emulation.Library, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Iterator[str]:
    """Every launch of the back end is run in the emulator too, with the comparison that emulation.py describes."""
    monkeypatch.setattr(_native, "launcher", library.launcher)
    cpp.set_isa("portable")
    with ulr.use_backend("cpp"):
        yield "cpu"
    cpp.set_isa(None)


def all_launchers() -> set[str]:
    """Of the sources: those of each instruction set, and the primitives below them."""
    per_set = re.findall(r"X\(set, (\w+)\)", (SOURCES / "dispatch.h").read_text())
    return {*per_set, *re.findall(r"ULR_EXPORT int ulr_cpu_(\w+)\(", (SOURCES / "philox.cpp").read_text())}


def run(op: str, sample: Sample) -> None:
    OPS[op].function(*map(clone, sample.args), **{k: clone(v) for k, v in sample.kwargs.items()})


def test_its_instruction_sets(library) -> None:
    assert library.isas == ["neon", "portable"]


def test_mistakes_are_seen(device, library, monkeypatch) -> None:
    """Planted ones: results that differ from those of this machine, and a write past the end of a tensor."""
    with monkeypatch.context() as planted:
        planted.setattr(library, "launcher_here", lambda part, name: lambda *args, **how: None)
        with pytest.raises(AssertionError, match=r"noise: tensors \[0\] differ from those of portable C\+\+"):
            ulr.noise((3, 5), 1)
    span = emulation.span
    with monkeypatch.context() as planted:
        planted.setattr(emulation, "span", lambda view: (span(view)[0], span(view)[1] - 4))
        with pytest.raises(AssertionError, match="noise has written beside its tensors"):
            ulr.noise((3, 5), 1)
    ulr.noise((3, 5), 1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_launcher(dtype, device, library) -> None:
    """Over the samples of every op."""
    library.launched.clear()
    for op in OPS:
        for sample in samples_of(op, device, dtype):
            if sample.error is None:
                run(op, sample)
    assert set(library.launched) >= INTEGERS
    with_dtype = {name for name, dtypes in library.launched.items() if dtype in dtypes}
    assert with_dtype == all_launchers() - INTEGERS - NOT_IN[dtype]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_several_tiles_and_threads(dtype, device) -> None:
    torch.set_num_threads(3)
    for dist in ("laplace", "rademacher"):
        test_cpp_backend.everything(dtype, dist, 33, 150)
        test_cpp_backend.everything(dtype, dist, 3, 1100)
        test_noise_add.everything(dtype, dist, (3, 21, 9, 11), 1)
        test_cpp_conv.everything(dtype, dist, False, 5, 40)
        test_cpp_perturbed.everything(dtype, dist)
    for op in test_perturbed.PERTURBED:
        for sample in test_perturbed.large(op, dtype):
            run(op, sample)
    for sample in test_mlp_step.large(dtype) if dtype in test_mlp_step.DTYPES else ():
        run("noisy_mlp_step", sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_value_and_ties_between_them(dtype, device) -> None:
    """Half a unit in the last place is added to each number, or taken away: infinities, zeros, subnormals too."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    x = torch.cat([x[~x.isnan()], torch.tensor([torch.nan])])
    limits = torch.finfo(dtype)
    smallest = torch.tensor(limits.smallest_normal)
    unit = limits.eps * 2.0 ** torch.frexp(torch.maximum(x.abs(), smallest))[1].sub(1)
    half = torch.where(x.isfinite(), unit / 2, 1.0).clamp(min=torch.finfo(torch.float32).smallest_normal)
    for draw in range(2):
        y = ulr.ops.noise_add(x.to(dtype)[None], half, 7, dist="rademacher", draw=draw)[0, 0]
        eps = ulr.noise(len(x), 7, dist="rademacher", draw=draw)
        torch.testing.assert_close(y, (x + half * eps).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_at_their_limits(activation, device) -> None:
    """After the first layer, and of zero after the second, whose weight is zero."""
    x = torch.tensor([0.0, 1e-30, 20.0, -20.0, 1e4, -1e4])[:, None]
    one, keys = torch.ones(1, 1), torch.tensor([1, 2, 3])
    call = ([one] * 3, [], x, torch.zeros_like(x), [one, torch.zeros(1, 1), one], [], 1e-30, keys)
    run("noisy_mlp_step", Sample("limits", call, {"copies": 2, "activation": activation, "loss": "squared"}))
