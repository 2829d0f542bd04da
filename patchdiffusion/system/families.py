"""Families: the record types that a field of a configuration may hold, and their words.

A family is a union of dataclasses, such as `Law = LogNormal | LogUniform`. The command line, JSON
and the documentation list its members; a type becomes a member in the union, or from outside the
package by `add`.

Every field of a member has a default. When the command line replaces one member by another, it
calls two methods of the new one, if they exist:

- `inherit(self, old, config)` returns the member with the values that it takes over from the one it
  replaces, or from the previous configuration;
- `prefers(self, config)` returns the configuration with the member set and with further fields that
  belong to it, such as the noise law of a parameterisation.

A member may offer presets: its `presets: ClassVar` maps further words to values of fields, so that
`--network dit-s/4` is a `dit` of a published size. A preset sets the other fields to their
defaults.
"""

import re
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from inspect import isabstract
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

_ADDED: dict[frozenset[type], list[type]] = {}


def _declared(family: Any) -> tuple[type, ...]:
    if get_origin(family) in (Union, types.UnionType):
        family = get_args(family)
    parts = family if isinstance(family, tuple) else (family,)
    classes = tuple(m for m in parts if m is not type(None))
    if not all(isinstance(m, type) and get_origin(m) is None for m in classes):
        raise ValueError(f"a family is a class or a union of classes, not {family}")
    return classes


def members(family: Any) -> tuple[type, ...]:
    """Types of a family in order; a family is a union, a class, or a tuple of classes.

    None in a union is left out, and so is an abstract base, whose members are all from outside.
    Raises `ValueError` for anything else.
    """
    declared = _declared(family)
    written = (member for member in declared if not isabstract(member))
    return (*written, *_ADDED.get(frozenset(declared), ()))


def add(family: Any, member: type[T]) -> type[T]:
    """Add a type from outside the package to a family; returns the type.

    Raises `ValueError` if its class name or its word is taken, and names abstract methods that it
    has not written.
    """
    if missing := sorted(getattr(member, "__abstractmethods__", ())):
        raise ValueError(
            f"{member.__name__} lacks {', '.join(missing)}, which its base leaves to it: write "
            f"{'it' if len(missing) == 1 else 'them'} in the class"
        )
    for other in members(family):
        if other is not member and other.__name__ == member.__name__:
            raise ValueError(
                f"the class name {member.__name__} is taken by {other.__module__}; choose another"
            )
        own = (word(member), *_presets(member))
        taken = sorted({word(other), *_presets(other)} & set(own))
        if other is not member and taken:
            raise ValueError(
                f"the word {taken[0]!r} is taken by {other.__name__}; set another as `word`"
            )
    if member not in members(family):
        _ADDED.setdefault(frozenset(_declared(family)), []).append(member)
    return member


def added() -> tuple[type, ...]:
    """All types from outside the package, by name."""
    types = {member for members in _ADDED.values() for member in members}
    return tuple(sorted(types, key=lambda member: (member.__module__, member.__name__)))


def remove(family: Any, member: type) -> None:
    """Undo `add`."""
    _ADDED[frozenset(_declared(family))].remove(member)


def word(member: type) -> str:
    """Name of a member on the command line: its attribute `word`, else its class name.

    A class name loses a final "Config" and gets dashes before capitals: ToyNet is toy-net.
    """
    explicit = member.__dict__.get("word")
    name = member.__name__.removesuffix("Config")
    return explicit or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()


def words(family: Any) -> dict[str, type]:
    """Members of a family by their words."""
    return {word(member): member for member in members(family)}


def _presets(member: type) -> Mapping[str, Mapping[str, Any]]:
    return member.__dict__.get("presets", {})


def presets(family: Any) -> dict[str, tuple[type, Mapping[str, Any]]]:
    """Words of presets of a family, with the member and the fields that each sets."""
    return {
        name: (member, changes)
        for member in members(family)
        for name, changes in _presets(member).items()
    }


def find(family: Any, name: str) -> tuple[type, Mapping[str, Any]] | None:
    """Member and fields that a word or preset names; None if it names nothing."""
    member = words(family).get(name)
    return presets(family).get(name) if member is None else (member, {})


def choose(family: Any, name: str, where: str) -> type:
    """Member that a word names; raises `ValueError` that names the field `where`."""
    member = words(family).get(name)
    if member is None:
        raise ValueError(f"unknown {where} {name!r}, allowed: {', '.join(words(family))}")
    return member


def create(family: Any, name: str, where: str) -> Any:
    """Record that a word or preset names; raises `ValueError` that names the field `where`."""
    member, changes = presets(family).get(name) or (choose(family, name, where), {})
    return member(**changes)


def copy_fields(new: T, other: object) -> T:
    """Record `new` with the values of the fields that `other` has under the same names."""
    names = [f.name for f in fields(new) if hasattr(other, f.name)]  # pyright: ignore[reportArgumentType]
    return replace(new, **{name: getattr(other, name) for name in names})  # pyright: ignore[reportArgumentType]


def put(record: T, name: str, value: Any) -> T:
    """Record with another value of a field, given by its dotted name; unchanged without the field.

    The word of a member gives that member with its defaults; the member that is there stays.
    """
    first, _, rest = name.partition(".")
    if not hasattr(record, first):
        return record
    old = getattr(record, first)
    if rest:
        value = put(old, rest, value)
    elif is_dataclass(old) and isinstance(value, str):
        member = choose(get_type_hints(type(record))[first], value, first)
        value = old if type(old) is member else member()
    return replace(record, **{first: value})  # pyright: ignore[reportArgumentType]
