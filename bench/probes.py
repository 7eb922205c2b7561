"""The parts of the noise, each measured on a GPU: the rate of Philox's wide products, and noise beside tensor cores."""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from ulr_kernels.backends.triton.launch import Launch, table
from ulr_kernels.backends.triton.noise_contract import NORMAL, noise_parts, open_source, raw_noise


@triton.jit
def wide_products_kernel(out, count, SIZE: tl.constexpr):
    value = (tl.program_id(0) * SIZE + tl.arange(0, SIZE)).to(tl.uint32)
    for _ in range(count):
        product = value.to(tl.uint64) * 0xD2511F53
        value = (product >> 32).to(tl.uint32) ^ product.to(tl.uint32)
    tl.store(out + tl.program_id(0) * SIZE + tl.arange(0, SIZE), value.to(tl.int32))


@triton.jit
def beside_kernel(out, x, key, table, count, PRODUCTS: tl.constexpr, NOISE: tl.constexpr, SIZE: tl.constexpr):
    """`count` times PRODUCTS products SIZE^3 of bf16, which take about as long as the noise, or noise, or both."""
    row = tl.arange(0, SIZE)
    source = open_source(key, table)
    tile = tl.load(x + row[:, None] * SIZE + row[None, :])
    total = tl.zeros([SIZE, SIZE], tl.float32)
    sums = tl.zeros([SIZE, SIZE // 4], tl.float32)
    for draw in range(count):
        for _ in tl.static_range(PRODUCTS):
            total = tl.dot(tile, tl.trans(tile), total)
        if NOISE:
            rows = (tl.program_id(0) * SIZE + row).to(tl.uint32)
            first = tl.cast(draw, tl.uint32) * 0
            raw = raw_noise(rows, first, tl.cast(draw, tl.uint32), source, None, 1, 1, NORMAL, SIZE, SIZE)
            parts = noise_parts(raw, source, NORMAL)
            sums += (parts[0] + parts[1]) + (parts[2] + parts[3])
    at = out + tl.program_id(0).to(tl.int64) * (SIZE * SIZE) + row[:, None] * SIZE + row[None, :]
    tl.store(at, total + tl.sum(sums, 1)[:, None])


def probes(device: str, small: bool, seconds_of: Callable[[Callable[[], None]], float]) -> dict[str, Any]:
    """Wide products a second (each with one logical operation); products and normals a second alone, and what share of
    the longer one's time both take together: 1 where they overlap wholly."""
    programs, count, size = (2, 2, 64) if small else (528, 1000, 64)
    out = torch.empty(programs * size * size, device=device)
    x = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    key = torch.tensor(1, device=device)

    def wide() -> None:
        arguments = {"out": out.view(torch.int32), "count": count, "SIZE": size * size // 4}
        Launch(wide_products_kernel, programs, arguments).run()

    def beside(products: int, noise: bool) -> Callable[[], None]:
        arguments = {"out": out, "x": x, "key": key, "table": table("normal", x.device), "count": count}
        which = {"PRODUCTS": products, "NOISE": noise, "SIZE": size}
        return Launch(beside_kernel, programs, {**arguments, **which}, warps=8).run

    product, noise, both = (seconds_of(beside(*which)) for which in ((4, False), (0, True), (4, True)))
    work = programs * count
    return {
        "wide products": work * size * size // 4 / seconds_of(wide),
        "flops in registers": 2 * work * 4 * size**3 / product,
        "normals in registers": work * size * size / noise,
        "product and noise together": both / max(product, noise),
    }
