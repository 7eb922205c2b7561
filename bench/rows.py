"""The rows of the benchmark: what is timed, on which inputs, beside which rivals, and the floor of the work.

A row is made for a device and a size, so that the CPU's rows (`cpu_rows`) and the GPU's (`gpu_rows`) share every line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

import ulr_kernels as ulr
from bench import rivals
from ulr_kernels import backends
from ulr_kernels.ops._op import OPS, Cost

SIGMA = 0.1
ROTATE_BYTES = 64 * 2**20  # twice the largest last-level cache of the machines at hand
MLP = (784, 256, 128, 10)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to do a row's work.

    Attributes:
        run: takes a set of inputs, and what `keep` returned if there is one.
        keep: makes what this way has kept since the forward pass. Not timed; its memory counts.
        threads: overrides the row's.
        backend: the library's back end; None for the one that it chooses.
    """

    run: Callable[..., Any]
    keep: Callable[..., Any] | None = None
    threads: int | None = None
    backend: str | None = None

    @contextlib.contextmanager
    def settings(self, row: Row) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or row.threads or before)
        try:
            with ulr.use_backend(self.backend) if self.backend else contextlib.nullcontext():
                yield
        finally:
            torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table. `inputs(i)` makes the i-th set of inputs; the library's contestants come first.

    `in_cache`: one set of inputs, used over and over: for what threads add, free of what memory allows.
    """

    name: str
    inputs: Callable[[int], tuple]
    contestants: dict[str, Contestant]
    cost: Cost
    dist: str = "normal"
    kind: str = "fp32"
    threads: int | None = None
    memory: bool = False
    in_cache: bool = False

    def floor(self) -> dict[str, Any]:
        """What the floor of the row is made of: counts, and the kinds of product and noise."""
        return dataclasses.asdict(self.cost) | {"kind": self.kind, "dist": self.dist}

    def sets(self) -> list[tuple]:
        """Sets of inputs to rotate through, enough of them that no cache keeps one until its turn comes again."""
        first = self.inputs(0)
        if self.in_cache:
            return [first]
        size = sum(t.numel() * t.element_size() for t in first if isinstance(t, Tensor))
        count = min(16, max(2, -(-ROTATE_BYTES // max(size, 1))))
        return [first, *(self.inputs(i) for i in range(1, count))]


def normal(seed: int, *shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return ulr.noise(shape, ulr.fold_in(0, seed), device=device).to(dtype)


def compiled(function: Callable) -> Callable:
    """torch.compile, one graph per shape; compiled by the first call."""
    return torch.compile(function, dynamic=False)


def ours(run: Callable, names: tuple[str | None, ...]) -> dict[str, Contestant]:
    """The library's contestants: the chosen back end, or each named one."""
    return {"ulr" if name is None else f"ulr {name}": Contestant(run, backend=name) for name in names}


def shaped(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without values, for the cost of a call."""
    return torch.empty(shape, dtype=dtype, device="meta")


def key_of(i: int, device: str) -> Tensor:
    return torch.tensor(ulr.fold_in(1, i), device=device)


# --- noise -----------------------------------------------------------------------------------------------------------


def fill(out: Tensor, key: Tensor, dist: str) -> None:
    """The op without the allocation of its result, which `tensor.normal_()` does not have either."""
    backends.lookup("noise", out.device.type)(out, key, list(out.shape), dist, "iid", 1, 0, 0, 0)


def laplace_(out: Tensor, source: torch.Generator) -> Tensor:
    """Unit-variance Laplace noise in eager torch, by the inverse of its distribution function."""
    uniform = out.uniform_(-1, 1, generator=source)
    return torch.log1p(-uniform.abs()).mul_(0.5**0.5).copysign_(uniform)


def noise_row(
    dist: str, size: int, device: str = "cpu", threads: int | None = None, in_cache: bool = False, names=(None,)
) -> Row:
    source = rivals.generator(device)
    eager = {
        "normal": {"tensor.normal_": lambda out, key: out.normal_(generator=source)},
        "laplace": {"eager inverse CDF": lambda out, key: laplace_(out, source)},
        "rademacher": {"tensor.bernoulli_": lambda out, key: out.bernoulli_(generator=source)},
    }[dist]
    contestants = ours(lambda out, key: fill(out, key, dist), names)
    if threads and threads > 1:
        contestants["ulr, one thread"] = Contestant(contestants["ulr"].run, threads=1)
    contestants |= {name: Contestant(run) for name, run in eager.items()}
    if dist == "normal" and threads == 1:
        philox = numpy.random.Generator(numpy.random.Philox(0))
        contestants["numpy Philox"] = Contestant(
            lambda out, key: philox.standard_normal(out=out.numpy(), dtype=numpy.float32)
        )
    return Row(
        name=f"{dist} fill 2^{size.bit_length() - 1}" + ", in cache" * in_cache + _threads(threads),
        inputs=lambda i: (torch.empty(size // 1024, 1024, device=device), key_of(i, device)),
        contestants=contestants,
        cost=OPS["noise"].cost(None, [size]),
        dist=dist,
        threads=threads,
        in_cache=in_cache,
    )


def _threads(threads: int | None) -> str:
    return "" if threads is None else f", {threads} thread{'s' * (threads > 1)}"


def randn_row(size: int, device: str = "cpu", threads: int | None = None, names=(None,)) -> Row:
    source = rivals.generator(device)
    return Row(
        name=f"ulr.noise 2^{size.bit_length() - 1}" + _threads(threads),
        inputs=lambda i: (key_of(i, device),),
        contestants={
            **ours(lambda key: ulr.noise((size // 1024, 1024), key), names),
            "torch.randn": Contestant(lambda key: torch.randn(size // 1024, 1024, generator=source, device=device)),
        },
        cost=OPS["noise"].cost(None, [size]),
        threads=threads,
    )


# --- noisy_linear ----------------------------------------------------------------------------------------------------


def linear_row(
    rows: int,
    inputs: int,
    features: int,
    copies: int,
    dtype: torch.dtype,
    device: str = "cpu",
    threads: int | None = None,
    names=(None,),
) -> Row:
    source = rivals.generator(device)

    def make(i: int) -> tuple:
        x, weight = normal(3 * i, rows, inputs, device=device), normal(3 * i + 1, features, inputs, device=device)
        bias = normal(3 * i + 2, features, device=device)
        return x.to(dtype), (weight / inputs**0.5).to(dtype), bias.to(dtype), key_of(i, device)

    contestants = ours(lambda x, w, b, key: ulr.ops.noisy_linear(x, w, b, SIGMA, key, copies=copies), names)
    contestants["noiseless F.linear"] = Contestant(lambda x, w, b, key: F.linear(x, w, b))
    if device == "cpu":
        contestants["noiseless oneDNN"] = Contestant(lambda x, w, b, key: rivals.onednn_linear(x, w, b))
    if copies > 1:
        contestants["eager, input repeated"] = Contestant(
            lambda x, w, b, key: rivals.repeat_input(x, w, b, SIGMA, copies, source)
        )
    name = "eager, product repeated" if copies > 1 else "eager"
    contestants[name] = Contestant(lambda x, w, b, key: rivals.repeat_product(x, w, b, SIGMA, copies, source))
    eager = compiled(rivals.compilable)
    contestants["torch.compile"] = Contestant(lambda x, w, b, key: eager(x, w, b, SIGMA, copies))
    x, weight = shaped(rows, inputs, dtype=dtype), shaped(features, inputs, dtype=dtype)
    return Row(
        name=f"noisy_linear {_kind(dtype)} {rows}x{inputs}x{features}"
        + (f", {copies} copies" if copies > 1 else "")
        + _threads(threads),
        inputs=make,
        contestants=contestants,
        cost=OPS["noisy_linear"].cost(x, weight, None, None, None, copies, False),
        kind=_kind(dtype),
        threads=threads,
        memory=copies > 1,
    )


def _kind(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


# --- gradient and replay ---------------------------------------------------------------------------------------------


def gradient_row(
    rows: int, inputs: int, features: int, copies: int, dtype: torch.dtype, device: str = "cpu", names=(None,)
) -> Row:
    """Antithetic copies that share x. The buffers are fp32; the rivals' results are not even added to them."""
    source = rivals.generator(device)

    def make(i: int) -> tuple:
        buffers = torch.zeros(features, inputs, device=device), torch.zeros(features, device=device)
        x, loss_weight = normal(2 * i, rows, inputs, device=device), normal(2 * i + 1, copies, rows, device=device)
        return *buffers, x.to(dtype), loss_weight / (copies * rows), key_of(i, device)

    def keep(repeat: bool, half: bool) -> Callable:
        def kept(gw: Tensor, gb: Tensor, x: Tensor, lw: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
            noise = rivals.randn_like(torch.empty(0, features, device=device, dtype=dtype), copies // 2 * rows, source)
            return x.repeat(copies, 1) if repeat else x, noise if half else torch.cat([noise, -noise])

        return kept

    def rival(function: Callable) -> Callable:
        return lambda gw, gb, x, lw, key, kept: function(*kept, lw.to(dtype), SIGMA)

    def run(gw: Tensor, gb: Tensor, x: Tensor, lw: Tensor, key: Tensor) -> None:
        ulr.ops.noisy_linear_grad_(gw, gb, x, lw, SIGMA, key, antithetic=True)

    buffers = shaped(features, inputs), shaped(features)
    x, loss_weight = shaped(rows, inputs, dtype=dtype), shaped(copies, rows)
    return Row(
        name=f"gradient {_kind(dtype)} {rows}x{inputs}x{features}, {copies} copies",
        inputs=make,
        contestants={
            **ours(run, names),
            "authors' way": Contestant(rival(rivals.authors_gradient), keep(repeat=True, half=False)),
            "eager, reduced first": Contestant(rival(rivals.reduced_gradient), keep(repeat=False, half=False)),
            "eager, half kept": Contestant(rival(rivals.paired_gradient), keep(repeat=False, half=True)),
            "torch.compile": Contestant(rival(compiled(rivals.reduced_gradient)), keep(repeat=False, half=False)),
        },
        cost=OPS["noisy_linear_grad_"].cost(*buffers, None, x, loss_weight, None, None, True),
        kind=_kind(dtype),
        memory=True,
    )


def replay_row(
    rows: int, inputs: int, features: int, copies: int, dtype: torch.dtype, device: str = "cpu", names=(None,)
) -> Row:
    """A second pass with known losses: the noised output and the gradient."""
    source = rivals.generator(device)
    gradient = gradient_row(rows, inputs, features, copies, dtype, device, names)

    def make(i: int) -> tuple:
        gw, gb, x, lw, key = gradient.inputs(i)
        weight, bias = normal(2 * i + 7, features, inputs, device=device), normal(2 * i + 8, features, device=device)
        return gw, gb, x, (weight / inputs**0.5).to(dtype), bias.to(dtype), lw, key

    def fused(gw, gb, x, w, b, lw, key):
        return ulr.ops.noisy_linear_replay_(gw, gb, x, w, b, lw, SIGMA, key, antithetic=True)

    def apart(gw, gb, x, w, b, lw, key):
        y = ulr.ops.noisy_linear(x, w, b, SIGMA, key, copies=copies, antithetic=True)
        ulr.ops.noisy_linear_grad_(gw, gb, x, lw, SIGMA, key, antithetic=True)
        return y

    def eager(gw, gb, x, w, b, lw, key):
        clean = F.linear(x, w, b)
        half = rivals.randn_like(clean, copies // 2 * rows, source)
        y = clean + SIGMA * torch.cat([half, -half]).view(copies, rows, -1)
        return y, rivals.paired_gradient(x, half, lw.to(dtype), SIGMA)

    buffers = shaped(features, inputs), shaped(features)
    x, loss_weight = shaped(rows, inputs, dtype=dtype), shaped(copies, rows)
    weight = shaped(features, inputs, dtype=dtype)
    return Row(
        name=f"replay {_kind(dtype)} {rows}x{inputs}x{features}, {copies} copies",
        inputs=make,
        contestants={
            **ours(fused, names),
            "two ops": Contestant(apart, backend=names[0]),
            "eager, half kept": Contestant(eager),
        },
        cost=OPS["noisy_linear_replay_"].cost(*buffers, None, x, weight, None, loss_weight, None, None, True),
        kind=_kind(dtype),
    )


# --- a whole step ----------------------------------------------------------------------------------------------------


def layerwise_cost(sizes: tuple[int, ...], batch: int, copies: int) -> Cost:
    """For each layer: its clean product, its noise, the layers after it on all copies, its gradient."""
    layers = list(zip(sizes, sizes[1:], strict=False))
    size = flops = noise = 0
    for number, (inputs, features) in enumerate(layers):
        out = batch * features
        size += 4 * (batch * inputs + 3 * inputs * features + 2 * copies * out)
        flops += 2 * 2 * out * inputs  # the clean product, and the gradient's
        noise += 2 * copies // 2 * out  # made for the forward pass, and again for the gradient
        for k, n in layers[number + 1 :]:
            size += 4 * (k * n + 2 * copies * batch * n)
            flops += 2 * copies * batch * k * n
    return Cost(size, flops, noise)


def step_row(batch: int, copies: int, device: str = "cpu", names=(None,)) -> Row:
    """Gradients of all layers of the MLP by layer-wise noise, antithetic, relative to the clean loss."""
    source = rivals.generator(device)
    loss_fn = functools.partial(F.cross_entropy, reduction="none")
    model, theirs = rivals.mlp(MLP).to(device), rivals.mlp(MLP, rivals.NoisyLinear).to(device)

    @functools.cache
    def estimator() -> ulr.ULR:
        settings = {"injection": "layerwise", "noise": "logits", "baseline": "clean"}
        return ulr.ULR(model, sigma=SIGMA, copies=copies, antithetic=True, seed=0, **settings)

    def make(i: int) -> tuple:
        y = torch.arange(batch, device=device) * 7 % MLP[-1]
        return normal(i, batch, MLP[0], device=device), y

    return Row(
        name=f"ULR step, MLP, batch {batch}, {copies} copies",
        inputs=make,
        contestants={
            **ours(lambda x, y: estimator().backward(x, y, loss_fn), names),
            "authors' way": Contestant(lambda x, y: rivals.authors_step(theirs, x, y, loss_fn, SIGMA, copies, source)),
            "backpropagation": Contestant(lambda x, y: rivals.backprop_step(model, x, y, loss_fn)),
        },
        cost=layerwise_cost(MLP, batch, copies),
        memory=True,
    )


# --- the lists -------------------------------------------------------------------------------------------------------


def cpu_rows() -> dict[str, Callable[[], Row]]:
    """Makers of the CPU's rows by name: a row is made when its turn comes, and dropped afterwards."""
    f32, bf16 = torch.float32, torch.bfloat16
    makers: dict[str, Callable[[], Row]] = {
        "normal": lambda: noise_row("normal", 2**20, threads=1),
        "laplace": lambda: noise_row("laplace", 2**20, threads=1),
        "rademacher": lambda: noise_row("rademacher", 2**20, threads=1),
        "randn": lambda: randn_row(2**20, threads=1),
        "linear-fp32": lambda: linear_row(1024, 1024, 1024, 1, f32),
        "linear-bf16": lambda: linear_row(1024, 1024, 1024, 1, bf16),
        "linear-fp32-1-thread": lambda: linear_row(1024, 1024, 1024, 1, f32, threads=1),
        "linear-bf16-1-thread": lambda: linear_row(1024, 1024, 1024, 1, bf16, threads=1),
        "linear-copies": lambda: linear_row(128, 784, 512, 64, f32),
        "gradient": lambda: gradient_row(128, 784, 512, 64, f32),
        "replay": lambda: replay_row(128, 784, 512, 64, f32),
        "step": lambda: step_row(100, 64),
    }
    if len(os.sched_getaffinity(0)) > 1:
        makers["normal-2-threads"] = lambda: noise_row("normal", 2**20, threads=2, in_cache=True)
    return makers


def gpu_rows(names: tuple[str, ...], small: bool = False, device: str = "cuda") -> dict[str, Callable[[], Row]]:
    """Makers of the GPU's rows, for the back ends named; `small` sizes check the script where there is no GPU."""
    f32, bf16 = torch.float32, torch.bfloat16
    size, wide, rows, copies = (2**14, 64, 32, 4) if small else (2**27, 4096, 1024, 64)
    makers: dict[str, Callable[[], Row]] = {
        dist: functools.partial(noise_row, dist, size, device, names=names)
        for dist in ("normal", "laplace", "rademacher")
    }
    makers["randn"] = lambda: randn_row(size, device, names=names)
    for dtype in (bf16, f32):
        kind = _kind(dtype)
        for inputs in (64, wide // 4, wide):
            makers[f"linear-{kind}-{inputs}"] = functools.partial(
                linear_row, 2 * wide, inputs, wide, 1, dtype, device, names
            )
        for prefix, function in (("linear-copies", linear_row), ("gradient", gradient_row), ("replay", replay_row)):
            makers[f"{prefix}-{kind}"] = functools.partial(
                function, rows, wide // 4, wide // 2, copies, dtype, device, names
            )
    makers["step"] = lambda: step_row(100, copies, device, names=names)
    return makers
