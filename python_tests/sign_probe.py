"""A kernel that makes packed signs, draw after draw, and no use of them but their XOR: to count what one costs."""

import torch
import triton
import triton.language as tl

from ulr_kernels.backends.triton.launch import Launch, table
from ulr_kernels.backends.triton.noise_contract import open_source, sign_halves, sign_pairs, sign_words


@triton.jit
def sign_probe_kernel(out, key, table, draws, BR: tl.constexpr, BC: tl.constexpr):
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    source = open_source(key, table)
    total = tl.zeros([BR, BC // 16], tl.uint32)
    for draw in range(draws):
        halves = sign_halves(
            sign_words(rows.to(tl.uint32), tl.full((), 0, tl.uint32), draw.to(tl.uint32), source, BR, BC)
        )
        for j in tl.static_range(8):
            total ^= sign_pairs(halves, j, source)
    tl.store(out + rows[:, None] * (BC // 16) + tl.arange(0, BC // 16)[None, :], total)


def sign_probe_launch() -> Launch:
    key = torch.tensor(1)
    out = torch.empty(128, 8, dtype=torch.int32)
    arguments = {"out": out, "key": key, "table": table("rademacher", key.device), "draws": 64, "BR": 128, "BC": 128}
    return Launch(sign_probe_kernel, 1, arguments)
