"""Frozen dataclasses to JSON and back, strictly: an unknown key or a wrong type is an error."""

import dataclasses
import math
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from patchdiffusion.system.families import members, word

T = TypeVar("T")


def encode(value: Any) -> Any:
    """Convert to a JSON value; a dataclass becomes an object with its class name under "type"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    return value


def decode(cls: type[T], value: Any, where: str = "") -> T:
    """Build an instance of the dataclass `cls` from the output of `encode`.

    Raises `ValueError` in one line that names the field, the value and what is allowed. An absent
    key takes its default.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where or cls.__name__} must be an object, not {value!r}")
    name = value.get("type", cls.__name__)
    if name != cls.__name__:
        raise ValueError(f"{where or 'the type'} must be {cls.__name__}, not {name!r}")
    names = [f.name for f in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    unknown = sorted(set(value) - set(names) - {"type"})
    if unknown:
        raise ValueError(
            f"unknown key {_join(where, unknown[0])!r}; allowed are {', '.join(names)}"
        )
    hints = get_type_hints(cls)
    parts = {n: _field(hints[n], value[n], _join(where, n)) for n in names if n in value}
    try:
        return cls(**parts)
    except TypeError as error:
        raise ValueError(f"{where or cls.__name__} is incomplete: {error}") from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Paths of the fields in which two configurations differ, with both values.

    Another member of a family is the words of both, and its fields that differ from those that the
    other has, or from the default.
    """
    if dataclasses.is_dataclass(old) and dataclasses.is_dataclass(new):
        lines: list[str] = []
        if type(old) is not (kind := type(new)):
            lines = [f"{where}: {word(type(old))} -> {word(kind)}"]
        for f in dataclasses.fields(new):
            before = getattr(old if hasattr(old, f.name) else kind(), f.name)
            lines += differences(before, getattr(new, f.name), _join(where, f.name))
        return lines
    return [] if old == new else [f"{where}: {old} -> {new}"]


def few(lines: list[str], most: int = 6, width: int = 100) -> str:
    """Differences as one text: at most so many, each shortened, and the number of the others."""
    short = [line if len(line) <= width else f"{line[: width - 4]} ..." for line in lines[:most]]
    rest = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return ", ".join(short + rest)


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _field(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _union(get_args(hint), value, where)
    if origin is Literal:
        if not any(type(value) is type(a) and value == a for a in get_args(hint)):
            raise ValueError(f"{where} must be one of {get_args(hint)}, not {value!r}")
        return value
    if origin is tuple:
        return _tuple(get_args(hint), value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be an object, not {value!r}")
        return {
            key: _field(get_args(hint)[1], item, _join(where, key)) for key, item in value.items()
        }
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        alone = members(hint) == (hint,)
        return decode(hint, value, where) if alone else _union((hint,), value, where)
    if hint is float and type(value) is int and abs(value) < 2**1023:
        value = float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise ValueError(f"{where} must be {hint.__name__}, not {value!r}")
    return value


def _union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    options = tuple(o for o in options if o is not type(None))
    if isinstance(value, dict):
        classes = [o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)]
        by_name = {o.__name__: o for o in members(tuple(classes))}
        member = by_name.get(str(value.get("type")))
        if member is None:
            raise ValueError(
                f"{where} has the type {value.get('type')!r}; allowed are {', '.join(by_name)}; "
                "import one of your own by patchdiffusion --import FILE.py"
            )
        return decode(member, value, where)
    errors = []
    for option in options:
        try:
            return _field(option, value, where)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError("; or ".join(errors))


def _tuple(items: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where} must be a list, not {value!r}")
    if len(items) == 2 and items[1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise ValueError(f"{where} must have {len(items)} entries, not {value!r}")
    return tuple(
        _field(hint, item, f"{where}[{i}]")
        for i, (hint, item) in enumerate(zip(items, value, strict=True))
    )
