"""The CUDA sources through nvcc, without a GPU: warnings are errors, and what kernels cost is held to a budget.

`python python_tests/test_cuda_build.py [SOURCE...]` writes budgets/cuda anew from what it measures: a file for each
source, loops.json, and machine_code.json.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import os
import pathlib
import re
import shutil
import sys

import pytest
from compile_cache import compile_once, with_includes

from ulr_kernels import noise_tables

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent
BUDGETS = HERE / "budgets" / "cuda"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
SOURCES = sorted(path.stem for path in ROOT.glob("csrc/cuda/*.cu"))
FLAGS = (ROOT / "csrc/cuda/nvcc_flags.txt").read_text().split()
# The project's goals on Hopper, stores, addresses and the loop included.
MOST_INSTRUCTIONS_PER_NORMAL = 26.0
MOST_INSTRUCTIONS_PER_PACKED_SIGN = 2.0
MOST_INSTRUCTIONS_PER_OUTPUT = 30.0
MOST_INSTRUCTIONS_PER_ORTHOGONAL_OUTPUT = {"": 6.0, "-pairs": 5.0}
KINDS = ("quantile", "sobol", "signs")
# Of a kernel's last flag among its template arguments.
FLAG_NAMES = {
    "noise": ("each", "whole"),
    "noise_score": ("", "orthogonal"),
    "signs_gradient": ("", "orthogonal"),
    "perturbed_linear": ("", "pairs"),
    "perturbed_conv2d": ("", "pairs"),
    "perturb": ("", "low-rank"),
    "combine": ("", "low-rank"),
}

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")


def compile_cubin(source: pathlib.Path, architecture: str) -> tuple[pathlib.Path, str]:
    """The cubin and what ptxas says of it; made once for each state of the sources."""
    command = ["nvcc", *FLAGS, "-Werror", "all-warnings", "-Xptxas", "-v", f"-arch={architecture}", "-cubin"]
    command += [f"-I{ROOT}/csrc/include", "-o", "OUT", str(source)]
    inputs = with_includes(source, [ROOT / "csrc/include"])
    return compile_once(f"{source.stem}.{architecture}.cubin", command, inputs)


def short_name(mangled: str) -> str:
    """`noisy_linear_kernel-bf16-signs` from a kernel's mangled name."""
    # An identifier is written with its length before it. Digits of a file's hash may look like a length: the shortest.
    found = [mangled[m.end(1) :][: int(m[1])] for m in re.finditer(r"(?=(\d+))", mangled)]
    name = min((n for n in found if n.endswith(("_kernel", "_partials"))), key=len)
    parts, arguments = [name.removesuffix("_kernel")], mangled[mangled.index(name) + len(name) :]
    for pattern, dtype in (("I6__half", "fp16"), ("I13__nv_bfloat16", "bf16"), ("If", "fp32")):
        if arguments.startswith(pattern):
            parts.append(dtype)
    if kind := re.search(r"4KindE(\d)E", arguments):
        parts.append(KINDS[int(kind[1])])
    if flag := re.search(r"Lb([01])E", arguments):
        parts.append(FLAG_NAMES.get(parts[0], ("", "recompute"))[int(flag[1])])
    if "Li3E" in arguments and parts[0] == "combine":
        parts.append("states")
    return "-".join(filter(None, parts))


def measure(source: str, architecture: str) -> dict[str, dict[str, int]]:
    """Of every kernel of a file: registers and stack of a thread, bytes spilled, bytes of static shared memory."""
    result = {}
    for kernel, stack, stores, loads, used in re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\s+ptxas info\s*: Used (.*)",
        compile_cubin(ROOT / "csrc/cuda" / f"{source}.cu", architecture)[1],
    ):
        shared = re.search(r"(\d+) bytes smem", used)
        numbers = {"registers": int(used.split()[0]), "stack": int(stack), "spills": int(stores) + int(loads)}
        result[short_name(kernel)] = {**numbers, "shared": int(shared[1]) if shared else 0}
    return dict(sorted(result.items()))


@functools.cache
def disassemble(source: str, architecture: str = "sm_90a") -> dict[str, str]:
    """The machine code of a file's kernels, by default on Hopper."""
    pytest.importorskip("triton")
    from cubin import dump

    cubin, _ = compile_cubin(ROOT / "csrc/cuda" / f"{source}.cu", architecture)
    parts = re.split(r"Function : (\S+)", dump(cubin.read_bytes(), "-sass"))
    return {short_name(name): code for name, code in zip(parts[1::2], parts[2::2], strict=True)}


def budget_of(name: str) -> dict:
    return json.loads((BUDGETS / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> None:
    """All that the chosen tests compile, on all cores; what fails, fails again in its own test."""
    chosen = [item.callspec.params for item in request.session.items if "compiled" in getattr(item, "fixturenames", ())]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for params in chosen:
            pool.submit(compile_cubin, ROOT / "csrc/cuda" / f"{params['source']}.cu", params["architecture"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_kernels_stay_within_their_budget(source, architecture, compiled) -> None:
    measured, budget = measure(source, architecture), budget_of(source)[architecture]
    assert list(measured) == list(budget)
    over = {
        (kernel, what): (value, budget[kernel][what])
        for kernel, values in measured.items()
        for what, value in values.items()
        if value > budget[kernel][what]
    }
    assert not over, f"measured, budget: {over}"
    assert all(values["stack"] == 0 and values["spills"] == 0 for values in budget.values())


@pytest.mark.parametrize("source", ["noisy_linear_recompute_", "noisy_conv2d_recompute_"])
def test_replay_fits_the_smallest_shared_memory(source) -> None:
    """99 KiB a block on compute capability 8.6, 8.9 and 12.0. The emulation refuses more than 96 KiB of dynamic memory;
    what is static comes on top."""
    for values in budget_of(source).values():
        assert all(kernel["shared"] <= 3 * 1024 for kernel in values.values())


def noise_loop(source: str, kernel: str, **counts: int) -> list[str]:
    """The shortest innermost loop of a kernel that calls Philox and has these numbers of instructions: conversions
    (one a normal), loads and stores (of global memory), shared_stores."""
    from cubin import count, instructions, loops

    patterns = {
        "conversions": r"\bI2FP?\b(?!\.U32\.RP)",
        "loads": r"\bLDG\b",
        "stores": r"\bSTG\b",
        "shared_stores": r"\bSTS\b",
    }
    return min(
        (
            body
            for body in loops(instructions(disassemble(source)[kernel]))
            if count(body, r"IMAD\.WIDE") > 10 and all(count(body, patterns[k]) == n for k, n in counts.items())
        ),
        key=len,
    )


def orthogonal_loop(source: str, kernel: str, stores: int) -> list[str]:
    """The loop of a forward that makes words of orthogonal signs for four draws, without the call of Philox that all of
    2^16 draws share."""
    from cubin import body_of, count, instructions, loop_spans, without_calls

    code = instructions(disassemble(source)[kernel])
    patterns = {r"\bPOPC\b": 2, r"\bSHFL\b": 4, r"\bSTG\b": stores, r"\bSTS\b": 0}
    spans = [s for s in loop_spans(code) if all(count(body_of(code, *s), p) == n for p, n in patterns.items())]
    return min((without_calls(code, *span) for span in spans), key=len)


def measure_loops() -> dict[str, float]:
    """Instructions a normal or packed sign, on Hopper. Pairs: antithetic, two outputs or two signs from one noise."""
    result = {"noise": len(noise_loop("noise", "noise-quantile-whole", conversions=8, stores=2)) / 8}
    for dtype, stores in (("bf16", 1), ("fp32", 2)):
        for name, copies in (("", 1), ("-pairs", 2)):
            for op, loads, stored in (("noisy_linear", 0, copies), ("noisy_linear_grad_", copies, 0)):
                kernel = f"{'noisy_linear' if op == 'noisy_linear' else 'gradient'}-{dtype}-quantile"
                body = noise_loop(op, kernel, conversions=8, loads=loads, stores=stored * stores)
                result[f"{op}-{dtype}{name}"] = len(body) / 8
            recompute = f"gradient-{dtype}-quantile-recompute"
            body = noise_loop("noisy_linear_recompute_", recompute, conversions=8, loads=copies, stores=copies * stores)
            result[f"noisy_linear_recompute_-{dtype}{name}"] = len(body) / 8
            # Channels last: the outputs' octets are stored at once.
            body = noise_loop(
                "noisy_conv2d", f"noisy_conv2d-{dtype}-quantile", conversions=8, loads=0, stores=copies * stores
            )
            result[f"noisy_conv2d-{dtype}{name}"] = len(body) / 8
            body = noise_loop(
                "noisy_conv2d_grad_", f"conv_gradient-{dtype}-quantile", conversions=8, loads=copies, stores=0
            )
            result[f"noisy_conv2d_grad_-{dtype}{name}"] = len(body) / 8
    for name, copies in (("", 1), ("-pairs", 2)):
        for sampler in ("", "-orthogonal"):
            counts = {"loads": copies, "shared_stores": 16 * copies}
            body = noise_loop("noisy_linear_grad_", f"signs_gradient-bf16{sampler}", **counts)
            result[f"packed-signs{sampler}{name}"] = len(body) / (128 * copies)
    for dtype, stores in (("bf16", 1), ("fp32", 2)):
        for name, copies in (("", 1), ("-pairs", 2)):
            body = orthogonal_loop("noisy_linear", f"noisy_linear-{dtype}-signs", 4 * copies * stores)
            result[f"orthogonal-{dtype}{name}"] = len(body) / (32 * copies)
    for name, values in (("quantile", 8), ("signs", 32)):
        conversions = values if name == "quantile" else 0
        body = noise_loop("noise_dot", f"noise_dot-fp32-{name}", conversions=conversions, loads=0, stores=0)
        result[f"noise_dot-{name}"] = len(body) / values
    for name, conversions in (("quantile", 8), ("signs", 0)):  # a probe's noise
        result[f"combine_-{name}"] = (
            len(noise_loop("combine_", f"combine-{name}", conversions=conversions, loads=1)) / 8
        )
    return result


def test_loops_stay_within_their_budget() -> None:
    measured, budget = measure_loops(), budget_of("loops")
    assert list(measured) == list(budget)
    over = {name: (value, budget[name]) for name, value in measured.items() if value > budget[name]}
    assert not over, f"measured, budget: {over}"
    for name, most in budget.items():
        if name == "noise" or name.endswith(("grad_-bf16", "grad_-fp32")):
            assert most <= MOST_INSTRUCTIONS_PER_NORMAL, name
        elif "orthogonal" in name:
            pairs = "-pairs" if name.endswith("pairs") else ""
            assert most <= MOST_INSTRUCTIONS_PER_ORTHOGONAL_OUTPUT[pairs], name
        elif name.startswith("packed"):
            assert most <= MOST_INSTRUCTIONS_PER_PACKED_SIGN, name
        else:
            assert most <= MOST_INSTRUCTIONS_PER_OUTPUT * (2 if name.endswith("pairs") else 1), name


def test_table_reads_do_not_conflict() -> None:
    """A read of 8 bytes by a warp takes a wavefront for each half of it, and one more where two lanes of a half want
    different rows of one bank: rows 16 apart. Three reads a normal: 6 wavefronts, and what this chance adds."""
    lanes, rows = 16, len(noise_tables.NORMAL)
    assert rows == 32  # the rows of each pair fill the banks twice
    chance = [
        2.0**-30,
        *(2.0 ** (row - 31) for row in range(1, 31)),
        2.0**-25,
    ]  # of a random word; the last by rounding

    def both(p: float, q: float) -> float:
        return 1 - (1 - p) ** lanes - (1 - q) ** lanes + (1 - p - q) ** lanes

    conflict = sum(both(chance[row], chance[row + 16]) for row in range(16))
    assert 6 * (1 + conflict) < 6.0015
    from cubin import count

    body = noise_loop("noise", "noise-quantile-whole", conversions=8, stores=2)
    assert count(body, r"LDS\.64") == 3 * 8 and count(body, r"\bLDS") == 3 * 8


PRODUCTS = (
    "noisy_conv2d",
    "noisy_conv2d_grad_",
    "noisy_conv2d_recompute_",
    "noisy_linear",
    "noisy_linear_grad_",
    "foreach_noisy_linear_grad_",
    "noisy_linear_recompute_",
    "noisy_mlp_step",
    "perturbed_conv2d",
    "perturbed_linear",
)


def measure_machine_code(source: str, architecture: str) -> dict[str, dict[str, int]]:
    """Of every kernel of a file: products of tensor cores, and loads of 16 bytes a thread from global memory."""
    loads = re.compile(r" LDG(?:STS)?\.\S*\b128\b")  # a search for a word's boundary takes ten times as long
    return {
        kernel: {"HMMA": code.count("HMMA.16816.F32"), "16-byte loads": len(loads.findall(code))}
        for kernel, code in sorted(disassemble(source, architecture).items())
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", PRODUCTS)
def test_products_use_tensor_cores_and_wide_loads(source, architecture, compiled) -> None:
    measured, least = measure_machine_code(source, architecture), budget_of("machine_code")[architecture][source]
    assert list(measured) == list(least)
    for kernel, counts in least.items():
        assert all(measured[kernel][what] >= count for what, count in counts.items()), (kernel, measured[kernel])
        if "partials" not in kernel:
            assert counts["16-byte loads"] > 0 and (counts["HMMA"] > 0) == ("fp32" not in kernel), kernel


@pytest.mark.parametrize("source", PRODUCTS)
def test_products_sum_in_fp32_and_nothing_is_atomic(source) -> None:
    for kernel, code in disassemble(source).items():
        tensor_cores, is_half = "HMMA.16816.F32" in code, "fp16" in kernel or "bf16" in kernel
        assert tensor_cores == (is_half and "partials" not in kernel), kernel
        assert (".BF16" in code) == ("bf16" in kernel), kernel
        # A barrier of the grid counts blocks by integers; sums in an order of their own would not repeat.
        kinds = r"\S*\.F(16|32|64)" if kernel.startswith(("mlp_step", "conv_gradient")) else ""
        assert not re.search(rf" (ATOM|ATOMG|ATOMS|RED)\b{kinds}", code), kernel


def write_budgets(sources: list[str]) -> None:
    for source in sources:
        architectures = []
        for architecture in ARCHITECTURES:
            kernels = measure(source, architecture)
            rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(values)}" for name, values in kernels.items())
            architectures.append(f'  "{architecture}": ' + (f"{{\n{rows}\n  }}" if rows else "{}"))
        (BUDGETS / f"{source}.json").write_text("{\n" + ",\n".join(architectures) + "\n}\n")
    # With room for an instruction or two: other versions of nvcc order loops a little differently.
    most = {name: round(value + (0.02 if "signs" in name else 0.1), 2) for name, value in measure_loops().items()}
    (BUDGETS / "loops.json").write_text(json.dumps(most, indent=2) + "\n")
    least = {a: {source: measure_machine_code(source, a) for source in PRODUCTS} for a in ARCHITECTURES}
    kernels = re.sub(r"\{\s+(\"HMMA\": \d+),\s+(\"16-byte loads\": \d+)\s+\}", r"{\1, \2}", json.dumps(least, indent=1))
    (BUDGETS / "machine_code.json").write_text(kernels + "\n")


if __name__ == "__main__":
    write_budgets(sys.argv[1:] or SOURCES)
