"""Errors that say which argument breaks which rule."""

from __future__ import annotations

from typing import NoReturn


class RuleError(ValueError):
    """A model, a batch, a loss or a setting breaks a rule of this library (an error of torch's own is none)."""


def fail(
    argument: str, rule: str, value: object, owner: str = "ulr.ULR", cause: BaseException | None = None
) -> NoReturn:
    """Raise `RuleError`: "OWNER: 'ARGUMENT' must RULE, got VALUE"; `cause`: the error of torch's that it explains."""
    error = RuleError(f"{owner}: '{argument}' must {rule}, got {value}")
    if cause is not None:
        error.__cause__ = cause
    raise error
