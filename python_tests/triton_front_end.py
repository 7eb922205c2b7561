"""The Triton kernels through the front end of Triton's own launches, with every size, stride and offset that can be 1.

A launch makes a constant of each argument that is 1, which the interpreter does not and the budgets' launches seldom
do; what a kernel then asks of a constant fails on a GPU alone. No GPU is needed: kernels go to Triton's first IR.

Not collected by itself: `test_triton.py` runs it in a process of its own, whose Triton launches nothing from then on.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend

from ulr_kernels import ops, use_backend
from ulr_kernels.backends import triton as backend
from ulr_kernels.backends.triton.launch import Launch

made: list[str] = []


class Driver:
    """Of an H100 that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def first_ir(source: Any, target: GPUTarget, options: dict[str, Any], **_) -> object:
    compiler = make_backend(target)
    parsed = compiler.parse_options(dict(options))
    context = ir.context()
    ir.load_dialects(context)
    compiler.load_dialects(context)
    arguments = (parsed, compiler.get_codegen_implementation(parsed), compiler.get_module_map(), context)
    wants_target = "target" in inspect.signature(source.make_ir).parameters
    source.make_ir(*((target,) if wants_target else ()), *arguments)
    made.append(source.fn.__name__)
    return object()


def run(launch: Launch) -> None:
    launch.kernel.run(
        grid=(launch.grid,), warmup=True, num_warps=launch.warps, num_stages=launch.stages, **launch.arguments
    )


@pytest.fixture(scope="module", autouse=True)
def front_end() -> None:
    triton.runtime.driver.set_active(Driver())
    triton.compiler.compile = first_ir
    backend._absence = lambda device: None
    Launch.run = run


def one(axes: int) -> Tensor:
    return torch.ones([1] * axes)


def calls(copies: int, how: dict[str, Any], at: dict[str, int]) -> None:
    """Each op, with as many copies."""
    ranks = (None,) if how["sampler"] == "hadamard" else (None, 1)
    layer, image = (one(2), one(1), 0.5, 7), (one(4), one(1), 0.5, 7)
    loss = torch.ones(copies, 1)
    for x in (one(2), torch.ones(copies, 1, 1)):
        ops.noisy_linear(x, *layer, copies=copies, **how, **at)
        ops.noisy_linear_grad_(one(2), one(1), x, loss, 0.5, 7, **how, **at)
        ops.scale_shift_grad_(one(1), one(1), x, loss, 0.5, 7, shared=x.dim() == 2, **how, **at)
        offsets = {name: [number] for name, number in at.items() if name != "draw"}
        ops.foreach_noisy_linear_grad_(
            [one(2)], [one(1)], [x], [loss], [torch.tensor(0.5)], [torch.tensor(7)], **how, **offsets
        )
        for rank in ranks:
            ops.perturbed_linear(x, *layer, copies=copies, rank=rank, **how, **at)
    for x in (one(4), torch.ones(copies, 1, 1, 1, 1)):
        for transposed in (False, True):
            ops.noisy_conv2d(x, *image, copies=copies, transposed=transposed, **how, **at)
            ops.noisy_conv2d_grad_(one(4), one(1), x, loss, 0.5, 7, transposed=transposed, **how, **at)
        for rank in ranks:
            ops.perturbed_conv2d(x, *image, copies=copies, rank=rank, **how, **at)
    ops.noise_add(one(2), 0.5, 7, copies=copies, **how, **at)
    ops.noise_dot(one(2), 0.5, 7, copies=copies, **how, **at)
    ops.noise_score((1, 1), loss, 0.5, 7, **how, **at)
    for rank in ranks:
        first = torch.zeros(1, dtype=torch.int64)
        ops.perturbed_embedding(first, one(2), 0.5, 7, copies=copies, rank=rank, **how, **at)
        which = {"dist": how["dist"], "sampler": how["sampler"], "rank": rank}
        ops.perturb_([one(2), one(1)], torch.tensor([7, 8]), 0.5, **which)
        ops.combine_([one(2), one(1)], torch.tensor([7, 8]), one(1), **which)


@pytest.mark.parametrize(
    "dist,sampler,antithetic",
    [("normal", "iid", True), ("rademacher", "iid", False), ("rademacher", "hadamard", False)],
)
def test_sizes_of_one(dist, sampler, antithetic) -> None:
    how = {"dist": dist, "sampler": sampler, "antithetic": antithetic}
    with use_backend("triton"):
        ops.philox4x32(torch.ones(1, 4, dtype=torch.int64), torch.ones(2, dtype=torch.int64))
        at = dict.fromkeys(("draw", "row_offset", "col_offset"), 1) | {"width": 2}
        ops.noise((1, 1), 7, dist=dist, sampler=sampler, **at)
        calls(2 if antithetic else 1, how, at)


def test_every_kernel_was_there() -> None:
    """Of all modules of the back end: what a launch may be asked for."""
    modules = {importlib.import_module(f"{backend.__name__}.{name}") for name in backend._MODULES.values()}
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert set(made) == kernels
