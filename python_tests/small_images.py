"""Small image sets in each of the forms that `recipes.data` reads."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np


def two_classes(folder: Path) -> Path:
    """Two classes of 5 x 6 grey images that differ clearly: bright above, bright below."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 6)):
        for name, bright in (("above", slice(0, 2)), ("below", slice(3, 5))):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 100, (5, 6), dtype=np.uint8)
                pixels[bright] += 120
                Image.fromarray(pixels).save(folder / part / name / f"{index}.png")
    return folder


def write_idx(path: Path, values: np.ndarray, packed: bool = False) -> None:
    content = bytes((0, 0, 8, values.ndim)) + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()
    if packed:
        path = path.with_name(path.name + ".gz")
    path.write_bytes(gzip.compress(content) if packed else content)


def idx_folder(folder: Path, packed: bool = False) -> Path:
    for part, count in (("train", 20), ("t10k", 10)):
        pixels = np.arange(count * 12, dtype=np.uint8).reshape(count, 3, 4)
        write_idx(folder / f"{part}-images-idx3-ubyte", pixels, packed)
        write_idx(folder / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 5, packed)
    return folder


def cifar_folder(folder: Path) -> Path:
    """Two training files and one for testing, as CIFAR-10's binary form has them."""
    for name, count in (("data_batch_1", 4), ("data_batch_2", 3), ("test_batch", 2)):
        records = np.arange(count * 3073, dtype=np.uint32).astype(np.uint8).reshape(count, 3073)
        records[:, 0] = np.arange(count)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("plane\ncar\nbird\ncat\n\n")
    return folder


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 30])
