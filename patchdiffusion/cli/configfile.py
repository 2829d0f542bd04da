"""Configuration files for `--config`: JSON, such as config.json of a run, or TOML.

The fields of a file become flags; those of the command line take precedence.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from patchdiffusion.cli.flags import Slot, names, read, slots, walk
from patchdiffusion.cli.hints import habit_of
from patchdiffusion.cli.values import NONE, shown
from patchdiffusion.cli.words import did_you_mean
from patchdiffusion.system import families
from patchdiffusion.system.files import expanded, read_json

Flags = dict[str, list[str]]


def with_config(record: Any, arguments: Sequence[str]) -> list[str]:
    """Arguments with the flags of the file of `--config`, if there is one.

    Images that are named before the flags replace those of the file. Raises `ValueError` in one
    line for fields that the record does not have, and for an invalid file.
    """
    words, flag_words = read(arguments)
    if "config" not in flag_words:
        return list(arguments)
    files = flag_words.pop("config")
    if len(files) != 1:
        raise ValueError(f"--config needs one file, not {' '.join(files) or 'nothing'}")
    table = _load(expanded(files[0]))
    flags = dict(_of_record(record, (), table, files[0]))
    if any(expanded(word).exists() for word in words):
        flags.pop("data.path", None)
    chosen = {
        name: values for name, values in flags.items() if not _replaced(name, flags, flag_words)
    }
    return [*words, *_typed(chosen), *_typed(flag_words)]


def flags_of(record: Any, table: Mapping[str, Any], source: str) -> list[str]:
    """Flags for a table of fields; errors begin with its `source`."""
    return list(_typed(dict(_of_record(record, (), table, source))))


def _load(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ValueError(f"--config {path} is not a file; give a .json or .toml file")
    if path.suffix == ".json":
        table = read_json(path)
    elif path.suffix == ".toml":
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid TOML: {error}") from error
    else:
        raise ValueError(f"--config {path} must end in .json or .toml")
    if not isinstance(table, dict):
        raise ValueError(f"{path} must hold fields and their values, not {table!r}")
    return table


def _replaced(name: str, flags: Flags, flag_words: Mapping[str, Sequence[str]]) -> bool:
    """True if the command line has this flag, or chooses a member that may not have it."""
    above, _, last = name.rpartition(".")
    if name in flag_words or f"{above}.no-{last}".lstrip(".") in flag_words:
        return True
    parts = name.split(".")
    families_above = (".".join(parts[:end]) for end in range(1, len(parts)))
    return any(f in flag_words and f in flags and flag_words[f] != flags[f] for f in families_above)


def _typed(flags: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for name, words in flags.items():
        if len(words) == 1 and words[0].startswith("-"):
            yield f"--{name}={words[0]}"
        else:
            yield from (f"--{name}", *words)


# ---- From fields to flags ----


def _of_record(
    record: Any, path: tuple[str, ...], table: Mapping[str, Any], file: str
) -> Iterator[tuple[str, list[str]]]:
    """Flags of a table of fields."""
    slots = {slot.field: slot for slot in _fields(record, path)}
    for key, value in table.items():
        slot = slots.get(key.replace("-", "_"))
        if slot is not None:
            yield from _of_field(slot, value, file)
        elif key != "type":
            where = ".".join([*path, key])
            raise ValueError(f"{file}: unknown field {where}{_instead(key, path, record, slots)}")


def _instead(key: str, path: tuple[str, ...], record: Any, slots: Mapping[str, Slot]) -> str:
    """End of the error message for an unknown field: what to type instead."""
    if hint := did_you_mean(key, slots):
        return hint
    flags = list(names(walk(record, path)))
    if meant := habit_of(key.replace("_", "-"), flags, "train"):
        return f": {'use ' * meant.startswith('--')}{meant}"
    return f"; allowed are {', '.join(sorted(slots))}"


def _fields(record: Any, path: tuple[str, ...]) -> Iterator[Slot]:
    """Fields of a record, including those of its flat fields."""
    for slot in slots(record, path):
        if slot.flat:
            yield from _fields(slot.value, slot.path[:-1])
        else:
            yield slot


def _of_field(slot: Slot, value: Any, file: str) -> Iterator[tuple[str, list[str]]]:
    where = f"{file}: {'.'.join(slot.path)}"
    if slot.kind == "leaf":
        yield slot.name, list(_words(value, where))
    elif slot.kind == "several":
        entries = value if isinstance(value, list) else [value]
        members = [_member(slot, entry, where) for entry in entries]
        yield slot.name, [families.word(member) for member in members]
        for member, entry in zip(members, entries, strict=True):
            if isinstance(entry, dict):
                yield from _of_record(member(), (*slot.path, families.word(member)), entry, file)
    elif slot.kind == "record":
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a table of fields, not {value!r}")
        yield from _of_record(slot.value, slot.path, value, file)
    elif isinstance(value, dict):
        member = _member(slot, value, where)
        if (name := value.get("type")) is not None:
            is_preset = name in families.presets(slot.members)
            yield slot.name, [name if is_preset else families.word(member)]
        yield from _of_record(member(), slot.path, value, file)
    else:
        yield slot.name, list(_words(value, where))


def _member(slot: Slot, value: Any, where: str) -> type:
    """Type named by a table, as class or word; without a name, a type that has all fields."""
    name = value.get("type") if isinstance(value, dict) else value
    by_name = {member.__name__: member for member in slot.members}
    by_name |= families.words(slot.members)
    by_name |= {preset: member for preset, (member, _) in families.presets(slot.members).items()}
    if isinstance(name, str) and name in by_name:
        return by_name[name]
    if name is None and isinstance(value, dict):
        fits = [m for m in slot.members if value.keys() <= {s.field for s in slots(m())}]
        chosen = type(slot.value) if is_dataclass(slot.value) else slot.members[0]
        return chosen if chosen in fits or not fits else fits[0]
    words = sorted(families.words(slot.members))
    hint = did_you_mean(str(name), [*words, *families.presets(slot.members)])
    raise ValueError(f"{where} must be one of {', '.join(words)}, not {name!r}{hint}")


def _words(value: Any, where: str) -> Iterator[str]:
    """Words of a flag for a value."""
    if isinstance(value, list):
        for entry in value:
            yield from _words(entry, where)
    elif isinstance(value, bool):
        yield str(value).lower()
    elif value is None:
        yield NONE
    elif isinstance(value, str | int | float):
        yield shown(value)
    else:
        raise ValueError(f"{where} cannot be {value!r}")
