"""Checkpoints: a tree of dicts, lists, numbers and tensors in one safetensors file, written whole or not at all.

Tensors are stored as such; all else is JSON in the file's header. Nothing is ever unpickled, so that a checkpoint from
a stranger can do no harm.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ulr_kernels.jobs import JobError

FORMAT = "ulr-checkpoint-1"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at any moment `path` holds either its old content or all of the new, on the disk.

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name is only durable once the folder is
    finally:
        os.close(folder)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state`, a tree of dict, list, tuple, str, int, float, bool, None and tensors.

    Raises:
        OSError: as `write_atomically`.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_encode(state, tensors))
    metadata = {"format": FORMAT, "state": tree, "digest": _digest(tree, tensors)}
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, tensors on the CPU.

    Raises:
        JobError: there is no such file, or it is damaged, or it is something else.
    """
    metadata, tensors = read(path, "a checkpoint")
    if metadata.get("format") != FORMAT:
        raise JobError(f"{path}: must be a checkpoint of form {FORMAT}, got {metadata.get('format')}")
    if metadata.get("digest") != _digest(metadata.get("state", ""), tensors):
        raise JobError(f"{path}: damaged: its content does not match its digest")
    return _decode(json.loads(metadata["state"]), tensors)


def read(path: Path, kind: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors, on the CPU, of a safetensors file.

    Raises:
        JobError: there is no such file, or it is damaged, or something else: it is no file of this kind.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError as error:
        raise JobError(f"{path}: cannot be read as {kind}: no such file") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise JobError(f"{path}: cannot be read as {kind}: {error}") from error


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON that keeps what JSON alone would lose: integer keys, tuples, and where each tensor belongs."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_encode(item, tensors) for item in value]}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"ulr_kernels.recipes.checkpoint: cannot store a {type(value).__name__}")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _digest(tree: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(tree.encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(safetensors.torch.save({name: tensors[name]}))
    return digest.hexdigest()
