"""The command line: parse, load the settings, hand over, and say in one line what went wrong."""

import argparse
import contextlib
import errno
import logging
import os
import sys
import textwrap
import traceback
from pathlib import Path
from typing import NoReturn

from dist_train.commands import COMMANDS
from dist_train.config_help import describe_settings
from dist_train.errors import DistTrainError, StorageError, UserError, one_line
from dist_train.worker import end_with_launcher

# Full, over quota, read-only, broken: whoever wrote, the remedy is the user's.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status; what goes wrong for a user is one line on standard error."""
    if "RANK" not in os.environ:
        return _run(arguments, rank=0, is_alone=True)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_launcher()
    try:
        status = _run(arguments, rank=int(os.environ["RANK"]), is_alone=False)
    except Exception:
        traceback.print_exc()
        status = 1
    if status:
        _end_at_once(status)
    return status


def _end_at_once(status: int) -> NoReturn:
    """End a process that others were started beside, without the interpreter's own end.

    After an error, what it was in still refers to the process group, and so keeps gloo's threads. They take the
    interpreter's lock to forget the last reduction; an interpreter that is ending denies it, and the process aborts.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def _run(arguments: list[str] | None, rank: int, is_alone: bool) -> int:
    logging.addLevelName(logging.WARNING, "warning")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING if rank == 0 else logging.ERROR)
    try:
        options, overrides = _parser().parse_known_args(arguments)
        loaded = options.load(options.config, overrides)
    except UserError as error:
        if rank == 0:  # every process reads the same settings and finds the same mistakes
            _complain(str(error))
        return error.exit_status
    try:
        return options.run(loaded, **{name: getattr(options, name) for name in options.names}) or 0
    except DistTrainError as error:
        if error.said_by in (None, rank):
            _complain(f"{error}" + ("" if is_alone else f" (rank {rank})"))
        return error.exit_status
    except BrokenPipeError:  # whoever read what was printed has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        _complain(one_line(f"{error}; free space or choose another place, the same command then goes on"))
        return StorageError.exit_status
    except KeyboardInterrupt:
        _complain("interrupted; the same command goes on from what it has saved, if anything")
        return 130


def _complain(what: str) -> None:
    with contextlib.suppress(OSError):  # nobody is there any more to read it
        print(f"error: {what}", file=sys.stderr, flush=True)


# ---- parsing ---------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other mistake is reported."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="dist-train",
        description="Distributed training of GPT-style language models. How many last positions of a sequence the "
        "loss sees is one setting: loss.last_k, from 1 (final-token training) to all.",
        epilog="dist-train COMMAND --help explains a command and lists every setting.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=command.run.__doc__,
            description=f"{name}: {command.run.__doc__}.",
            epilog=_settings_help() if command.metavar == "CONFIG" else command.notes,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            usage=f"dist-train {name} {command.usage}" + " [--section.key=value ...]" * (command.metavar == "CONFIG"),
            allow_abbrev=False,
        )
        names = [added.add_argument(option, **known).dest for option, known in command.options.items()]
        added.add_argument("config", type=Path, metavar=command.metavar, help=command.config_help)
        added.set_defaults(run=command.run, load=command.load, names=names)
    return parser


def _settings_help() -> str:
    lines = ["settings, each with its default, as --section.key=value:"]
    for key, default, meaning in describe_settings():
        lines += [
            f"  --{key}={default}",
            textwrap.fill(meaning, 100, initial_indent=" " * 6, subsequent_indent=" " * 6),
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
