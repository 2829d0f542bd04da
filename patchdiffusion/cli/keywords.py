"""Keyword arguments of Python as flags, with the names, words and checks of the command line."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from patchdiffusion.cli.configfile import flags_of
from patchdiffusion.cli.renamed import SHORT
from patchdiffusion.data.options import DataConfig
from patchdiffusion.system.serialize import encode

Table = dict[str, Any]


def arguments_of(record: Any, keywords: Mapping[str, Any]) -> list[str]:
    """Flags for keywords, for a command whose arguments are like `record`.

    Names may have dots, `**{"optim.lr": 1e-3}`; what lies below a name may be a mapping,
    `optim={"lr": 1e-3}`, and a record stands for its type and all of its fields. Raises
    `ValueError` for other names and values.
    """
    table: Table = {}
    short = {SHORT[name]: value for name, value in keywords.items() if name in SHORT}
    others = {name: value for name, value in keywords.items() if name not in SHORT}
    for name, value in (others | short).items():  # below `data`, which may be among the others
        *above, last = name.split(".")
        inner = table
        for part in above:
            if not isinstance(inner.setdefault(part, {}), dict):
                inner[part] = {"type": inner[part]}  # a word, and more below it
            inner = inner[part]
        inner[last] = _plain(value)
    return flags_of(record, table, "keywords")


def _plain(value: Any) -> Any:
    """Value in the form of a configuration file."""
    if isinstance(value, DataConfig):  # but for the path, which is named before
        return _plain(changed_fields(value))
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(encode(value))
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def changed_fields(record: Any) -> Table:
    """Fields of a record that differ from their defaults."""
    plain = type(record)()
    pairs = ((f.name, getattr(record, f.name), getattr(plain, f.name)) for f in fields(record))
    return {name: value for name, value, default in pairs if value != default}


@contextmanager
def as_keywords() -> Iterator[None]:
    """Context that replaces flags by keywords in error messages."""
    try:
        yield
    except ValueError as error:
        names = re.sub(r"--([a-z][\w.-]*)", lambda m: m[1].replace("-", "_"), str(error))
        raise ValueError(names) from None
