"""The models that recipes train, initialised from a seed and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulr_kernels import noise_contract
from ulr_kernels.jobs import JobError
from ulr_kernels.ops import noise_like
from ulr_kernels.recipes.efficientnet import EfficientNetLite0

# Keeps their noise apart from that of every step.
_INITIAL_VALUES = noise_contract.site_id("ulr_kernels.recipes.models")


def mlp(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Pixels-256-128-classes with ReLU."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), 256),
        nn.ReLU(),
        nn.Linear(256, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


class ResNet5(nn.Module):
    """Four 3 x 3 convolutions of 8, 16, 32 and 32 channels and a linear layer, without normalisation: the network of
    the ULR paper's experiments (arXiv 2305.08960).

    Args:
        shape: channels, height, width of an image; at least 8 x 8.
        classes: the number of outputs.
        junction: add the last convolution's input to its output.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, junction: bool = True) -> None:
        super().__init__()
        self.junction = junction
        self.conv1 = nn.Conv2d(shape[0], 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.conv3 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv4 = nn.Conv2d(32, 32, 3, padding=1)
        self.fc = nn.Linear(32 * _pooled(shape, 2, 4), classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv3(x))
        y = self.conv4(x)
        x = F.max_pool2d(F.relu(y + x if self.junction else y), 4)
        return self.fc(x.flatten(1))


def vgg8(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Six 3 x 3 convolutions in pairs of 16, 32 and 64 channels, each pair pooled, and two linear layers, without
    normalisation: the other network of the ULR paper's experiments."""
    layers: list[nn.Module] = []
    channels = shape[0]
    for width in (16, 32, 64):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    hidden = [nn.Flatten(), nn.Linear(64 * _pooled(shape, 2, 2, 2), 256), nn.ReLU(), nn.Linear(256, classes)]
    return nn.Sequential(*layers, *hidden)


class ResNet18(nn.Module):
    """ResNet-18 for small images (He et al., arXiv 1512.03385) without normalisation: a 3 x 3 stem of 64 channels, four
    stages of two blocks, a mean over positions, a linear layer. Sums of two branches are divided by the square root of
    2, which keeps their size."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(shape[0], 64, 3, padding=1)
        widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
        self.blocks = nn.Sequential(*map(_Block, widths, widths[1:]))
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class _Block(nn.Module):
    """Two convolutions and a shortcut; where the width grows, the shortcut is a convolution, and positions halve."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        stride = 1 if channels == width else 2
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Identity() if channels == width else nn.Conv2d(channels, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu((self.conv2(F.relu(self.conv1(x))) + self.shortcut(x)) * 0.5**0.5)


class _Spike(torch.autograd.Function):
    """1 above 0, else 0. Backpropagation gets the derivative of an arc tangent in its place (Fang et al., arXiv
    2007.05785)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradients[0] / (1 + (math.pi * x).square())


class Spiking(nn.Module):
    """128 leaky integrate-and-fire neurons that see the image for 6 time steps; a leaky read-out that does not fire is
    averaged over time."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(math.prod(shape), 128), nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        potential = read = total = torch.zeros((), device=x.device)
        for _ in range(6):
            potential = 0.7 * potential + self.hidden(x)
            spikes = _Spike.apply(potential - 1)
            potential = potential - spikes
            read = 0.7 * read + self.out(spikes)
            total = total + read
        return total / 6


def _pooled(shape: tuple[int, int, int], *windows: int) -> int:
    """Pixels that are left of an image."""
    height, width = shape[1:]
    for window in windows:
        height, width = height // window, width // window
    if not height * width:
        least = math.prod(windows)
        raise JobError(f"model must be one for small images: this one needs {least} x {least}, got {shape[1:]}")
    return height * width


MODELS: dict[str, Callable[[tuple[int, int, int], int], nn.Module]] = {
    "mlp": mlp,
    "resnet5": ResNet5,
    "resnet5-plain": lambda shape, classes: ResNet5(shape, classes, junction=False),
    "vgg8": vgg8,
    "resnet18": ResNet18,
    "spiking": Spiking,
}
# These begin with weights that a package brings, and train their last blocks alone.
PRETRAINED: dict[str, Callable[[tuple[int, int, int], int, int], EfficientNetLite0]] = {
    "efficientnet-lite0": EfficientNetLite0
}


def build(
    name: str, shape: tuple[int, int, int], classes: int, seed: int, device: torch.device, blocks: int = 1
) -> nn.Module:
    """A model with initial values that depend on `seed` alone: not on torch's generators, the device or the back end.

    Weights are normal with variance 2 / fan-in (He et al., *Delving deep into rectifiers*, 2015); biases are zero.

    Args:
        name: a key of `MODELS` or `PRETRAINED`.
        shape: channels, height, width of an image.
        classes: the number of outputs.
        seed: any integer that is a key.
        blocks: of a pre-trained model, the last blocks to train, besides the head.

    Raises:
        JobError: the model does not take such images, or its weights cannot be had.
    """
    # torch's own initial values would come from, and advance, its global generator; after some of torch.compile's
    # graphs they do on the meta device too.
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model = MODELS[name](shape, classes) if name in MODELS else PRETRAINED[name](shape, classes, blocks)
    model.to_empty(device=device)
    if isinstance(model, EfficientNetLite0):
        model.load_pretrained()
        return model
    with torch.no_grad():
        for site, parameter in model.named_parameters():
            if parameter.dim() > 1:
                key = noise_contract.fold_in(
                    noise_contract.fold_in(seed, _INITIAL_VALUES), noise_contract.site_id(site)
                )
                parameter.copy_(noise_like(parameter, key) * math.sqrt(2 / parameter[0].numel()))
            else:
                parameter.zero_()
    return model
