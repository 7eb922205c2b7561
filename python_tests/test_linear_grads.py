"""foreach_noisy_linear_grad_: each layer's gradient against the definition of one, in fp64."""

from __future__ import annotations

import pytest
import torch
import truth
from samples import Sample
from test_ops import clone, pick, poison, samples  # noqa: F401 -- poison is a fixture

from ulr_kernels.ops import foreach_noisy_linear_grad_
from ulr_kernels.ops._op import FLOATS

pytestmark = pytest.mark.usefixtures("one_thread")


def compare(sample: Sample) -> list[torch.Tensor]:
    """Run a sample on the back end in use; its buffers, found to be within rounding of the definition."""
    weights, biases = ([None if b is None else clone(b) for b in part] for part in sample.args[:2])
    foreach_noisy_linear_grad_(weights, biases, *sample.args[2:], **sample.kwargs)
    shared = {k: v for k, v in sample.kwargs.items() if k in ("antithetic", "dist", "sampler", "draw")}
    places = {k: v for k, v in sample.kwargs.items() if k not in shared}
    for layer, arguments in enumerate(zip(*sample.args, strict=True)):
        own = {name: numbers[layer] for name, numbers in places.items()}
        expected = truth.noisy_linear_grad_(*arguments, **shared, **own)
        x = arguments[2]
        results = [b for b in (weights[layer], biases[layer]) if b is not None]
        for result, (value, magnitude) in zip(results, expected, strict=True):
            allowed = truth.tolerance(value, magnitude, result.dtype, x.dtype, x.shape[:-1].numel() * 8)
            error = (result.cpu().double() - value).abs()
            assert not (error.isnan() | (error > allowed)).any(), f"layer {layer}: worst {(error / allowed).max():.3g}"
    return [*weights, *biases]


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("sample_id", samples("foreach_noisy_linear_grad_", good=True))
def test_gradients_of_several_layers(sample_id, dtype, device) -> None:
    compare(pick("foreach_noisy_linear_grad_", sample_id, device, dtype))


def many(dtype: torch.dtype) -> Sample:
    """More layers than one launch takes."""
    sample = pick("foreach_noisy_linear_grad_", "three", "cpu", dtype)
    buffers = [[clone(sample.args[part][0]) for _ in range(70)] for part in (0, 1)]
    keys = [torch.tensor(key) for key in range(70)]
    return Sample("many", (*buffers, *([part[0]] * 70 for part in sample.args[2:5]), keys))


def test_more_layers_than_a_launch_takes(device) -> None:
    compare(
        many(torch.float32) if device == "cpu" else pick("foreach_noisy_linear_grad_", "three", device, torch.float32)
    )
