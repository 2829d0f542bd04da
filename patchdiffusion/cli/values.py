"""Conversion of the words of flags to values of a type, and descriptions of types."""

import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

NONE = "none"
_COUNTS = {2: "two", 3: "three"}
_PLURALS = {"a whole number": "whole numbers", "a number": "numbers"}
_UNITS = {"k": "e3", "m": "e6", "g": "e9"}
_KINDS: dict[Any, tuple[str, str]] = {
    int: ("INT", "a whole number"),
    float: ("NUMBER", "a number"),
    str: ("TEXT", "a text"),
    Path: ("PATH", "a path"),
    bool: ("BOOL", "true or false"),
}


def options(hint: Any) -> tuple[Any, ...]:
    """The types that a union is made of, or the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def convert(hint: Any, words: Sequence[str]) -> Any:
    """Convert all words to one value of a type; raises `ValueError` if that is not possible."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _first_that_fits(options(hint), words)
    if origin is tuple:
        return _tuple(get_args(hint), words)
    if hint is bool and not words:
        return True
    if len(words) != 1:
        raise ValueError(f"one value, not {len(words)}")
    (text,) = words
    if hint is type(None) and text.lower() == NONE:
        return None
    if hint is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if origin is Literal:
        found = [value for value in get_args(hint) if str(value) == text]
        if found:
            return found[0]
    if hint in (int, float):
        return _number(hint, text)
    if hint in (str, Path):
        return hint(text)
    raise ValueError(f"{text!r} is not {wanted(hint)}")


def _number(kind: type[int] | type[float], text: str) -> int | float:
    """A number, also with k, M or G for thousands, millions and thousands of millions."""
    if kind is int and re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    with_unit = re.fullmatch(r"([+-]?[\d.]+)([kKmMgG])", text)
    if with_unit:
        text = with_unit[1] + _UNITS[with_unit[2].lower()]
    value = float(text)
    if kind is float:
        return value
    if not value.is_integer() or abs(value) >= 2**53:
        raise ValueError(f"{text} is not a whole number")
    return int(value)


def _split(words: Sequence[str]) -> list[str]:
    """Words of numbers, of which 64,96 and 64x96 are two."""
    several = re.compile(r"[\d.+eE-]+([,x][\d.+eE-]+)*,?")
    parts = (re.split("[,x]", w.rstrip(",")) if several.fullmatch(w) else [w] for w in words)
    return [part for inner in parts for part in inner]


def _first_that_fits(hints: Sequence[Any], words: Sequence[str]) -> Any:
    # None first, since its word is a text and a path as well.
    for hint in sorted(hints, key=lambda hint: hint is not type(None)):
        try:
            return convert(hint, words)
        except ValueError:
            continue
    raise ValueError(f"{' '.join(words)!r} fits nothing")


def _tuple(items: tuple[Any, ...], words: Sequence[str]) -> tuple[Any, ...]:
    words = _split(words) if {int, float} & {*_leaves(items)} else words
    if len(items) == 2 and items[1] is Ellipsis:
        items = items[:1] * max(len(words) // _length(items[0]), 1) if words else ()
    lengths = [_length(item) for item in items]
    if sum(lengths) != len(words):
        raise ValueError(f"{sum(lengths)} values, not {len(words)}")
    starts = [sum(lengths[:i]) for i in range(len(items))]
    return tuple(
        convert(item, words[start : start + length])
        for item, start, length in zip(items, starts, lengths, strict=True)
    )


def _leaves(hints: Sequence[Any]) -> Iterator[Any]:
    for hint in hints:
        if hint is not Ellipsis:
            yield from _leaves(get_args(hint)) if get_origin(hint) is tuple else (hint,)


def _length(hint: Any) -> int:
    """Number of words of an entry of a tuple."""
    items = get_args(hint) if get_origin(hint) is tuple else ()
    return sum(_length(item) for item in items) if items and items[-1] is not Ellipsis else 1


def metavar(hint: Any) -> str:
    """Placeholder of a value in the help: INT, {a,b}, INT INT, [NUMBER ...]."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        literals = [str(v) for o in options(hint) for v in get_args(o) if get_origin(o) is Literal]
        others = [o for o in options(hint) if get_origin(o) is not Literal]
        parts = ["{" + ",".join(literals) + "}"] if literals else []
        parts += [metavar(o) for o in others if o is not type(None)]
        return "|".join(parts + [NONE] * (type(None) in others))
    if origin is Literal:
        return "{" + ",".join(str(value) for value in get_args(hint)) + "}"
    if origin is tuple:
        items = get_args(hint)
        if items[-1] is Ellipsis:
            return f"[{metavar(items[0])} ...]"
        return " ".join(metavar(item) for item in items)
    return "" if hint is bool else _KINDS[hint][0] if hint in _KINDS else NONE


def choices(hint: Any) -> list[str]:
    """Words that a field may hold, at any depth of its type."""
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    return [word for inner in get_args(hint) for word in choices(inner)]


def wanted(hint: Any) -> str:
    """Description of the values of a type, for an error message."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        *first, last = (wanted(option) for option in options(hint))
        return f"{', '.join(first)} or {last}" if first else last
    if origin is Literal:
        values = ", ".join(str(value) for value in get_args(hint))
        return f"one of {values}" if len(get_args(hint)) > 1 else values
    if origin is tuple:
        items = get_args(hint)
        if items[-1] is Ellipsis:
            inner = wanted(items[0])
            return f"any number of {_PLURALS.get(inner, inner)}"
        inner = wanted(items[0])
        if len(set(items)) > 1:
            return f"the values {', '.join(wanted(item) for item in items)}"
        each = _PLURALS.get(inner, f"values, each {inner}")
        return f"{_COUNTS.get(len(items), len(items))} {each}"
    return _KINDS[hint][1] if hint in _KINDS else NONE


def shown(value: Any) -> str:
    """Value in the form of the command line."""
    if isinstance(value, tuple):
        return " ".join(shown(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return NONE if value is None else str(value)
