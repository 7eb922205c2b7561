"""`ulr doctor`: what can run here, and why the rest cannot."""

from __future__ import annotations

import argparse

HELP = "say which back end runs each operation, and why others are absent"


def add_options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(args: argparse.Namespace, argv: list[str]) -> None:
    from ulr_kernels import doctor

    print(doctor.describe())
