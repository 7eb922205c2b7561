"""setup.py as a module, for the tests of its functions."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from types import ModuleType


def load() -> ModuleType:
    """A new module each time, so that a test may change its constants."""
    spec = importlib.util.spec_from_file_location("ulr_setup", pathlib.Path(__file__).parents[1] / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ulr_setup"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module
