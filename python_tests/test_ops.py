"""Every op against its definition in fp64, over its samples, on every back end that can run here."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import truth
from samples import Sample, samples_of

from ulr_kernels import fold_in, use_backend
from ulr_kernels.ops import noise, noisy_linear
from ulr_kernels.ops._op import FLOATS, OPS

LINEAR = ("noisy_linear", "noisy_linear_grad_", "noisy_linear_recompute_")


def samples(op: str, good: bool) -> list[str]:
    return [s.id for s in samples_of(op, "cpu", torch.float32) if (s.error is None) == good]


def pick(op: str, sample_id: str, device: str, dtype: torch.dtype) -> Sample:
    return next(s for s in samples_of(op, device, dtype) if s.id == sample_id)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh outputs hold NaN, so that an element that nobody writes is seen."""

    def poisoned(make: Callable) -> Callable:
        def made(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(-1)

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def clone(value):
    """A copy with the same strides, gaps between elements included; of a list, of each."""
    if isinstance(value, list):
        return [clone(v) for v in value]
    if not isinstance(value, torch.Tensor) or 0 in value.stride():
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("op,sample_id", [(op, i) for op in LINEAR for i in samples(op, good=True)])
def test_linear(op, sample_id, dtype, device) -> None:
    compare_linear(op, pick(op, sample_id, device, dtype))


def compare_linear(op: str, sample: Sample) -> list[torch.Tensor]:
    return compare(op, sample, truth, buffers=0 if op == "noisy_linear" else 2)


def compare(op: str, sample: Sample, definitions: ModuleType, buffers: int) -> list[torch.Tensor]:
    """Run a sample on the back end in use; its outputs, found to be within rounding of the definition.

    `buffers`: how many of the first arguments the op adds to; x comes after them.
    """
    x = sample.args[buffers]
    expected = getattr(definitions, op)(*sample.args, **sample.kwargs)
    args = [clone(a) if i < buffers else a for i, a in enumerate(sample.args)]
    kwargs = {k: clone(v) if k == "grad_log_sigma" else v for k, v in sample.kwargs.items()}
    result = OPS[op].function(*args, **kwargs)
    outputs = [] if result is None else [result]
    outputs += [b for b in (*args[:buffers], kwargs.get("grad_log_sigma")) if b is not None]
    assert len(outputs) == len(expected)
    for output, (value, magnitude) in zip(outputs, expected, strict=True):
        terms = max(x.shape[-1], x.numel() if x.dim() > 3 else x.shape[:-1].numel() * 8)
        allowed = truth.tolerance(value, magnitude, output.dtype, x.dtype, terms)
        error = (output.detach().cpu().double() - value).abs()
        assert not (error.isnan() | (error > allowed)).any(), f"worst {(error / allowed).max():.3g} of the tolerance"
    return outputs


@pytest.mark.parametrize("sample_id", samples("noise", good=True))
def test_noise_is_bitwise_the_contract(sample_id, device) -> None:
    sample = pick("noise", sample_id, device, torch.float32)
    result = OPS["noise"].function(*sample.args, **sample.kwargs)
    expected = truth.noise(*sample.args, **sample.kwargs)
    assert torch.equal(result.cpu().view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("op", ["philox4x32", "fold_in"])
def test_integer_ops_are_bitwise_the_reference(op, device) -> None:
    for sample_id in samples(op, good=True):
        result = OPS[op].function(*pick(op, sample_id, device, torch.float32).args)
        with use_backend("torch"):
            expected = OPS[op].function(*pick(op, sample_id, "cpu", torch.float32).args)
        assert torch.equal(result.cpu(), expected)


@pytest.mark.parametrize("op,sample_id", [(op, i) for op in OPS for i in samples(op, good=False)])
def test_bad_input_is_refused_before_anything_is_written(op, sample_id, device) -> None:
    sample = next((s for s in samples_of(op, device, torch.float32) if s.id == sample_id), None)
    if sample is None:
        pytest.skip("what tensors on a GPU hold is not read")
    before = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, (sample.args, sample.kwargs))
    with pytest.raises((ValueError, TypeError), match=sample.error) as raised:
        OPS[op].function(*sample.args, **sample.kwargs)
    assert re.match(rf"ulr::{op}: ", str(raised.value))
    after = sample.args, sample.kwargs
    for a, b in zip(*(torch.utils._pytree.tree_leaves(t) for t in (after, before)), strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)


def test_inputs_on_two_devices_are_refused() -> None:
    x, w = torch.zeros(3, 4), torch.zeros(2, 4, device="meta")
    with pytest.raises(ValueError, match="ulr::noisy_linear: 'weight' must be on cpu like 'x', got meta"):
        OPS["noisy_linear"].function(x, w, None, 0.1, 1)


@pytest.mark.parametrize("dist", ["normal", "rademacher"])
def test_a_slice_makes_its_part_of_the_whole(dist, device) -> None:
    """Batch splits, feature shards and chunks of copies see the noise of the undivided call."""
    x, w = (torch.zeros(n, 1, device=device) for n in (10, 150))
    whole = noisy_linear(x, w, None, 1.0, 5, copies=6, dist=dist)
    rows = noisy_linear(x[3:7], w, None, 1.0, 5, copies=6, dist=dist, row_offset=3)
    cols = noisy_linear(x, w[130:], None, 1.0, 5, copies=6, dist=dist, col_offset=130)
    draws = noisy_linear(x, w, None, 1.0, 5, copies=2, dist=dist, draw=4)
    assert torch.equal(whole[:, 3:7], rows) and torch.equal(whole[:, :, 130:], cols) and torch.equal(whole[4:], draws)
    pairs = noisy_linear(x, w, None, 1.0, 5, copies=12, antithetic=True, dist=dist)
    assert torch.equal(pairs[:6], whole) and torch.equal(pairs[6:], -whole)


def test_forward_noise_is_the_noise_op(device) -> None:
    y = noisy_linear(torch.zeros(9, 3, device=device), torch.zeros(21, 3, device=device), None, 1.0, 77, copies=2)
    for copy in range(2):
        assert torch.equal(y[copy], noise((9, 21), 77, draw=copy, device=device))


def test_two_steps_differ(device) -> None:
    assert not torch.equal(noise((64,), fold_in(3, 0), device=device), noise((64,), fold_in(3, 1), device=device))
