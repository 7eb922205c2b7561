"""Settings of a job: dataclasses whose fields carry their text, their rule, and how the command line shows them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ulr_kernels.jobs import JobError
from ulr_kernels.jobs.rules import Rule, one_of


def setting(
    text: str,
    default: Any = dataclasses.MISSING,
    *,
    rule: Rule | None = None,
    choices: Sequence[str] = (),
    group: str = "",
    **options: Any,
) -> Any:
    """A field of a settings class.

    Args:
        text: what it is, for `--help`.
        default: its value where none is given.
        rule: what its value must keep.
        choices: the words that it may be.
        group: begins a titled group of options, for `--help`.
        options: further ones of `argparse.ArgumentParser.add_argument`.
    """
    if choices:
        rule, options["choices"] = one_of(choices), choices
    return dataclasses.field(default=default, metadata={"text": text, "rule": rule, "group": group, "options": options})


def check(settings: Any) -> None:
    """Hold every field to its rule.

    Raises:
        JobError: a value breaks one; the message names the option as the user types it.
    """
    for field in dataclasses.fields(settings):
        rule, value = field.metadata["rule"], getattr(settings, field.name)
        if rule is not None and (broken := rule(value)):
            shown = f"'{value}'" if isinstance(value, str) else value
            raise JobError(f"{field.name.replace('_', '-')} must {broken}, got {shown}")
