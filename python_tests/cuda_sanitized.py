"""Runs samples of every op on the emulated CUDA library under its sanitizers: LIBRARY. Prints how many.

Not collected: `test_cuda_emulation.py` runs it in a process of its own.
"""

import itertools
import pathlib
import sys

import test_conv
import test_ops
import torch
from cuda_emulation import emulation
from test_cuda_emulation import large

from ulr_kernels import use_backend
from ulr_kernels.backends import cuda
from ulr_kernels.ops._op import OPS

# Those that make a kernel take other ways; the rest differ in values alone.
LINEAR = (
    "per-feature",
    "separate",
    "signs",
    "wide",
    "sobol-positions",
    "strided",
    "log-sigma",
    "same-dtype",
    "no-inputs",
    "hadamard",
    "hadamard-separate",
)

CONV = (
    "per-channel",
    "separate",
    "transposed-groups",
    "channels-last",
    "wide",
    "strided",
    "log-sigma",
    "signs",
    "hadamard",
)

library = emulation.Library(pathlib.Path(sys.argv[1]))
cuda.provider = lambda op, device: library.provider(op)  # type: ignore[assignment]
dtypes = itertools.cycle(test_ops.FLOATS)  # in turn: the kernels of each are the same lines
count = 0
with use_backend("cuda"):
    for op in cuda.ARGUMENTS:
        kind = OPS[op]
        for sample_id in test_ops.samples(op, good=True):
            if op in test_ops.LINEAR and sample_id in LINEAR:
                test_ops.compare_linear(op, test_ops.pick(op, sample_id, "cpu", next(dtypes)))
                count += 1
            if op in test_conv.CONV and sample_id in CONV:
                test_conv.compare_conv(op, test_ops.pick(op, sample_id, "cpu", next(dtypes)))
                count += 1
            if op not in test_ops.LINEAR + test_conv.CONV:
                sample = test_ops.pick(op, sample_id, "cpu", torch.float32)
                kind.function(*sample.args, **sample.kwargs)
                count += 1
    for sample in large("noisy_linear_grad_", torch.bfloat16):
        if sample.id in ("panels", "pairs-of-signs", "signs-bias-alone"):
            test_ops.compare_linear("noisy_linear_grad_", sample)
            count += 1
print(count)
