"""The arguments of a command, as a record; every error is one line."""

from collections.abc import Sequence
from typing import TypeVar

from patchdiffusion.cli import flags
from patchdiffusion.cli.help import help_text

T = TypeVar("T")


def parse(default: T, arguments: Sequence[str], *, prog: str, description: str) -> T:
    """A record with what the flags give.

    Raises `ValueError` in one line that names the flag, the value and what is allowed, and
    `SystemExit(0)` after printing the help.
    """
    given = flags.read(arguments)
    wants_help = "help" in given
    given.pop("help", None)
    record = flags.choose(default, given)
    flags.check_known(record, given)
    record = flags.assign(record, given)
    if wants_help:
        print(help_text(record, prog, description))
        raise SystemExit(0)
    return record


def parse_some(default: T, arguments: Sequence[str]) -> T:
    """The same from those flags that the record has; all others are left for later."""
    given = flags.read(arguments)
    return flags.assign(flags.choose(default, given), given)


def take_first(arguments: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    """The first argument if it is not a flag, and all others."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return None, arguments
