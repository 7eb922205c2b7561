"""The log of a run: what it holds comes back bitwise, and a cut or a changed byte is an error, never a step."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import struct
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors", reason="the recipes need safetensors")

from ulr_kernels import dispatch, noise_contract, use_backend  # noqa: E402
from ulr_kernels.finetune import trajectory  # noqa: E402
from ulr_kernels.finetune.trajectory import Header, Writer, read  # noqa: E402
from ulr_kernels.jobs import JobError  # noqa: E402
from ulr_kernels.optim import Group, Rule, Update  # noqa: E402

STEPS = 4
RULES = {
    "sgd": Rule((("weight",), ("bias",))),
    "momentum": Rule((("weight",), ("bias",)), dist="rademacher", momentum=0.9),
    "adam": Rule((("weight",), ("bias",)), rank=2, betas=(0.9, 0.99)),
}


def update(step: int) -> Update:
    generator = torch.Generator().manual_seed(step)
    groups = (Group(0.1 / (step + 3), 0.01), Group(1 / (step + 7), 0.02, 0.1))
    return Update(step, noise_contract.fold_in(5, step), torch.randn(3, generator=generator), groups)


def base(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, 0.3, dtype=dtype) for name, shape in (("weight", (5, 70)), ("bias", (5,)))}


def header(rule: Rule) -> Header:
    return Header(rule, 3, trajectory.weights_digest(base()), {"name": "a run"})


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write(tmp_path / "log", RULES["sgd"])


def write(path: Path, rule: Rule) -> Path:
    writer = Writer.create(path, header(rule))
    for step in range(STEPS):
        writer.append(update(step), step / 8)
    writer.close()
    return path


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_what_was_written_is_read(tmp_path: Path, rule: Rule):
    found = read(write(tmp_path / "log", rule))
    assert found.header == header(rule)
    assert found.losses == [0.0, 0.125, 0.25, 0.375]
    for step, got in enumerate(found.updates):
        expected = update(step)
        assert (got.step, got.key, got.groups) == (step, expected.key, expected.groups)
        assert torch.equal(got.coefficients, expected.coefficients)


def test_a_step_of_one_probe_takes_few_bytes():
    assert Header(Rule((("weight",),)), 1, "", {}).record.size + 4 <= 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_replay_is_bitwise_the_run_on_any_back_end_and_thread_count(tmp_path: Path, rule: Rule, dtype: torch.dtype):
    expected, state = base(dtype), {}
    for step in range(STEPS):
        rule.apply(update(step), expected, state)
    found = read(write(tmp_path / "log", rule))
    before = torch.get_num_threads()
    able = [name for name in dispatch.ORDER["cpu"] if not isinstance(dispatch.find(name, "combine_", "cpu"), str)]
    for backend, threads in itertools.product(able, (1, 2)):
        torch.set_num_threads(threads)
        try:
            with use_backend(backend):
                got, got_state = base(dtype), {}
                found.replay(got, got_state)
        finally:
            torch.set_num_threads(before)
        for name, tensor in expected.items():
            assert torch.equal(got[name], tensor)
            assert all(torch.equal(got_state[name][kind], value) for kind, value in state[name].items())
        assert not torch.equal(got["weight"], base(dtype)["weight"])


def test_until_stops_early(log: Path):
    expected = base()
    for step in range(2):
        RULES["sgd"].apply(update(step), expected, {})
    for found, until in ((read(log), 2), (read(log, until=2), None)):
        got = base()
        found.replay(got, until=until)
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    for until in (-1, STEPS + 1):
        with pytest.raises(JobError, match=f"until must be between 0 and {STEPS}"):
            read(log, until=until)


def test_a_cut_at_any_byte_keeps_the_whole_steps_before_it(log: Path):
    content = log.read_bytes()
    start = len(content) - STEPS * (header(RULES["sgd"]).record.size + 4)
    size = (len(content) - start) // STEPS
    for length in range(len(content)):
        log.write_bytes(content[:length])
        if length < start:
            with pytest.raises(JobError, match="cut within its header"):
                read(log)
            continue
        whole, rest = divmod(length - start, size)
        found = read(log)
        assert (len(found.updates), found.rest) == (whole, rest)
        writer = Writer(log, read(log, torn=True))
        writer.append(update(whole), whole / 8)
        writer.close()
        assert log.read_bytes() == content[: start + (whole + 1) * size]


def test_a_changed_bit_anywhere_is_told(log: Path):
    content = log.read_bytes()
    for index in range(len(content)):
        log.write_bytes(content[:index] + bytes((content[index] ^ (1 << index % 8),)) + content[index + 1 :])
        with pytest.raises(JobError, match="damaged|cut within its header|not a trajectory"):
            read(log)


def test_steps_before_the_damage_can_be_rebuilt(log: Path):
    content = bytearray(log.read_bytes())
    size = header(RULES["sgd"]).record.size + 4
    content[-2 * size] ^= 1
    log.write_bytes(content)
    with pytest.raises(JobError, match="in the record of step 2: --until 2 rebuilds"):
        read(log)
    assert len(read(log, until=2).updates) == 2
    with pytest.raises(JobError, match="step 2"):  # only the last record can be a torn one
        read(log, torn=True)


def test_a_torn_last_record_is_run_again(log: Path):
    content = log.read_bytes()
    size = header(RULES["sgd"]).record.size + 4
    log.write_bytes(content[:-size] + bytes(size))
    writer = Writer(log, read(log, torn=True))
    writer.append(update(STEPS - 1), (STEPS - 1) / 8)
    writer.close()
    assert log.read_bytes() == content


def test_nothing_is_written_behind_a_record_that_failed(log: Path, monkeypatch: pytest.MonkeyPatch):
    content, write = log.read_bytes(), os.write
    size = header(RULES["sgd"]).record.size + 4

    def full(file: int, record: bytes) -> int:
        if len(record) < size:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, record[:7])

    log.write_bytes(content[:-size])
    with contextlib.closing(Writer(log, read(log))) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OSError, match="No space left"):
                writer.append(update(STEPS - 1), (STEPS - 1) / 8)
        with pytest.raises(OSError, match="read it again to go on"):  # there is room again
            writer.append(update(STEPS - 1), (STEPS - 1) / 8)
    assert log.read_bytes() == content[: 7 - size]
    with contextlib.closing(Writer(log, read(log))) as writer:
        writer.append(update(STEPS - 1), (STEPS - 1) / 8)
    assert log.read_bytes() == content


def test_records_that_moved_are_told(log: Path):
    content = log.read_bytes()
    size = header(RULES["sgd"]).record.size + 4
    first, second = content[-4 * size : -3 * size], content[-3 * size : -2 * size]
    rest = content[-2 * size :]
    start = content[: -4 * size]
    for moved in (second + first + rest, second + rest, first + first + second + rest):
        log.write_bytes(start + moved)
        with pytest.raises(JobError, match="damaged"):
            read(log)


@pytest.mark.parametrize("change", [{"contract": 2}, {"noise": "0" * 32}])
def test_another_noise_is_refused(tmp_path: Path, change: dict):
    (tmp_path / "log").write_bytes(dataclasses.replace(header(RULES["sgd"]), **change).encode())
    with pytest.raises(JobError, match="its noise is another one"):
        read(tmp_path / "log")


def test_other_files_are_refused(tmp_path: Path):
    for content in (b"PK\x03\x04 a pickle in a zip", struct.pack("<Q", 8) + b"{}      "):
        (tmp_path / "log").write_bytes(content)
        with pytest.raises(JobError, match="not a trajectory"):
            read(tmp_path / "log")
    with pytest.raises(JobError, match="cannot be read"):
        read(tmp_path / "none")


def test_one_process_writes_at_a_time(log: Path):
    found = read(log)
    writer = Writer(log, found)
    with pytest.raises(JobError, match="another process writes to it"):
        Writer(log, found)
    writer.append(update(STEPS), 0.0)
    writer.close()
    with pytest.raises(JobError, match="another process writes to it"):  # it has: what was read is old
        Writer(log, found)
    assert len(read(log).updates) == STEPS + 1
