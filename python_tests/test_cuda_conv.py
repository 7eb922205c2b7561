"""The CUDA convolutions, compiled for the host and run by the emulator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_conv
import test_ops
import torch
from samples import Sample, values
from test_cuda_emulation import device, library  # noqa: F401
from test_ops import poison  # noqa: F401

from ulr_kernels.ops._op import FLOATS

pytestmark = pytest.mark.pair("cuda/emulated")


# Every sample in fp32; in the half types, whose products alone differ, samples that take other ways in the kernel.
HALF = ("separate", "channels-last", "transposed", "signs", "wide", "same-dtype")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", test_conv.CONV)
def test_conv_ops(op, dtype, device) -> None:  # noqa: F811
    for sample_id in test_ops.samples(op, good=True):
        if dtype == torch.float32 or sample_id in HALF:
            test_conv.test_conv(op, sample_id, dtype, device)


def large(op: str, dtype: torch.dtype) -> Iterator[Sample]:
    """Calls of several tiles along every axis, which the ops' own samples are too small for."""

    def v(seed: int, *shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return values(seed, *shape, device="cpu", dtype=dtype)

    last, pairs = torch.channels_last, {"antithetic": True}
    x, w, b = v(1, 3, 16, 8, 9), v(2, 90, 16, 3, 3), v(3, 90)
    if op == "noisy_conv2d":
        whole = (x.to(memory_format=last), v(4, 64, 16, 3, 3).to(memory_format=last), b[:64], 0.3, 11)
        yield Sample("tiles", (x, w, b, 0.3, 11), {"copies": 2, "padding": 1, "col_offset": 37})
        yield Sample("whole-chunks", whole, {"copies": 4, "padding": 1, **pairs})
        yield Sample("pairs", (v(5, 2, 3, 16, 8, 9), w, b, 0.3, 11), {"copies": 2, "stride": 2, **pairs})
        deep = (v(6, 3, 128, 8, 8).to(memory_format=last), v(7, 128, 1, 3, 3), v(8, 128), 0.3, 11)
        yield Sample("depthwise", deep, {"groups": 128, "padding": 1, "col_offset": 8})
        return

    def call(x: torch.Tensor, copies: int, buffers: torch.dtype, *weight: int, loss: float = 1.0) -> tuple:
        layer = () if op == "noisy_conv2d_grad_" else (v(21, *weight), v(22, weight[0]))
        weight_and_bias = v(2, *weight, dtype=buffers), v(3, weight[0], dtype=buffers)
        loss_weight = loss * v(4, copies, 3, dtype=torch.float32)
        return (*weight_and_bias, x, *layer, loss_weight, 0.3, 11)

    total, each = (values(7, *shape, device="cpu", dtype=torch.float32) for shape in ((), (40,)))
    wide = v(5, 3, 60, 8, 9)
    panels = call(wide, 4, torch.float32, 40, 60, 3, 3)
    yield Sample("panels", panels, {"grad_log_sigma": total, "padding": 1, "col_offset": 5, **pairs})
    rounded = call(wide.to(memory_format=last), 2, dtype, 40, 60, 3, 3, loss=1e-9)
    yield Sample("rounded-once", rounded, {"grad_log_sigma": each, "padding": 1})
    separate = call(v(6, 2, 3, 16, 9, 9), 2, torch.float32, 40, 16, 3, 3)
    yield Sample("separate", separate, {"stride": 2, **pairs})
    deep = call(v(8, 3, 64, 7, 7).to(memory_format=last), 2, torch.float32, 64, 1, 3, 3)
    yield Sample("depthwise", deep, {"groups": 64, "padding": 1, "col_offset": 8})


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", test_conv.CONV)
def test_several_tiles(op, dtype, device) -> None:  # noqa: F811
    for sample in large(op, dtype):
        test_conv.compare_conv(op, sample)
