"""Parse the arguments of a command into a record; every error is one line."""

import sys
from collections.abc import Sequence
from dataclasses import Field, fields, replace
from typing import Any, TypeVar, get_origin, get_type_hints

from patchdiffusion.cli import HelpShown, flags
from patchdiffusion.cli.help import docs, help_text
from patchdiffusion.cli.hints import unknown_flag
from patchdiffusion.cli.places import runs_here
from patchdiffusion.cli.renamed import notes, present
from patchdiffusion.cli.values import convert

T = TypeVar("T")


def parse(default: T, arguments: Sequence[str], command: str, note: str = "") -> T:
    """Record `default` changed by the arguments of a command; `note` is for its help.

    Raises `ValueError` in one line that names the flag, the value and what is allowed, and
    `HelpShown` after printing the help.
    """
    words, flag_words = flags.read(arguments)
    help_words = flag_words.pop("help", None)
    for line in notes(flag_words):
        print(line, file=sys.stderr)
    flag_words = flags.shortened(
        default, present(flag_words, set(flags.names(flags.walk(default))))
    )
    record = flags.choose(default, flag_words)
    _check_known(record, flag_words, command)
    record = flags.assign(record, flag_words)
    if help_words is not None:
        print(help_text(record, usage(record, command), help_words, note))
        raise HelpShown
    return _set_positionals(record, words, command)


def _check_known(record: Any, flag_words: flags.FlagWords, command: str) -> None:
    """Raise `ValueError` for a flag of no field, with the nearest flags."""
    known = set(flags.names(flags.walk(record)))
    for name in flag_words:
        if name not in known:
            raise ValueError(unknown_flag(record, name, flag_words[name], command))


def parse_some(default: T, arguments: Sequence[str]) -> T:
    """Record `default` changed by those flags that it has; other arguments are ignored."""
    _, flag_words = flags.read(arguments)
    flag_words = flags.shortened(
        default, present(flag_words, set(flags.names(flags.walk(default))))
    )
    return flags.assign(flags.choose(default, flag_words), flag_words)


def usage(record: Any, command: str) -> str:
    """Usage line of a command."""
    names = [f.metadata["positional"] for f in _positionals(record)]
    return " ".join(["patchdiffusion", command, *names])


def _positionals(record: Any) -> list[Field[Any]]:
    return [f for f in fields(record) if "positional" in f.metadata]


def _set_positionals(record: T, words: Sequence[str], command: str) -> T:
    """Record changed by the words before the flags."""
    hints, rest = get_type_hints(type(record)), list(words)
    changes: dict[str, Any] = {}
    for field in _positionals(record):
        kind, name = hints[field.name], field.metadata["positional"]
        if get_origin(kind) is tuple:
            changes[field.name], rest = convert(kind, rest), []
        elif rest:
            changes[field.name] = convert(kind, [rest.pop(0)])
        elif field.metadata["required"]:
            text = docs(type(record))[field.name].rstrip(".")
            runs = f"; {runs_here()}" if name == "RUN" else ""
            raise ValueError(f"{name} is missing: {text}; type {usage(record, command)}{runs}")
    if rest:
        raise ValueError(f"{rest[0]!r} is one argument too many; type {usage(record, command)}")
    return replace(record, **changes)  # pyright: ignore[reportArgumentType]
