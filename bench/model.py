"""`ulr bench --model h100`: how long each CUDA kernel would take on a device, and what would limit it.

Everything here is predicted. What a kernel does is counted: instructions of its noise loop (from its machine code, in
python_tests/budgets/cuda/loops.json, which the tests hold to it), and for its tiles tensor operations, wavefronts of
shared memory, and bytes. What a device does in a clock is public, or marked as assumed. A prediction is no measurement,
and meets no goal.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

from ulr_kernels.backends.cuda import mlp, tiles

LOOPS = Path(__file__).parents[1] / "python_tests" / "budgets" / "cuda" / "loops.json"


@dataclasses.dataclass(frozen=True)
class Device:
    """The most that a device does; rates are for each processor (SM) and clock."""

    name: str
    processors: int
    clock: float  # Hz
    memory: float  # bytes a second
    l2: float  # bytes a second; assumed
    lanes: int  # instructions of a thread
    multiply_adds: dict[int, float]  # by operand size; of 16 bits by mma.sync, assumed to reach 0.6 of wgmma's rate
    wavefronts: float  # of shared memory, 128 bytes each
    step: float  # clocks that a step along K takes at least, from loads to sums; assumed
    barrier: float  # seconds of a barrier of the grid; assumed


DEVICES = {
    "h100": Device(
        name="H100 SXM",
        processors=132,
        clock=1.755e9,
        memory=3.35e12,
        l2=5.5e12,
        lanes=128,
        multiply_adds={2: 0.6 * 2048, 4: 128},
        wavefronts=1,
        step=250,
        barrier=1.5e-6,
    )
}


@dataclasses.dataclass(frozen=True)
class Phase:
    """Blocks that do the same: what one of them does, and what all of them move."""

    blocks: int
    resident: int  # blocks that a processor holds at once
    size: int  # of an operand, bytes
    multiply_adds: float = 0.0
    wavefronts: float = 0.0
    instructions: float = 0.0  # of noise, counted by thread
    steps: float = 0.0
    l2_bytes: float = 0.0
    memory_bytes: float = 0.0

    def seconds(self, device: Device) -> dict[str, float]:
        """By limiter: what the processor with the most blocks takes, or all of them together."""
        share = math.ceil(self.blocks / device.processors)
        each = {
            "tensor cores" if self.size == 2 else "fp32 units": self.multiply_adds / device.multiply_adds[self.size],
            "shared memory": self.wavefronts / device.wavefronts,
            "instructions": self.instructions / device.lanes,
        }
        found = {name: share * clocks / device.clock for name, clocks in each.items()}
        found["latency"] = math.ceil(share / self.resident) * self.steps * device.step / device.clock
        found["L2"] = self.blocks * self.l2_bytes / device.l2
        found["memory"] = self.memory_bytes / device.memory
        return found


@dataclasses.dataclass(frozen=True)
class Work:
    """A kernel's call: phases one after another, with barriers of the grid between them."""

    kernel: str
    shape: str
    phases: tuple[Phase, ...]
    barriers: int = 0


def instructions(loop: str) -> float:
    """Of a thread for each normal that a loop makes, stores and loop included."""
    return json.loads(LOOPS.read_text())[loop]


def kind(size: int) -> str:
    return {2: "bf16", 4: "fp32"}[size]


TABLE_READS = 6 / 32  # wavefronts a normal: its octave's coefficients


def product(rows: int, features: int, inputs: int, size: int, tile: int, resident: int, fan: int = 1) -> Phase:
    """tiled_product of tile.cuh: eight warps, a quarter of the tile's rows and half of its features each."""
    depth = 64 // size
    steps = math.ceil(inputs / depth)
    if size == 2:  # ldmatrix of four matrices: 4 wavefronts; two halves of a step
        reads = 2 * 4 * (tile / 64 + tile / 32)
    else:  # float4: 4 wavefronts; four chunks of a step
        reads = 4 * 4 * (2 * tile / 64 + 2 * tile / 16)
    stores = 2 * tile * 64 / 128
    return Phase(
        blocks=math.ceil(rows / tile) * math.ceil(features / tile) * fan,
        resident=resident,
        size=size,
        multiply_adds=tile * tile * depth * steps,
        wavefronts=steps * (8 * reads + stores),
        steps=steps,
        l2_bytes=2 * tile * 64 * steps,
    )


def linear(rows: int, features: int, inputs: int, copies: int, size: int) -> Work:
    """noisy_linear, copies sharing x, Gaussian."""
    tile = 128
    phase = product(rows, features, inputs, size, tile, resident=2)
    noise = tile * tile * copies
    phase = dataclasses.replace(
        phase,
        instructions=noise * instructions(f"noisy_linear-{kind(size)}"),
        wavefronts=phase.wavefronts + noise * TABLE_READS,
        memory_bytes=size * (rows * inputs + features * inputs + copies * rows * features),
    )
    return Work("noisy_linear", f"{kind(size)} [{rows}, {inputs}] x {features}, {copies} copies", (phase,))


def gradient_phase(rows: int, features: int, inputs: int, draws: int, groups: int, size: int, parts: int = 1) -> Phase:
    """gradient.cuh: `groups` copies with an x each, or one group whose `draws` are summed first."""
    panels, own_rows = math.ceil(inputs / tiles.GRADIENT_PANEL), rows * groups / parts
    depth = 16 if size == 2 else 8
    width = min(inputs, tiles.GRADIENT_PANEL)
    warps = math.ceil(width / 64)
    reads = 4 * (2 + 4) if size == 2 else depth * (4 + 8 * 2)  # ldmatrix, or float and float2, of a warp and step
    steps = own_rows / depth
    noise = own_rows * tiles.GRADIENT_FEATURES * draws
    return Phase(
        blocks=math.ceil(features / tiles.GRADIENT_FEATURES) * panels * parts,
        resident=1,
        size=size,
        multiply_adds=own_rows * tiles.GRADIENT_FEATURES * width,
        wavefronts=steps * (warps * reads + depth * width * size / 128) + noise * TABLE_READS,
        instructions=noise * instructions(f"noisy_linear_grad_-{kind(size)}"),
        steps=steps,
        l2_bytes=own_rows * width * size,
        memory_bytes=size * rows * groups * inputs + 8 * features * inputs,
    )


def gradient(rows: int, features: int, inputs: int, copies: int, shared: bool, size: int) -> Work:
    """noisy_linear_grad_, Gaussian, no pairs."""
    draws, groups = (copies, 1) if shared else (1, copies)
    how = "sharing x" if shared else "each its x"
    shape = f"{kind(size)} [{rows}, {inputs}] x {features}, {copies} copies {how}"
    return Work("noisy_linear_grad_", shape, (gradient_phase(rows, features, inputs, draws, groups, size),))


def mlp_step(widths: tuple[int, ...], rows: int, copies: int, joint: bool, size: int, device: Device) -> Work:
    """noisy_mlp_step, antithetic, cut as the launcher's plan does."""
    layers, draws = len(widths) - 1, copies // 2
    shape = mlp.Shape(rows, widths, copies, draws, joint, not joint, size, (True,) * layers, device.processors)
    numbers, _ = mlp.plan(shape)
    samples, tiles = numbers[2], math.ceil(rows / numbers[2])
    phases = []
    for layer, (inputs, features) in enumerate(zip(widths, widths[1:], strict=False)):
        _, _, fan, tile = numbers[6 + 8 * layer :][:4]
        makes, noised = not joint or layer == 0, copies * ((layer > 0) if joint else layer) * samples
        clean = samples if layer == 0 or not joint else 0
        phase = product(clean, features, inputs, size, tile, 1, fan if makes else 1)
        others = product(noised, features, inputs, size, tile, 1) if noised else None
        made = samples * features * draws * (1 if makes else 2)
        blocks = phase.blocks + (others.blocks if others else 0)
        phases.append(
            dataclasses.replace(
                phase,
                blocks=blocks,
                instructions=made / blocks * instructions(f"noisy_linear-{kind(size)}-pairs"),
                wavefronts=phase.wavefronts + made / blocks * TABLE_READS,
            )
        )
    for layer, (inputs, features) in enumerate(zip(widths, widths[1:], strict=False)):
        splits = numbers[6 + 8 * layer]
        groups = copies if joint and layer else 1
        each = 1 if joint and layer else draws
        phases.append(gradient_phase(samples, features, inputs, each, groups, size, splits))
    name = "x".join(map(str, widths))
    text = f"{kind(size)} {name}, batch {rows}, {copies} copies, {'joint' if joint else 'layer-wise'}"
    return Work("noisy_mlp_step", text, tuple(phases) * tiles, barriers=(layers + 2) * tiles)


def works(device: Device) -> Iterator[Work]:
    for size in (2, 4):
        for inputs in (256, 1024, 4096):
            yield linear(8192, 4096, inputs, 1, size)
    yield linear(1024, 2048, 1024, 64, 2)
    yield gradient(1024, 2048, 1024, 64, True, 2)
    yield gradient(1024, 2048, 1024, 64, False, 2)
    for joint in (False, True):
        for size in (2, 4):
            yield mlp_step((784, 256, 128, 10), 128, 32, joint, size, device)
    yield mlp_step((1024,) * 5, 1024, 32, False, 2, device)


def predict(work: Work, device: Device) -> tuple[float, float, str]:
    """Seconds if all that a phase does overlaps, seconds if its noise waits for its product, and the limiter."""
    least = most = work.barriers * device.barrier
    by_limiter = {"barriers": least}
    for phase in work.phases:
        found = phase.seconds(device)
        limiter = max(found, key=lambda name: found[name])
        least += found[limiter]
        noise = found["instructions"]
        most += max(noise, found["memory"], noise + max(t for name, t in found.items() if name != "instructions"))
        by_limiter[limiter] = by_limiter.get(limiter, 0.0) + found[limiter]
    return least, most, max(by_limiter, key=lambda name: by_limiter[name])


LABEL = """Predicted for {device} from counted instructions, bytes, wavefronts of shared memory and tensor operations,
at rates that are public or assumed (bench/model.py). Nothing here has been measured, and no goal is met by it.
least: noise overlaps all else; most: it waits for its phase's product.
"""


def table(name: str) -> str:
    """The predictions for a device of DEVICES, aligned."""
    device = DEVICES[name]
    rows = [("kernel", "shape", "least", "most", "limiter")]
    for work in works(device):
        least, most, limiter = predict(work, device)
        rows.append((work.kernel, work.shape, f"{least * 1e6:.1f} us", f"{most * 1e6:.1f} us", limiter))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    aligned = [
        "  ".join(c.rjust(w) if i in (2, 3) else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return LABEL.format(device=device.name) + "\n" + "\n".join(line.rstrip() for line in aligned)
