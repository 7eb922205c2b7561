"""The cost of a kernel, read from the cubin that Triton compiles for sm_90: no GPU needed.

Instructions of a loop are those between the target of a backward branch and the branch, predicated ones included, NOP
left out. The noise loop is the innermost loop with the most products of Philox; a call that orthogonal draws share is
not counted. One normal is one conversion of an integer to float (I2F), one pair of signs one LOP3 with the bits
0x3f803f80, which hold however a loop is unrolled.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

from ulr_kernels.backends.triton.launch import Launch

PHILOX = r"IMAD\.(WIDE|HI)\.U32.*(0x2daee0ad|0xd2511f53|0x326172a9|0xcd9e8d57)"  # its multipliers, of either sign
CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# Words of 128 bytes that a warp's access takes, without bank conflicts.
WIDTHS = {"128": 4, "M88.4": 4, "64": 2, "M88.2": 2}


def compile_launch(launch: Launch) -> Any:
    """Compile what `launch.run()` would, with the same specialisation of its arguments, for a H100."""
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        specialised = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = parameter.annotation_type or mangle_type(value)
        if isinstance(value, tuple):  # of integers, each specialised like one that stands alone
            constants |= {(position, i): 1 for i, item in enumerate(value) if item == 1}
            sixteens = [i for i, item in enumerate(value) if item % 16 == 0]
            attributes |= {(position, i): [["tt.divisibility", 16]] for i in sixteens}
        if isinstance(value, torch.Tensor) or (specialised and value % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": False},
    )


def dump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout


def instructions(sass: str) -> dict[int, str]:
    """Address and text of each instruction."""
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    return {int(address, 16): text.strip() for address, text in found}


def branches(code: dict[int, str]) -> list[tuple[int, int]]:
    """The address and the target of each branch."""
    found = ((address, re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)) for address, text in code.items())
    return [(address, int(branch[1], 16)) for address, branch in found if branch]


def loop_spans(code: dict[int, str]) -> list[tuple[int, int]]:
    """The first and the last address of all innermost loops."""
    spans = [(target, address) for address, target in branches(code) if target < address]
    return [s for s in spans if not any(s != o and s[0] <= o[0] and o[1] <= s[1] for o in spans)]


def body_of(code: dict[int, str], first: int, last: int) -> list[str]:
    return [text for address, text in code.items() if first <= address <= last and "NOP" not in text]


def loops(code: dict[int, str]) -> list[list[str]]:
    """The bodies of all innermost loops."""
    return [body_of(code, *span) for span in loop_spans(code)]


def without_calls(code: dict[int, str], first: int, last: int) -> list[str]:
    """The body of a loop, less a part with Philox that a branch leaves out in all turns but the first."""
    inside = [(a, target) for a, target in branches(code) if first <= a < target <= last]
    skipped = [s for s in inside if count(body_of(code, s[0] + 1, s[1] - 1), r"IMAD\.WIDE|IMAD\.HI") > 10]
    start, end = min(skipped, key=lambda s: s[1] - s[0], default=(last, last + 1))
    return body_of(code, first, start) + body_of(code, end, last)


def count(body: list[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, text)) for text in body)


def wavefronts(body: list[str]) -> int:
    """Of shared memory; a shuffle takes one too."""
    total = 0
    for text in body:
        if access := re.search(r"\b(?:LDS|STS|LDSM|STSM|SHFL)\b(\S*)", text):
            total += next((n for width, n in WIDTHS.items() if access[1].endswith(width)), 1)
    return total


def measure(launch: Launch) -> dict[str, float]:
    """Registers and stack of a thread, bytes of shared memory; of a noise loop, what one normal or one sign costs."""
    kernel = compile_launch(launch)
    usage = dump(kernel.asm["cubin"], "-res-usage")
    code = instructions(dump(kernel.asm["cubin"], "-sass"))
    result: dict[str, float] = {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "spills": count(list(code.values()), r"\b(LDL|STL)\b"),
        "shared": kernel.metadata.shared,
    }
    span = max(loop_spans(code), key=lambda s: count(body_of(code, *s), PHILOX), default=(0, -1))
    body = without_calls(code, *span)
    normals, signs = count(body, r"\bI2FP?\b"), 2 * count(body, "0x3f803f80")
    if normals or signs:
        result["instructions"] = round(len(body) / (normals or signs), 2)
        result["wavefronts"] = round(wavefronts(body) * 32 / ((normals or signs) * 32), 2)
    return result
