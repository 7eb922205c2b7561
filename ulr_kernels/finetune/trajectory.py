"""The trajectory of a run: a log of each step's key and coefficients, from which base weights become tuned ones again.

A file is a header and one record for each step, all little-endian:

    magic     the text `ulr-trajectory-1` and a line feed
    header    uint32 size, uint32 CRC-32, then that many bytes of JSON (`Header`)
    record    uint32 step, int64 key, float32 coefficients[draws], float64 (lr, sigma, weight decay)[groups] (where
              the rule has momentum or Adam's betas, also the group's momentum or first beta; NaN: the rule's),
              float32 loss, [still,] uint32 CRC-32 of the record, continued from the CRC of what precedes it
    still     where bit 31 of the step is set: a bit for each parameter, lowest first, set for those that stayed as
              they were; whole bytes

A file that was cut holds the steps before the cut. A changed byte is an error; the chain of CRCs also shows records
that were removed, repeated or exchanged.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ulr_kernels import noise_contract, noise_tables
from ulr_kernels.jobs import JobError
from ulr_kernels.jobs.checkpoint import write_atomically
from ulr_kernels.optim import Group, Rule, Update

MAGIC = b"ulr-trajectory-1\n"
_SIZES = struct.Struct("<II")
_CRC = _STEP = struct.Struct("<I")
_STILL = 1 << 31  # set in the step of a record that names parameters which stayed as they were
State = MutableMapping[str, MutableMapping[str, Tensor]]


def noise_digest() -> str:
    """Hash of the tables that noise is made with: logs of one digest and one contract mean the same noise."""
    content = repr((noise_tables.DEGREE, noise_tables.NORMAL, noise_tables.LAPLACE))
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def weights_digest(parameters: Mapping[str, Tensor]) -> str:
    """Hash of parameters: their names, dtypes, shapes and bits."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(parameters):
        tensor = parameters[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Header:
    """The parts that all steps share."""

    rule: Rule  # how updates change the weights
    draws: int  # coefficients in a step
    weights: str  # `weights_digest` of the model that the run began with
    settings: dict[str, Any]  # of the run, as JSON can hold them; the trajectory itself does not read them
    contract: int = noise_contract.CONTRACT_VERSION  # version of the noise contract
    noise: str = dataclasses.field(default_factory=noise_digest)  # `noise_digest` of the program that wrote the log

    def encode(self) -> bytes:
        content = json.dumps(dataclasses.asdict(self)).encode()
        return MAGIC + _SIZES.pack(len(content), zlib.crc32(content)) + content

    @property
    def record(self) -> struct.Struct:
        """The form of a record, less its CRC."""
        return struct.Struct(f"<Iq{self.draws}f{self.numbers * len(self.rule.names)}df")

    @property
    def numbers(self) -> int:
        """The numbers of a group in a record."""
        return 4 if self.rule.state_names() else 3

    @property
    def parameters(self) -> list[str]:
        """The names of the parameters, in the order of their bits in a record."""
        return [name for names in self.rule.names for name in names]


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """The steps of a log."""

    header: Header  # what they share
    updates: list[Update]  # one for each step, coefficients on the CPU
    losses: list[float]  # what the run saw in each step
    size: int  # bytes of the file up to the end of the last whole record
    rest: int  # bytes after it, of a step that was being written when the file was cut
    crc: int  # what the CRC of the next record continues from

    def replay(self, parameters: Mapping[str, Tensor], state: State | None = None, until: int | None = None) -> None:
        """Change base weights into those after `until` steps, by default all: bitwise on every back end and device.

        Args:
            parameters: of the model, by name, as at the start of the run; a model whose digest differs gives garbage.
            state: of the rule, filled as the run would have: a run can go on from there.
            until: number of steps.

        Raises:
            ValueError: `parameters` lack one that the run changes; nothing has been written.
        """
        state = {} if state is None else state
        for update in self.updates[:until]:
            self.header.rule.apply(update, parameters, state)


def read(path: Path, until: int | None = None, torn: bool = False) -> Trajectory:
    """Read a log.

    Args:
        path: the file.
        until: steps to read; by default all. Damage after them is not looked for.
        torn: forget a damaged last record too: a power cut can leave one of full length, and its step can be run again.

    Raises:
        JobError: no such file, another form or contract, a cut within the header, a damaged record, or a log of less
            than `until` steps.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror}") from error
    header, start, crc = _read_header(path, content)
    form, names = header.record, header.parameters
    ends = _ends(content, start, header)
    whole, rest = len(ends), len(content) - (ends[-1] if ends else start)
    if until is not None and not 0 <= until <= whole:
        raise JobError(f"{path}: until must be between 0 and {whole}, the steps in the log, got {until}")
    updates: list[Update] = []
    losses: list[float] = []
    offset = start
    for step, end in enumerate(ends[:until]):
        body = content[offset : end - _CRC.size]
        expected = zlib.crc32(body, crc)
        number, key, *values = form.unpack_from(body)
        if (expected,) != _CRC.unpack_from(content, end - _CRC.size) or number & ~_STILL != step:
            if torn and step == whole - 1:
                return Trajectory(header, updates, losses, offset, len(content) - offset, crc)
            kept = f": --until {step} rebuilds what precedes it" if step else ""
            raise JobError(f"{path}: damaged at byte {offset}, in the record of step {step}{kept}")
        crc = expected
        numbers = iter(values[header.draws : -1])
        groups = tuple(_group(*group) for group in zip(*[numbers] * header.numbers, strict=True))
        mask = int.from_bytes(body[form.size :], "little")
        still = tuple(name for place, name in enumerate(names) if mask >> place & 1)
        updates.append(Update(step, key, torch.tensor(values[: header.draws], dtype=torch.float32), groups, still))
        losses.append(values[-1])
        offset = end
    return Trajectory(header, updates, losses, offset, rest, crc)


def _group(lr: float, sigma: float, weight_decay: float, momentum: float = math.nan) -> Group:
    return Group(lr, sigma, weight_decay, None if math.isnan(momentum) else momentum)


def _ends(content: bytes, start: int, header: Header) -> list[int]:
    """Where the whole records of a log end."""
    ends, size = [], header.record.size + _CRC.size
    while start + size <= len(content):
        still = _STEP.unpack_from(content, start)[0] & _STILL
        start += size + (-(-len(header.parameters) // 8) if still else 0)
        if start <= len(content):
            ends.append(start)
    return ends


def _read_header(path: Path, content: bytes) -> tuple[Header, int, int]:
    """The header, where the records start, and the CRC that theirs continue from."""
    if not content.startswith(MAGIC):
        if MAGIC.startswith(content):
            raise JobError(f"{path}: cut within its header: no step can be read")
        raise JobError(f"{path}: not a trajectory: it does not begin with {MAGIC.decode().strip()}")
    start = len(MAGIC) + _SIZES.size
    length, crc = _SIZES.unpack_from(content, len(MAGIC)) if len(content) >= start else (len(content), 0)
    text = content[start : start + length]
    if zlib.crc32(text) != crc or len(text) < length:
        cut = len(content) < start + length
        raise JobError(f"{path}: {'cut within' if cut else 'damaged in'} its header: no step can be read")
    fields = json.loads(text)
    for name, mine in (("contract", noise_contract.CONTRACT_VERSION), ("noise", noise_digest())):
        if fields[name] != mine:
            raise JobError(f"{path}: its noise is another one: {name} must be {mine}, got {fields[name]}")
    return Header(**(fields | {"rule": Rule.of_fields(fields["rule"])})), start + length, crc


class Writer:
    """A log that grows, open for one process at a time. Each step is on the disk when `append` returns.

    Args:
        path: a log.
        trajectory: what `read` said of it; the file is cut to its whole records.

    Raises:
        JobError: another process writes to it.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, trajectory: Trajectory) -> None:
        self._form, self._crc = trajectory.header.record, trajectory.crc
        self._numbers, self._parameters = trajectory.header.numbers, trajectory.header.parameters
        self._whole = True  # the file ends with a whole record
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._file).st_size != trajectory.size + trajectory.rest:
                raise BlockingIOError  # it has grown since it was read
            if trajectory.rest:
                os.ftruncate(self._file, trajectory.size)
                os.fsync(self._file)
        except BlockingIOError:
            self.close()
            raise JobError(f"{path}: another process writes to it") from None
        except OSError:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path, header: Header) -> Writer:
        """A new log, in the place of one that may be there."""
        write_atomically(path, header.encode())
        return cls(path, read(path))

    def append(self, update: Update, loss: float) -> None:
        """Add a step.

        Raises:
            OSError: it could not be written whole; those before it are. Nor is any later one: what follows part of a
                record could not be read. A new writer, of what `read` says then, cuts the part off.
        """
        if not self._whole:
            raise OSError("the log may end within a record, which could not be written: read it again to go on")
        numbers = []
        for group in update.groups:
            numbers += [group.lr, group.sigma, group.weight_decay]
            if self._numbers == 4:
                numbers.append(math.nan if group.momentum is None else group.momentum)
        step = update.step | (_STILL if update.still else 0)
        body = self._form.pack(step, update.key, *update.coefficients.tolist(), *numbers, loss)
        if update.still:
            still = set(update.still)
            mask = sum(1 << place for place, name in enumerate(self._parameters) if name in still)
            body += mask.to_bytes(-(-len(self._parameters) // 8), "little")
        crc = zlib.crc32(body, self._crc)
        record = body + _CRC.pack(crc)
        self._whole = False
        while record:
            record = record[os.write(self._file, record) :]
        os.fsync(self._file)
        self._whole, self._crc = True, crc

    def close(self) -> None:
        os.close(self._file)
