"""`ulr finetune` under torchrun: ranks share a run that is bitwise that of one process, and survive one another."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="the recipes need safetensors")
for package in ("transformers", "peft"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"fine-tuning needs {package}", allow_module_level=True)
if not torch.distributed.is_available():
    pytest.skip("torch has no torch.distributed", allow_module_level=True)
import finetune_ranks_run  # noqa: E402
from finetune_ranks_run import SHARED, settings  # noqa: E402
from small_language_models import sentences, write_causal, write_encoder, write_tsv  # noqa: E402

from ulr_kernels import cli  # noqa: E402
from ulr_kernels.finetune import report, runs, trajectory  # noqa: E402

LONG = ["--tune", "all", "--optimizer", "adam", "--steps", 150, "--batch", 8, "--micro-batches", 2, "--evaluations", 3]
LONG += ["--max-tokens", 32, "--threads", 1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `encoder`, `causal` and `set`, whose features are made in several batches."""
    folder = tmp_path_factory.mktemp("files")
    write_encoder(folder / "encoder")
    write_causal(folder / "causal")
    (folder / "set").mkdir()
    for seed, (part, count) in enumerate((("train", 150), ("dev", 20), ("test", 70))):
        write_tsv(folder / "set" / f"{part}.tsv", sentences(count, seed))
    return folder


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch(*command: object, ranks: int = 2) -> list[subprocess.Popen]:
    """Start Python on so many ranks, with the variables that torchrun sets."""
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    typed = [sys.executable, *map(str, command)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(typed, env=shared | {"RANK": str(rank)}, **pipes) for rank in range(ranks)]


def ulr(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def steps_of(folder: Path) -> int:
    log = folder / runs.LOG
    return len(trajectory.read(log).updates) if log.exists() else 0


def contents(folder: Path) -> tuple[bytes, bytes]:
    return (folder / runs.LOG).read_bytes(), (folder / report.WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def done(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The runs of two ranks in one launch, and what each rank has said in its errors."""
    out = tmp_path_factory.mktemp("ranks")
    started = launch(finetune_ranks_run.__file__, files, out)
    said = [process.communicate(timeout=120) for process in started]
    for process, (_, errors) in zip(started, said, strict=True):
        assert process.returncode == 0, errors
    assert "step 6/6" in said[0][0] and said[1][0] == ""
    return out, [errors for _, errors in said]


@pytest.mark.parametrize("case", SHARED)
def test_two_ranks_are_bitwise_one_process(case: str, done, files: Path, tmp_path: Path):
    shared, (model, options, losses) = done[0] / case, SHARED[case]
    runs.start(settings(files, model, options), tmp_path, "")
    assert contents(shared) == contents(tmp_path)
    assert {path.name for path in shared.iterdir()} == {path.name for path in tmp_path.iterdir()}
    mine, other = (json.loads((folder / report.REPORT).read_text()) for folder in (shared, tmp_path))
    for a, b in zip(mine["evaluations"], other["evaluations"], strict=True):
        for name in ("step", "met", "train_loss", "dev_loss", "dev_accuracy"):
            assert a[name] == b[name]
    assert (mine["test_loss"], mine["test_accuracy"]) == (other["test_loss"], other["test_accuracy"])
    size = 8 if options["method"] == "eggroll" else 4
    assert (mine["ranks"], mine["bytes_sent_per_step"]) == (2, 16 + size * losses)  # scalars alone
    assert (other["ranks"], other["bytes_sent_per_step"]) == (1, 0)


def test_ranks_that_would_be_idle_or_differ_are_refused(done):
    for rank, errors in enumerate(done[1]):
        assert "a step has too few parts for 2 ranks (micro-batches: 1, forwards of each: 1): start fewer" in errors
        assert f"all ranks must have the same --lr, got {(0.1, 0.2)[rank]} on rank {rank} and another" in errors
    assert not (done[0] / "idle").exists()


def stop(process: subprocess.Popen, signal_: signal.Signals, folder: Path) -> float:
    """Send a signal once the run is some steps further; when that was."""
    before = steps_of(folder)
    while steps_of(folder) < before + 3:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal_)
    return time.monotonic()


def test_a_rank_that_dies_or_hangs_is_an_error_in_time_and_the_run_goes_on(files: Path, tmp_path: Path):
    options = ["--data", files / "set", "--model", files / "encoder", *LONG]
    whole, shared, alone = tmp_path / "whole", tmp_path / "shared", tmp_path / "alone"
    assert ulr("finetune", *options, "--out", whole) == 0
    command = ("-m", "ulr_kernels", "finetune", "--timeout", 15)  # ranks start apart where a machine is busy
    for way, lost, arguments in (
        (signal.SIGKILL, 1, (*options, "--out", shared)),
        (signal.SIGSTOP, 0, ("--resume", shared)),
    ):
        started = launch(*command, *arguments)
        left = started[1 - lost]
        try:
            when = stop(started[lost], way, shared)
            _, errors = left.communicate(timeout=60)
            assert time.monotonic() - when < 30
        finally:
            for process in started:
                process.kill()
                process.wait()
        assert left.returncode == 1
        assert f"rank {1 - lost} of 2 did not hear from the others at step" in errors
        assert f"finished steps are kept in {shared / runs.LOG}: continue with ulr finetune --resume {shared}" in errors
        assert errors.count("\n") == 1
    assert 6 <= steps_of(shared) < 150
    shutil.copytree(shared, alone)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [*torchrun, "-m", "ulr_kernels", "finetune", "--resume", str(shared)],
        env=environment,
        check=True,
        timeout=120,
        capture_output=True,
    )
    assert ulr("finetune", "--resume", alone) == 0
    assert contents(shared) == contents(alone) == contents(whole)
    evaluations = json.loads((alone / report.REPORT).read_text())["evaluations"]
    assert (evaluations[0]["ranks"], evaluations[-1]["ranks"]) == (2, 1)


def test_ranks_that_cannot_meet_are_told_so(files: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    arguments = ["finetune", "--data", files / "set", "--out", tmp_path / "run", "--timeout", 1]
    assert ulr(*arguments) == 2
    assert "2 ranks cannot meet: " in capsys.readouterr().err
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", free_port())
    assert ulr(*arguments) == 1
    printed = capsys.readouterr().err
    assert "rank 0 of 2 did not meet the others in 1 s" in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "run").exists()
