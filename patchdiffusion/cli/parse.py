"""Flags from dataclasses with tyro; every error is one line."""

import contextlib
import io
import itertools
import os
import re
from collections.abc import Collection, Sequence
from typing import TypeVar

import tyro

T = TypeVar("T")
_CONFIG = (tyro.conf.AvoidSubcommands,)  # the flags of a union are those of its default's type


def parse(cls: type[T], arguments: Sequence[str], *, default: T, prog: str, description: str) -> T:
    """An instance of a dataclass with fields changed by flags.

    Raises `ValueError` in one line for unknown flags and impossible values, and `SystemExit(0)`
    after printing the help.
    """
    with _one_line_errors(arguments):
        return tyro.cli(
            cls,
            args=list(arguments),
            default=default,
            prog=prog,
            description=description,
            config=_CONFIG,
        )


def parse_some(cls: type[T], arguments: Sequence[str], *, default: T) -> T:
    """The same from those flags that the class knows; all others are left for later."""
    quiet = [a for a in arguments if a not in ("-h", "--help")]
    with _one_line_errors(quiet):
        value, _ = tyro.cli(
            cls, args=quiet, default=default, return_unknown_args=True, config=_CONFIG
        )
    return value


def take_word(
    arguments: Sequence[str], flag: str, words: Collection[str]
) -> tuple[str | None, list[str]]:
    """What a flag that chooses between types of a field says, if it is given, and all others.

    Given twice, the last one counts. Raises `ValueError` unless it is one of the words.
    """
    chosen, rest, left = None, [], iter(arguments)
    for argument in left:
        name, joined, value = argument.partition("=")
        if name != flag:
            rest.append(argument)
            continue
        chosen = value if joined else next(left, "nothing")
        if chosen not in words:
            raise ValueError(f"{flag} must be one of {', '.join(words)}, not {chosen!r}")
    return chosen, rest


def take_first(arguments: Sequence[str]) -> tuple[str | None, Sequence[str]]:
    """The first argument if it is not a flag, and all others."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    return None, arguments


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether the help is asked for."""
    return any(a in ("-h", "--help") for a in arguments)


@contextlib.contextmanager
def _one_line_errors(arguments: Sequence[str]):
    # Wide, so that messages are not folded in the middle of a word.
    caught, columns = io.StringIO(), os.environ.get("COLUMNS")
    if not wants_help(arguments):
        os.environ["COLUMNS"] = "2000"
    try:
        with contextlib.redirect_stderr(caught):
            yield
    except SystemExit as end:
        if end.code == 0:
            raise
        raise ValueError(_first_paragraph(caught.getvalue())) from None
    finally:
        if not wants_help(arguments):
            os.environ.pop("COLUMNS", None)
            if columns is not None:
                os.environ["COLUMNS"] = columns


def _first_paragraph(box: str) -> str:
    """What stands in a box of tyro's, drawn in Unicode or ASCII, above its first inner rule."""
    rows = [line.strip().strip("\u2502").strip() for line in box.strip().splitlines()]
    body = rows[1:] if box.lstrip().startswith("\u256d") else rows[2:]  # without the title
    lines = itertools.takewhile(lambda row: row and set(row) - set("-\u2500\u2570\u256f"), body)
    text = " ".join(lines) or "the arguments could not be understood"
    return re.sub(r"^Error parsing (config\.|run: |config: |\w+Arguments: )?", "", text)
