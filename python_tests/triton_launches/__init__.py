"""A launch of each Triton kernel in each form that compiles to other code: what the budgets are kept of.

A file for each family of ops, with `launches()`: the launches by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

FAMILIES = ("conv", "elementwise", "linear", "parameters", "perturbed", "steps")


def launches(family: str) -> dict[str, Callable]:
    return importlib.import_module(f"triton_launches.{family}").launches()
