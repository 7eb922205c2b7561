"""The command line: `ulr train | finetune | replay | demo | bench | doctor`, also `python -m ulr_kernels`.

One file for each command.

Exit codes: 0 done, 1 failed on the way, 2 the command cannot be done (nothing written), 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ulr_kernels.cli import bench, demo, doctor, finetune, replay, train
from ulr_kernels.cli.parser import Parser
from ulr_kernels.jobs import JobError
from ulr_kernels.optim import WorkerError

_COMMANDS = {"train": train, "finetune": finetune, "replay": replay, "demo": demo, "bench": bench, "doctor": doctor}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own; the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(prog="ulr", description="Training without a backward pass.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        own = commands.add_parser(name, help=command.HELP)
        command.add_options(own)
        own.set_defaults(run=command.run, what_is_kept=getattr(command, "what_is_kept", lambda args: ("", "")))
    args = parser.parse_args(argv)
    prog = f"{parser.prog} {args.command}"
    try:
        args.run(args, argv)
    except JobError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except (OSError, WorkerError) as error:
        print(f"{prog}: error: {error}{''.join(args.what_is_kept(args))}", file=sys.stderr)
        return 1
    except FloatingPointError as error:  # to which the run would come again, if it went on
        print(f"{prog}: error: {error}{args.what_is_kept(args)[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{prog}: interrupted{''.join(args.what_is_kept(args))}", file=sys.stderr)
        return 130
    return 0
