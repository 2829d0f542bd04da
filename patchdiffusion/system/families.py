"""Families: the record types that a field of a configuration may hold, and their words.

A family is a union of dataclasses, such as `Law = LogNormal | LogUniform`. The command line, JSON
and the documentation list its members; a member joins by a place in the union, or from outside the
package by `add`.

Every field of a member has a default. When the command line puts a member in the place of another
one, two methods are called if the member has them:

- `inherit(self, old, config)` returns the member with what it takes over from the one it replaces,
  or from the configuration as it was;
- `prefers(self, config)` returns the configuration with the member in its place and with what
  belongs to it, such as the noise law of a parameterisation.
"""

import re
import types
from dataclasses import fields, replace
from typing import Any, TypeVar, Union, get_args, get_origin

T = TypeVar("T")

_ADDED: dict[frozenset[type], list[type]] = {}


def _declared(family: Any) -> tuple[type, ...]:
    if get_origin(family) in (Union, types.UnionType):
        family = get_args(family)
    parts = family if isinstance(family, tuple) else (family,)
    found = tuple(m for m in parts if m is not type(None))
    if not all(isinstance(m, type) and get_origin(m) is None for m in found):
        raise ValueError(f"a family is a class or a union of classes, not {family}")
    return found


def members(family: Any) -> tuple[type, ...]:
    """The types of a family in order: of a union, a class, or a tuple of classes, without None.

    Raises `ValueError` for what is neither a class nor a union of classes.
    """
    declared = _declared(family)
    return (*declared, *_ADDED.get(frozenset(declared), ()))


def add(family: Any, member: type[T]) -> type[T]:
    """Let a type from outside the package join a family; returns the type.

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
            raise ValueError(f"the name {member.__name__} is taken by {other.__module__}")
        if other is not member and word(other) == word(member):
            raise ValueError(f"the word {word(member)!r} is taken by {other.__name__}")
    if member not in members(family):
        _ADDED.setdefault(frozenset(_declared(family)), []).append(member)
    return member


def remove(family: Any, member: type) -> None:
    """Undo `add`."""
    _ADDED[frozenset(_declared(family))].remove(member)


def word(member: type) -> str:
    """What the command line calls a member: its attribute `word`, else its class name.

    Of a class name, a final "Config" is left out and capitals become dashes.
    """
    own = member.__dict__.get("word")
    name = member.__name__.removesuffix("Config")
    return own or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()


def words(family: Any) -> dict[str, type]:
    """The members of a family by their words."""
    return {word(member): member for member in members(family)}


def choose(family: Any, name: str, where: str) -> type:
    """The member that a word names; `ValueError` lists what is allowed in the field `where`."""
    found = words(family).get(name)
    if found is None:
        raise ValueError(f"unknown {where} {name!r}, allowed: {', '.join(words(family))}")
    return found


def alike(new: T, other: object) -> T:
    """A record with what another one has under the same names."""
    names = [f.name for f in fields(new) if hasattr(other, f.name)]  # pyright: ignore[reportArgumentType]
    return replace(new, **{name: getattr(other, name) for name in names})  # pyright: ignore[reportArgumentType]
