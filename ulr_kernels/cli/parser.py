"""Options that commands share: errors of one line, fields of a settings class, the folder of a run."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, NoReturn

from ulr_kernels.jobs import JobError


class Parser(argparse.ArgumentParser):
    """Options that are not given leave no trace, so that the settings alone know the defaults; errors are one line."""

    def __init__(self, **options) -> None:
        super().__init__(argument_default=argparse.SUPPRESS, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def add_settings(parser: argparse.ArgumentParser, settings: Any) -> argparse._ArgumentGroup:
    """Options for the fields of a settings class, with defaults shown, in their groups; the last group."""
    group = parser.add_argument_group()
    for field in dataclasses.fields(settings):
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        options, default = dict(field.metadata["options"]), field.default
        shown = "" if default is dataclasses.MISSING or default == "" else f" (default {default})"
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif "choices" not in options and isinstance(default, int | float):
            options.setdefault("type", type(default))
        if "type" in options:
            options.setdefault("metavar", "X" if options["type"] is float else "N")
        group.add_argument(f"--{field.name.replace('_', '-')}", help=field.metadata["text"] + shown, **options)
    return group


def add_run_folder(group: argparse._ArgumentGroup, default: str) -> None:
    """The options of where a run is written and how it goes on."""
    group.add_argument("--out", type=Path, metavar="DIR", help=f"the report's folder (default {default})")
    group.add_argument("--overwrite", action="store_true", help="replace the run that is in the folder")
    group.add_argument("--resume", type=Path, metavar="DIR", help="continue the run in this folder, with its settings")


def given_settings(args: argparse.Namespace, settings: Any) -> dict[str, Any]:
    """The fields of a settings class that were given.

    Raises:
        JobError: some were, beside --resume.
    """
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(settings) if field.name in args}
    if "resume" in args:
        extra = [name for name in (*given, "out", "overwrite") if name in args]
        if extra:
            raise JobError(f"--resume continues with the run's own settings: drop --{extra[0].replace('_', '-')}")
    return given


def kept_in(args: argparse.Namespace, file: str, what: str, command: str) -> tuple[str, str]:
    """For a run that ended early: where what it has done is, and how it goes on; empty where there is nothing."""
    folder = getattr(args, "resume", None) or getattr(args, "out", None)
    if folder is None or not (folder / file).exists():
        return "", ""
    return f"; {what} are kept in {folder / file}", f": continue with ulr {command} --resume {folder}"
