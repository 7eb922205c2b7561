"""Arguments of noisy_mlp_step's launcher (csrc/cuda/noisy_mlp_step.cu): how a step is cut into parts, and where in its
workspace each part leaves its results for the next phase."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ulr_kernels.backends import _native
from ulr_kernels.backends._native import Arguments
from ulr_kernels.backends.cuda.tiles import GRADIENT_FEATURES, GRADIENT_PANEL, GRADIENT_ROWS
from ulr_kernels.baselines import BASELINES
from ulr_kernels.ops._losses import ACTIVATIONS, LOSSES
from ulr_kernels.ops.noisy_mlp_step import MlpStep

ACTIVATION_BYTES = 24 * 2**20  # of all copies of a tile of samples: half of an H100's L2
# Clocks of one SM, to share the processors out between layers: a noise value, and a multiply-add by operand size.
CLOCKS_OF_NOISE, CLOCKS_OF_PRODUCT = 0.2, {2: 1 / 1024, 4: 1 / 128}


class Shape(NamedTuple):
    """The properties of a call that its plan depends on."""

    rows: int
    widths: tuple[int, ...]  # of x and of each layer's output
    copies: int
    draws: int
    joint: bool
    clean: bool  # the samples go through all layers without noise too
    element_size: int
    wide: tuple[bool, ...]  # of each layer: its gradients are fp32
    processors: int


def _up(value: int, to: int) -> int:
    return -(-value // to) * to


class _Workspace:
    """Allocates parts of one buffer, by bytes from its start."""

    def __init__(self) -> None:
        self.bytes = 0

    def place(self, count: int) -> int:
        """The start of `count` new bytes; -1 where `count` is 0."""
        if not count:
            return -1
        start = self.bytes
        self.bytes += _up(count, 256)
        return start


@functools.lru_cache(maxsize=256)
def plan(shape: Shape) -> tuple[tuple[int, ...], int]:
    """The launcher's numbers, and the bytes of the workspace.

    The numbers lack the activation, the loss, its label smoothing and the baseline, which come third to sixth.
    """
    layers = range(len(shape.widths) - 1)
    pitches = [_up(width, 8) for width in shape.widths[1:]]
    # Rows of each layer's output per sample: without noise, and of the passes with noise in an earlier layer.
    clean = int(shape.clean)
    noised = [shape.copies * (1 if shape.joint else layer + 1) for layer in layers]
    per_sample = shape.element_size * sum((clean + n) * p for n, p in zip(noised, pitches, strict=True))
    tiles = min(shape.rows, -(-shape.rows * per_sample // ACTIVATION_BYTES))
    samples = -(-shape.rows // tiles)
    workspace = _Workspace()
    loss_weights = workspace.place(4 * (1 if shape.joint else len(layers)) * shape.copies * samples)
    gradients = [_gradient(shape, layer, samples) for layer in layers]
    partials, sums = [], 0
    for layer, (splits, _) in zip(layers, gradients, strict=True):
        direct = splits == 1 and (shape.wide[layer] or samples == shape.rows)
        count = 0 if direct else splits * shape.widths[layer + 1] * (shape.widths[layer] + 1)
        partials.append(-1 if direct else 4 * sums)
        sums += count
    start = workspace.place(4 * sums)
    numbers = [shape.joint, shape.clean, samples, loss_weights, start, sums]
    for layer in layers:
        splits, unit_rows = gradients[layer]
        fan, tile = _forward(shape, layer, samples)
        row_bytes = samples * pitches[layer] * shape.element_size
        places = workspace.place(clean * row_bytes), workspace.place(noised[layer] * row_bytes)
        own = -1 if partials[layer] < 0 else start + partials[layer]
        numbers += [splits, unit_rows, fan, tile, own, *places, pitches[layer]]
    return tuple(map(int, numbers)), workspace.bytes


def _forward(shape: Shape, layer: int, samples: int) -> tuple[int, int]:
    """The number of blocks that share a tile's copies, and the tile's rows and features."""
    makes = not shape.joint or layer == 0
    rows = samples * (1 if layer == 0 else int(shape.clean) + shape.copies * (1 if shape.joint else layer))
    features = shape.widths[layer + 1]

    def items(rows: int, tile: int) -> int:
        return -(-rows // tile) * -(-features // tile)

    tile = 128 if items(rows, 128) >= shape.processors else 64
    fan = min(shape.draws, max(1, shape.processors // items(rows, tile))) if makes else 1
    return fan, tile


def _gradient(shape: Shape, layer: int, samples: int) -> tuple[int, int]:
    """The number of parts of a layer's rows, and the rows of a unit: they share out the work of all layers evenly."""
    clocks, panels = [], [-(-width // GRADIENT_PANEL) for width in shape.widths]
    for at in range(len(shape.widths) - 1):
        inputs, features = shape.widths[at : at + 2]
        product_rows = samples * (shape.copies if shape.joint and at else 1)
        product = product_rows * inputs * CLOCKS_OF_PRODUCT[shape.element_size]
        clocks.append(features * (samples * shape.draws * panels[at] * CLOCKS_OF_NOISE + product))
    tiles = -(-shape.widths[layer + 1] // GRADIENT_FEATURES) * panels[layer]
    wanted = max(1, round(shape.processors * clocks[layer] / sum(clocks) / tiles))
    groups = shape.draws if shape.joint and layer else 1
    unit_rows = min(GRADIENT_ROWS, max(16, _up(-(-samples * groups // wanted), 16)))
    return min(wanted, groups * -(-samples // unit_rows)), unit_rows


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def noisy_mlp_step(losses: Tensor, a: MlpStep) -> Arguments:
    x, noise = a.x, a.noise(a.keys.contiguous())
    numbers, size = plan(
        Shape(
            x.shape[0],
            (x.shape[1], *(weight.shape[0] for weight in a.weights)),
            a.copies,
            noise.draws(a.copies),
            a.joint,
            not a.joint or a.baseline == "clean",
            x.element_size(),
            tuple(g.dtype == torch.float32 for g in a.grad_weights),
            processors(x.device),
        )
    )
    which_loss = LOSSES.index(a.loss), _native.float_bits(a.label_smoothing), BASELINES.index(a.baseline)
    workspace = torch.empty(-(-size // 4), dtype=torch.float32, device=x.device)
    none: list[Tensor | None] = [None] * len(a.weights)
    layers = zip(a.weights, a.biases or none, a.grad_weights, a.grad_biases or none, strict=True)
    of_layers = (tensor for layer in layers for tensor in layer)
    tensors = (losses, x, a.target, a.sigma.contiguous(), workspace, *of_layers, noise.key)
    numbers = (*numbers[:2], ACTIVATIONS.index(a.activation), *which_loss, *numbers[2:])
    return Arguments(_native.noise_view(noise), tensors, numbers)
