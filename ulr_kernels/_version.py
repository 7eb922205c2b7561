"""The version, in one place: setup.py builds it into the libraries, and the package refuses those of another one."""

from __future__ import annotations

__version__ = "0.1.0"
OLDEST_TORCH = (2, 9)  # pyproject.toml has it too


def old_torch(version: str) -> str | None:
    """The sentence about a version of torch that is too old, or None."""
    if tuple(int(part) for part in version.split(".")[:2]) >= OLDEST_TORCH:
        return None
    oldest = ".".join(map(str, OLDEST_TORCH))
    return f"ulr_kernels {__version__} needs torch {oldest} or newer, this is torch {version}"
