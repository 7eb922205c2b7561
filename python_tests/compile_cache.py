"""A cache of compiled files, by content: for all tests, processes, runs and clones of one user.

A file is known by its command, its compiler's version, its source and all that the source includes. The files lie in
`$XDG_CACHE_HOME/ulr_kernels`, by default `~/.cache/ulr_kernels`; those that nobody used for a month are deleted.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import pathlib
import re
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence

ROOT = pathlib.Path(__file__).parents[1]
FOLDER = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "ulr_kernels"
MONTH = 30 * 24 * 3600
COMMENT = re.compile(rb"[ \t]*//[^\n]*")


class CompileError(RuntimeError):
    """A compiler failed; the message is its output."""


@functools.cache
def _version(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout


def with_includes(source: pathlib.Path, folders: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """A file and all that it includes, directly or not, from its own folder or from one of these."""
    found: dict[pathlib.Path, None] = {}
    pending = [source]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found[path] = None
        for name in re.findall(r'^\s*#\s*include\s+["<]([^">]+)[">]', path.read_text(), re.MULTILINE):
            pending += [f / name for f in (path.parent, *folders) if (f / name).is_file()][:1]
    return sorted(found)


def _digest(command: Sequence[str], inputs: Iterable[pathlib.Path]) -> str:
    """Paths enter relative to the project, so that clones share what they compile. Comments do not enter."""
    state = hashlib.sha256(_version(command[0]))
    state.update("\0".join(command).replace(str(ROOT), "").encode())
    for path in inputs:
        state.update(hashlib.sha256(COMMENT.sub(b"", path.read_bytes())).digest())
    return state.hexdigest()[:24]


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed, also by a process that is killed
        yield


def compile_once(name: str, command: Sequence[str], inputs: Iterable[pathlib.Path]) -> tuple[pathlib.Path, str]:
    """The file that `command` writes to the path in place of "OUT", and what it prints to stderr.

    Raises:
        CompileError: the command fails; nothing is kept.
    """
    stem, suffix = name.rsplit(".", 1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    made = FOLDER / f"{stem}-{_digest(command, inputs)}.{suffix}"
    log = made.with_name(made.name + ".log")
    with _locked(made.with_name(made.name + ".lock")):
        if not log.exists():  # it is written last
            partial = made.with_name(f"partial-{made.name}")
            arguments = [str(partial) if word == "OUT" else word for word in command]
            done = subprocess.run(arguments, capture_output=True, text=True)
            if done.returncode:
                raise CompileError(f"{name}:\n{done.stderr}")
            partial.replace(made)
            log.write_text(done.stderr)
            _delete_unused()
    for path in (made, log):
        path.touch()
    return made, log.read_text()


def _delete_unused() -> None:
    for path in FOLDER.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process deletes as well
            if time.time() - path.stat().st_mtime > MONTH:
                path.unlink()
