"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for a H100 with a budget.

`python python_tests/test_triton.py` writes the budget anew from what it measures.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

HERE = pathlib.Path(__file__).parent
BUDGETS = HERE / "budgets_triton.json"
# Of an instruction budget, in any kernel whose loop over draws makes noise and only adds it up or writes it out.
GOALS = {"normal": 30.0, "sign": 3.0, "wavefronts": 6.0}


@pytest.mark.pair("triton/interpreted")
def test_interpreted() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_interpreted.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= 60, run.stdout[-2000:]


def launches() -> dict[str, Callable]:
    """A launch of each kernel in each form that compiles to other code, by name."""
    from sign_probe import sign_probe_launch

    from ulr_kernels.backends.triton import noise
    from ulr_kernels.backends.triton.noisy_linear import noisy_linear_launch
    from ulr_kernels.backends.triton.noisy_linear_grad_ import gradient_launch

    key, sigma, rows, inputs, features, copies = torch.tensor(1), torch.tensor(0.1), 128, 784, 512, 64
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

    def fill(dist: str, sampler: str = "iid"):
        return lambda: noise.noise_launch(torch.empty(rows, 512), key, dist, sampler, 1, 0, 0, 0)

    def operands(dtype: str, shared: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        shapes = ((copies, rows, features), (rows, inputs) if shared else (copies, rows, inputs))
        shapes += ((features, inputs), (features,))
        return tuple(torch.empty(s, dtype=dtypes[dtype]) for s in shapes)

    def forward(dtype: str, dist: str, antithetic: bool = False, shared: bool = True):
        which = (sigma, key, copies, antithetic, dist, "iid", 1, 0, 0, 0)
        return lambda: noisy_linear_launch(*operands(dtype, shared), *which)

    def gradient(dtype: str, dist: str, shared: bool = True, replay: bool = False, log_sigma: bool = False):
        def launch():
            y, x, weight, bias = operands(dtype, shared)
            buffers = (torch.empty(features, inputs), torch.empty(features), torch.empty(()) if log_sigma else None)
            y, weight, bias = (y, weight, bias) if replay else (None, None, None)
            which = (torch.empty(copies, rows), sigma, key, True, dist, "iid", 1, 0, 0, 0)
            return gradient_launch(y, *buffers, x, weight, bias, *which)

        return launch

    counter = torch.empty(64, 4, dtype=torch.int64)
    return {
        "philox4x32": lambda: noise.philox_launch(counter, counter, torch.tensor([1, 2])),
        "fold_in": lambda: noise.fold_in_launch(counter[:, 0], counter[:, 0], key),
        "noise-normal": fill("normal"),
        "noise-laplace": fill("laplace"),
        "noise-rademacher": fill("rademacher"),
        "noise-sobol": fill("normal", "sobol"),
        "packed-signs": sign_probe_launch,
        "forward-bf16-normal": forward("bf16", "normal"),
        "forward-bf16-normal-antithetic": forward("bf16", "normal", antithetic=True),
        "forward-bf16-rademacher": forward("bf16", "rademacher"),
        "forward-fp32-normal": forward("fp32", "normal"),
        "forward-fp16-laplace-separate": forward("fp16", "laplace", antithetic=True, shared=False),
        "gradient-bf16-normal": gradient("bf16", "normal"),
        "gradient-bf16-normal-separate": gradient("bf16", "normal", shared=False),
        "gradient-bf16-rademacher": gradient("bf16", "rademacher"),
        "gradient-fp16-laplace-log-sigma": gradient("fp16", "laplace", log_sigma=True),
        "gradient-fp32-normal": gradient("fp32", "normal"),
        "gradient-fp32-rademacher": gradient("fp32", "rademacher"),
        "replay-bf16-normal": gradient("bf16", "normal", replay=True),
        "replay-bf16-normal-separate": gradient("bf16", "normal", shared=False, replay=True),
        "replay-bf16-rademacher": gradient("bf16", "rademacher", replay=True),
        "replay-fp32-normal": gradient("fp32", "normal", replay=True),
    }


# Loops over draws that only make noise and add it up, or write it out: here the goal holds for all they do.
HELD_TO_GOALS = {
    "packed-signs": GOALS["sign"],
    "forward-bf16-normal": GOALS["normal"],
    "forward-fp32-normal": GOALS["normal"],
    "gradient-bf16-normal": GOALS["normal"],
    "gradient-fp32-normal": GOALS["normal"],
}


def triton_version() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def names() -> list[str]:
    return list(launches()) if importlib.util.find_spec("triton") else []


@pytest.mark.pair("triton/interpreted")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")
@pytest.mark.parametrize("name", names())
def test_compiled(name) -> None:
    from cubin import measure

    measured = measure(launches()[name]())
    assert measured["spills"] == 0
    if name in HELD_TO_GOALS:
        assert measured["instructions"] <= HELD_TO_GOALS[name]
        assert measured["wavefronts"] <= GOALS["wavefronts"]
    budget = json.loads(BUDGETS.read_text()).get(triton_version(), {}).get(name, {})  # another compiler, other code
    over = {k: (measured[k], limit) for k, limit in budget.items() if measured[k] > limit}
    assert not over, f"measured, budget: {over}"


@pytest.mark.pair("triton/interpreted")
def test_every_launch_has_a_budget() -> None:
    for version, budget in json.loads(BUDGETS.read_text()).items():
        assert list(budget) == names(), version


if __name__ == "__main__":
    from cubin import measure

    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    budgets[triton_version()] = {name: measure(launch()) for name, launch in launches().items()}
    rows = ",\n".join(
        f'  "{version}": {{\n'
        + ",\n".join(f"    {json.dumps(name)}: {json.dumps(values)}" for name, values in table.items())
        + "\n  }"
        for version, table in sorted(budgets.items())
    )
    BUDGETS.write_text(f"{{\n{rows}\n}}\n")
