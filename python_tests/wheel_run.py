"""Run by test_wheel.py in the environment of a wheel: `answers` needs no torch, `train` does.

Usage: wheel_run.py VECTORS [train]
"""

from __future__ import annotations

import array
import ctypes
import importlib.util
import json
import pathlib
import sys

DISTRIBUTIONS = {"normal": 0, "laplace": 1, "rademacher": 2}


def import_without_torch() -> None:
    """Make `ulr_kernels` a package whose own file has not run: it imports torch, and `backends._abi` does not."""
    spec = importlib.util.find_spec("ulr_kernels")
    assert spec is not None
    sys.modules["ulr_kernels"] = importlib.util.module_from_spec(spec)


def answers(vectors: list[dict]) -> str:
    """Compare the library's noise with the frozen vectors; the instruction set that made it."""
    from ulr_kernels.backends import _abi

    library = _abi.open_library(_abi.PACKAGE / "libulr_cpu.so")
    assert isinstance(library, ctypes.CDLL), library
    address = ctypes.cast(library.ulr_cpu_noise, ctypes.c_void_p).value
    assert address is not None
    iid = [vector for vector in vectors if "sampler" not in vector["kwargs"]]
    for vector in iid:
        (rows, cols), options = vector["shape"], dict(vector["kwargs"])
        key, out = array.array("q", [vector["key"]]), array.array("f", bytes(4 * rows * cols))
        offsets = [options.get(name, 0) for name in ("draw", "row_offset", "col_offset")]
        width = offsets[2] + cols
        noise = (key.buffer_info()[0], 0, DISTRIBUTIONS[options["dist"]], False, *offsets, 1, width, False)
        assert _abi.launch(address, noise, ((out.buffer_info()[0], 0, (rows, cols), (cols, 1)),)) == 0
        words = array.array("I", out.tobytes())
        assert [f"{word:08x}" for word in words] == vector["bits"], vector["id"]
    library.ulr_cpu_isa.restype = ctypes.c_char_p
    return f"{len(iid)} answers by {_abi.CALLS_BY} on {library.ulr_cpu_isa().decode()}"


def losses() -> list[float]:
    """Of steps of the estimator and of an optimiser, which run most of the kernels of a layer."""
    import torch

    import ulr_kernels as ulr

    x = ulr.noise((64, 8), key=0)
    target = x.argmax(1) % 3
    layers = [torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)]
    model = torch.nn.Sequential(*layers)
    for number, parameter in enumerate(model.parameters()):
        parameter.data.copy_(ulr.noise_like(parameter, number) / 4)
    loss_fn = torch.nn.CrossEntropyLoss(reduction="none")
    adam = torch.optim.Adam(model.parameters(), lr=0.02)
    estimator = ulr.ULR(model, sigma=0.1, copies=32, seed=0)
    seen = []
    for _ in range(40):
        adam.zero_grad()
        seen.append(float(estimator.backward(x, target, loss_fn)))
        adam.step()
    mezo = ulr.optim.MeZO(model, lr=1e-3, eps=1e-3, probes=4)
    return seen + [float(mezo.step(lambda: loss_fn(model(x), target).mean())) for _ in range(3)]


def train() -> str:
    """Train by the libraries' usual calls and by ctypes, with the same losses; `ulr.describe()`."""
    import ulr_kernels as ulr
    from ulr_kernels.backends import _abi, _native

    first = losses()
    assert first[-1] < 0.6 * first[0], first
    _abi.launch = _abi.launch_by_ctypes
    _native.launcher.cache_clear()
    assert losses() == first
    return ulr.describe()


if __name__ == "__main__":
    vectors = next(argument for argument in sys.argv if argument.endswith(".json"))
    if "train" in sys.argv:
        print(train())
    else:
        import_without_torch()
    import ulr_kernels

    print(ulr_kernels.__spec__.origin)
    print(answers(json.loads(pathlib.Path(vectors).read_text())["noise"]))
