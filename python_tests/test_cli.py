"""The command line: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("safetensors", reason="the recipes need safetensors")
pytest.importorskip("sklearn", reason="digits come from scikit-learn")

from ulr_kernels import cli  # noqa: E402
from ulr_kernels.recipes.train import CHECKPOINT  # noqa: E402


def ulr(*arguments: str) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as exit:
        assert isinstance(exit.code, int)
        return exit.code


BAD = {
    "unknown data": (["--data", "cifar"], "data 'cifar' is neither one of digits, mnist5k, fashion nor a folder"),
    "no data": ([], "give --data"),
    "empty folder": (["--data", "empty"], "no file train-images-idx3-ubyte"),
    "unknown model": (["--data", "digits", "--model", "huge"], "invalid choice: 'huge'"),
    "unknown method": (["--data", "digits", "--method", "sgd"], "invalid choice: 'sgd'"),
    "unknown option": (["--data", "digits", "--epoch", "3"], "unrecognized arguments"),
    "zero copies": (["--data", "digits", "--copies", "0"], "'copies' must be an integer above 0"),
    "odd copies": (["--data", "digits", "--antithetic", "--copies", "7"], "'copies' must be even where antithetic"),
    "copies of no layer": (["--data", "digits", "--copies", "9=8"], "'copies' must name layers of the model"),
    "copies of some layers": (["--data", "digits", "--copies", "1=8"], "'copies' must have an entry for every trained"),
    "copies malformed": (["--data", "digits", "--copies", "1=8,x"], "must be a number or LAYER=N"),
    "negative sigma": (["--data", "digits", "--sigma", "-0.1"], "'sigma' must be a finite number above 0"),
    "infinite sigma": (["--data", "digits", "--sigma", "inf"], "'sigma' must be a finite number above 0"),
    "zero epochs": (["--data", "digits", "--epochs", "0"], "epochs must be at least 1, got 0"),
    "zero batch": (["--data", "digits", "--batch", "0"], "batch must be at least 1, got 0"),
    "zero lr": (["--data", "digits", "--lr", "0"], "lr must be positive, got 0.0"),
    "nan lr": (["--data", "digits", "--lr", "nan"], "lr must be positive, got nan"),
    "negative decay": (["--data", "digits", "--weight-decay", "-1"], "weight-decay must be at least 0"),
    "whole smoothing": (["--data", "digits", "--label-smoothing", "1"], "label-smoothing must be in [0, 1)"),
    "negative threads": (["--data", "digits", "--threads", "-1"], "threads must be at least 0"),
    "wide seed": (["--data", "digits", "--seed", str(2**64)], "seed must be in"),
    "no number": (["--data", "digits", "--batch", "many"], "invalid int value: 'many'"),
    "out is a file": (["--data", "digits", "--out", "file"], "out 'file' cannot be used"),
    "nothing to resume": (["--resume", "empty"], "cannot be read as a checkpoint: no such file"),
    "resume with settings": (["--resume", "empty", "--lr", "1"], "drop --lr"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused_in_one_line(arguments, message: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    assert ulr("train", *arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.startswith("ulr")
    assert ": error: " in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["demo", "--seeds", "0"], ["demo", "extra"]])
def test_bad_commands_are_refused(arguments: list[str], capsys):
    assert ulr(*arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("option", [["--quick"], ["--only", "normal"], ["--out", "here"]])
def test_predictions_refuse_options_of_measurements(option: list[str], tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert ulr("bench", "--model", "h100", *option) == 2
    printed = capsys.readouterr()
    assert f"--model measures nothing and writes nothing: drop {option[0]}" in printed.err
    assert printed.out == "" and not list(tmp_path.iterdir())


def test_absent_device_is_refused(tmp_path: Path, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ulr("train", "--data", "digits", "--device", "cuda", "--out", str(tmp_path / "new")) == 2
    assert "this torch sees no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_run_from_the_command_line(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["train", "--data", "digits", "--method", "bp", "--epochs", "2", "--lr", "3e-3"]
    assert ulr(*command) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("epoch 1/2  loss ")
    for path in printed[2:]:
        assert Path(path).is_file()
    text = Path("runs/digits-mlp-bp/report.json").read_text()
    assert f'"ulr {" ".join(command)}"' in text
    assert ulr(*command) == 2  # the folder holds a run
    assert "--resume runs/digits-mlp-bp" in capsys.readouterr().err


def test_a_full_disk_is_told_with_what_is_kept(tmp_path: Path, monkeypatch, capsys):
    from ulr_kernels.jobs import checkpoint

    written = checkpoint.write_atomically

    def no_room_for_reports(path: Path, content: bytes) -> None:
        if path.name != CHECKPOINT:
            raise OSError(28, "No space left on device", str(path))
        written(path, content)

    monkeypatch.setattr(checkpoint, "write_atomically", no_room_for_reports)
    out = str(tmp_path / "run")
    assert ulr("train", "--data", "digits", "--method", "bp", "--epochs", "1", "--out", out) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert f"ulr train --resume {out}" in error
    monkeypatch.undo()
    assert ulr("train", "--resume", out) == 0  # nothing is trained again; the report is written


@pytest.mark.parametrize("method", ["ulr", "bp"])
def test_a_run_that_diverges_ends_with_its_last_epoch_kept(method: str, tmp_path: Path, capsys):
    out = tmp_path / "run"
    command = ["train", "--data", "digits", "--subset", "100", "--copies", "2", "--method", method, "--out", str(out)]
    assert ulr(*command, "--lr", "1e30") == 1
    error = capsys.readouterr().err
    assert "epoch 1: the loss is nan: try a smaller --lr" in error
    assert "--resume" not in error  # where the same would happen
    assert ulr_checkpoint_epochs(out) == 0 and [path.name for path in out.iterdir()] == ["checkpoint.safetensors"]


def test_interrupting_says_where_the_checkpoint_is(tmp_path: Path):
    command = [sys.executable, "-m", "ulr_kernels", "train", "--data", "digits", "--method", "bp", "--epochs", "100000"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may have had it ignored
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("epoch")
        os.kill(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert error.strip().startswith("ulr train: interrupted; finished epochs are kept in")
    assert "Traceback" not in error
    assert ulr_checkpoint_epochs(tmp_path / "run") >= 1


def ulr_checkpoint_epochs(folder: Path) -> int:
    from ulr_kernels.jobs import checkpoint

    return len(checkpoint.load(folder / CHECKPOINT)["history"])


def test_help_is_quick_to_ask_for(capsys):
    """Neither help nor an error waits for the packages that only training needs."""
    code = "import sys; from ulr_kernels import cli; sys.exit(any(m in sys.modules for m in %r))"
    heavy = ("matplotlib", "sklearn", "mlxtend", "safetensors", "PIL")
    assert subprocess.run([sys.executable, "-c", code % (heavy,)], check=False).returncode == 0
    assert ulr("train", "--help") == 0
    assert "--resume" in capsys.readouterr().out
