"""The versions that a report names."""

from __future__ import annotations

import platform

import torch


def versions() -> dict[str, str]:
    """For a report: Python, torch and the machine."""
    return {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.platform()}
