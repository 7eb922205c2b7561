"""The CUDA sources through nvcc, without a GPU: warnings are errors, and what kernels cost is held to a budget.

`python python_tests/test_cuda_build.py` writes the budget (budgets.json, key "cuda") anew from what it measures.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import pathlib
import random
import re
import shutil
import subprocess

import pytest

from ulr_kernels import contract

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
BUDGETS = HERE / "budgets.json"
BUILD = ROOT / "build" / "cubins"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
SOURCES = sorted(ROOT.glob("csrc/cuda/*.cu"))
FLAGS = (ROOT / "csrc/cuda/nvcc_flags.txt").read_text().split()
# Of the noise itself, on Hopper: stores, addresses and the loop included.
MOST_INSTRUCTIONS_PER_NORMAL = 26.0
MOST_WAVEFRONTS_PER_32_NORMALS = 6.0
KINDS = ("quantile", "sobol", "signs")

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


def compile_cubin(source: pathlib.Path, architecture: str) -> tuple[pathlib.Path, str]:
    """The cubin and what ptxas says of it; made once for each state of the sources."""
    state = hashlib.sha256(repr(FLAGS).encode())
    for path in sorted([source, *ROOT.glob("csrc/cuda/*.cuh"), *ROOT.glob("csrc/include/ulr/*")]):
        state.update(path.read_bytes())
    BUILD.mkdir(parents=True, exist_ok=True)
    cubin = BUILD / f"{source.stem}.{architecture}.{state.hexdigest()[:16]}.cubin"
    log = cubin.with_suffix(".log")
    if not log.exists():
        command = ["nvcc", *FLAGS, "-Werror", "all-warnings", "-Xptxas", "-v", f"-arch={architecture}", "-cubin"]
        command += [f"-I{ROOT}/csrc/include", "-o", str(cubin), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{source.name} for {architecture}:\n{done.stderr}"
        log.write_text(done.stderr)
    return cubin, log.read_text()


def short_name(mangled: str) -> str:
    """`noisy_linear_kernel-bf16-signs` from a kernel's mangled name."""
    name = re.search(r"(noise|noisy_linear|gradient|philox4x32|fold_in)_kernel|add_partials", mangled)
    assert name, mangled
    parts = [name[1] or name[0]]
    arguments = mangled[name.end() :]
    for pattern, dtype in (("I6__half", "fp16"), ("I13__nv_bfloat16", "bf16"), ("If", "fp32")):
        if arguments.startswith(pattern):
            parts.append(dtype)
    if kind := re.search(r"4KindE(\d)E", arguments):
        parts.append(KINDS[int(kind[1])])
    if flag := re.search(r"Lb([01])E", arguments):
        parts.append(("each" if flag[1] == "0" else "whole") if "noise" in parts else ("", "replay")[int(flag[1])])
    return "-".join(filter(None, parts))


def measure(architecture: str) -> dict[str, dict[str, int]]:
    """Of every kernel: registers and stack of a thread, bytes spilled, bytes of static shared memory."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        logs = [log for _, log in pool.map(compile_cubin, SOURCES, [architecture] * len(SOURCES))]
    result = {}
    for log in logs:
        for kernel, stack, stores, loads, used in re.findall(
            r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
            r"(\d+) bytes spill loads\s+ptxas info\s*: Used (.*)",
            log,
        ):
            shared = re.search(r"(\d+) bytes smem", used)
            numbers = {"registers": int(used.split()[0]), "stack": int(stack), "spills": int(stores) + int(loads)}
            result[short_name(kernel)] = {**numbers, "shared": int(shared[1]) if shared else 0}
    return dict(sorted(result.items()))


def disassemble(source: str) -> dict[str, str]:
    """The machine code of a file's kernels on Hopper."""
    pytest.importorskip("triton")
    from cubin import dump

    cubin, _ = compile_cubin(ROOT / "csrc/cuda" / f"{source}.cu", "sm_90a")
    parts = re.split(r"Function : (\S+)", dump(cubin.read_bytes(), "-sass"))
    return {short_name(name): code for name, code in zip(parts[1::2], parts[2::2], strict=True)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_stay_within_their_budget(architecture) -> None:
    measured, budget = measure(architecture), json.loads(BUDGETS.read_text())["cuda"][architecture]
    assert list(measured) == list(budget)
    over = {
        (kernel, what): (value, budget[kernel][what])
        for kernel, values in measured.items()
        for what, value in values.items()
        if value > budget[kernel][what]
    }
    assert not over, f"measured, budget: {over}"
    assert all(values["stack"] == 0 and values["spills"] == 0 for values in budget.values())


def test_instructions_of_a_normal() -> None:
    from cubin import count, instructions, loops

    code = disassemble("noise")["noise-quantile-whole"]
    body = max(loops(instructions(code)), key=lambda loop: count(loop, r"IMAD\.WIDE"))
    normals = count(body, r"\bI2FP?\b")  # one conversion of an integer for each
    assert normals == 8 and count(body, r"STG\.\S*128") == 2  # the loop is the one that is meant
    assert count(body, r"LDS\.64") == 3 * normals and count(body, r"\bLDS") == 3 * normals
    assert len(body) / normals <= MOST_INSTRUCTIONS_PER_NORMAL


def test_table_reads_do_not_conflict() -> None:
    """Wavefronts of the three 8-byte reads of a normal, of octaves as random words have them. A read of 8 bytes by a
    warp takes a wavefront for each half; more where lanes want different rows of one bank."""
    words = random.Random(1)
    wavefronts, warps = 0, 20_000
    for _ in range(warps):
        octaves = [((words.getrandbits(31) | 1).bit_length() - 1) for _ in range(32)]
        for half in (octaves[:16], octaves[16:]):
            rows_of_bank: dict[int, set[int]] = {}
            for octave in half:
                rows_of_bank.setdefault(octave % 16, set()).add(octave)  # a row is 8 bytes, the banks 128
            wavefronts += 3 * max(map(len, rows_of_bank.values()))
    assert len(contract.tables.NORMAL) == 32  # the rows of each pair fill the banks twice
    assert wavefronts / warps < MOST_WAVEFRONTS_PER_32_NORMALS + 0.01


@pytest.mark.parametrize("source", ["noisy_linear", "noisy_linear_grad_", "noisy_linear_replay_"])
def test_products_run_on_tensor_cores_and_nothing_is_atomic(source) -> None:
    for kernel, code in disassemble(source).items():
        tensor_cores, is_half = "HMMA.16816.F32" in code, "fp16" in kernel or "bf16" in kernel
        assert tensor_cores == (is_half and "partials" not in kernel), kernel
        assert (".BF16" in code) == ("bf16" in kernel), kernel
        assert not re.search(r"\b(ATOM|ATOMG|ATOMS|RED)\b", code), kernel


if __name__ == "__main__":
    measured = {architecture: measure(architecture) for architecture in ARCHITECTURES}
    lines = ['{"cuda": {']
    for architecture, kernels in measured.items():
        rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(values)}" for name, values in kernels.items())
        lines.append(f'  "{architecture}": {{\n{rows}\n  }}' + ("" if architecture == ARCHITECTURES[-1] else ","))
    BUDGETS.write_text("\n".join([*lines, "}}"]) + "\n")
