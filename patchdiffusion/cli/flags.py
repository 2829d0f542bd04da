"""Flags from records: every field of a configuration, at any depth, is a flag.

A field of a family (see `system.families`) takes the word of a member, `--noise logit-normal`, and
the fields of the chosen member are flags below it, `--noise.mean`. A field that holds several
members takes several words, `--additions contrast`, and each has its flags, such as
`--additions.contrast.weight`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from patchdiffusion.cli.values import NONE, choices, convert, options, wanted
from patchdiffusion.cli.words import did_you_mean
from patchdiffusion.system import families

T = TypeVar("T")
FlagWords = Mapping[str, Sequence[str]]
"""Flags of a command line without their dashes, and the words that follow each."""
Kind = Literal["leaf", "record", "family", "several"]


def flat(title: str) -> dict[str, str]:
    """Metadata of a field whose fields are flags without a prefix; `title` is their heading."""
    return {"flat": title}


def positional(
    usage: str, *, required: bool = True, listed: Mapping[str, object] | None = None
) -> dict[str, object]:
    """Metadata of a field that is typed before all flags; the help shows docstrings of `listed`."""
    return {"positional": usage, "required": required, "listed": listed}


def read(arguments: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Words before the first flag, and flags with the words after each."""
    flag_words: dict[str, list[str]] = {}
    words: list[str] = []
    last = words
    for argument in arguments:
        if not re.match("--?[A-Za-z]", argument):
            last.append(argument)
            continue
        name, equals, value = argument.lstrip("-").partition("=")
        name = "help" if name == "h" else name.replace("_", "-")
        last = flag_words[name] = [value] if equals else []
    return words, flag_words


# ---- Fields as flags ----


class Slot(NamedTuple):
    """A field of a record, as a flag."""

    owner: type
    field: str
    path: tuple[str, ...]
    """The flag, by its parts."""
    hint: Any
    value: Any
    flat: str = ""
    """Heading of its fields if these are flags without a prefix."""

    @property
    def name(self) -> str:
        """The flag without its dashes."""
        return ".".join(self.path).rstrip("_").replace("_", "-")  # from_ is a word of Python

    @property
    def negative(self) -> str:
        """The flag that sets a boolean to False."""
        return ".".join([*self.path[:-1], f"no_{self.path[-1]}"]).replace("_", "-")

    @property
    def members(self) -> tuple[type, ...]:
        """Types of records that the field may hold."""
        return _members(_entry(self.hint) or self.hint)

    @property
    def kind(self) -> Kind:
        """Kind of flags for the field."""
        entry = _entry(self.hint)
        if entry is not None and (self.members or is_dataclass(entry)):
            return "several"
        if not self.members:
            return "leaf"
        return "record" if len(self.members) + len(self.others) == 1 else "family"

    @property
    def others(self) -> tuple[Any, ...]:
        """Types other than records that the field of a family may hold."""
        return tuple(o for o in options(self.hint) if not is_dataclass(o))

    @property
    def words(self) -> list[str]:
        """Words that the flag of a family accepts."""
        literals = [str(v) for o in self.others for v in get_args(o) if get_origin(o) is Literal]
        none = [NONE] if type(None) in self.others else []
        return [*none, *literals, *(families.word(member) for member in self.members)]

    def below(self) -> list[tuple[tuple[str, ...], Any]]:
        """Records whose fields are flags below this one, with their paths."""
        if self.kind == "several":
            return [((*self.path, families.word(type(v))), v) for v in self.value]
        if self.kind == "leaf" or not is_dataclass(self.value):
            return []
        return [(self.path[:-1] if self.flat else self.path, self.value)]


def _entry(hint: Any) -> Any:
    """Type of the entries of a tuple of any length, None for other types."""
    items = get_args(hint) if get_origin(hint) is tuple else ()
    return items[0] if len(items) == 2 and items[1] is Ellipsis else None


def _members(hint: Any) -> tuple[type, ...]:
    records = tuple(o for o in options(hint) if isinstance(o, type) and is_dataclass(o))
    return families.members(records) if records else ()


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def slots(record: Any, path: tuple[str, ...] = ()) -> list[Slot]:
    """The fields of a record in order."""
    hints = _hints(type(record))
    return [
        Slot(
            owner=type(record),
            field=f.name,
            path=(*path, f.name),
            hint=hints[f.name],
            value=getattr(record, f.name),
            flat=f.metadata.get("flat", ""),
        )
        for f in fields(record)
        if f.init and "positional" not in f.metadata
    ]


def walk(record: Any, path: tuple[str, ...] = ()) -> Iterator[Slot]:
    """The fields of a record and of all records in it."""
    for slot in slots(record, path):
        yield slot
        for place, inner in slot.below():
            yield from walk(inner, place)


def names(slots: Iterable[Slot]) -> Iterator[str]:
    """Flags without their dashes, also the negative ones."""
    for slot in slots:
        if not slot.flat and slot.kind != "record":
            yield slot.name
        if slot.hint is bool:
            yield slot.negative


def shortened(record: Any, flag_words: FlagWords) -> dict[str, Sequence[str]]:
    """Flags without the names of flat fields as prefixes.

    So the path of a field in a configuration is a flag everywhere: `--sampler.steps` is `--steps`.
    """
    prefixes = {f"{slot.name}.": slot.path[:-1] for slot in walk(record) if slot.flat}
    short: dict[str, Sequence[str]] = {}
    for name, words in flag_words.items():
        for prefix, above in prefixes.items():
            if name.startswith(prefix):
                name = ".".join([*above, name.removeprefix(prefix)]).replace("_", "-")
        short[name] = words
    return short


# ---- Words choose types ----


def choose(record: T, flag_words: FlagWords, path: tuple[str, ...] = ()) -> T:
    """Configuration with the members of families that the flags name.

    A word for the type that is there changes nothing, so that a command can be repeated. A new
    member may take over fields of the one that it replaces (`inherit`) and bring with it what
    belongs to it (`prefers`), unless that is given, too. Raises `ValueError` for unknown words.
    """
    config: Any = record
    errors: dict[str, ValueError] = {}
    for _ in flag_words:  # a word may be undone, or made possible, by a later one
        before, errors = config, {}
        for slot in _inside(config, path):
            if slot.name not in flag_words or slot.kind not in ("family", "several"):
                continue
            words, route = flag_words[slot.name], slot.path[len(path) :]
            if not hasattr(_get(config, route[:-1]), route[-1]):
                continue  # it is inside a member that another one has replaced
            try:
                config = _chosen(config, record, slot, route, words)
            except ValueError as error:
                errors[slot.name] = error
        if config == before:
            break
    for error in errors.values():
        raise error
    for slot in list(_inside(config, path)):
        if slot.flat:  # a configuration by itself
            inner = choose(slot.value, flag_words, slot.path[:-1])
            config = _put(config, slot.path[len(path) :], inner)
    return config


def _inside(record: Any, path: tuple[str, ...]) -> Iterator[Slot]:
    """Fields like `walk`, without those inside flat fields."""
    for slot in slots(record, path):
        yield slot
        for place, inner in () if slot.flat else slot.below():
            yield from _inside(inner, place)


def _chosen(config: Any, first: Any, slot: Slot, route: Sequence[str], words: Sequence[str]) -> Any:
    """Configuration with the members that the words of one flag name."""
    now = _get(config, route)
    if slot.kind == "several":
        there = {families.word(type(v)): v for v in (*(_get(first, route) or ()), *(now or ()))}
        if len(set(words)) < len(words):
            raise ValueError(f"--{slot.name} takes every word once, not {' '.join(words)!r}")
        entries = [there.get(word) or _member(slot, word)() for word in words]
        if tuple(entries) == now:
            return config
        for entry in entries:
            if hasattr(entry, "prefers") and families.word(type(entry)) not in {
                families.word(type(v)) for v in now or ()
            }:
                config = entry.prefers(config)  # first, since others would refuse it
        return _put(config, route, tuple(entries))
    if len(words) != 1:
        raise ValueError(f"--{slot.name} needs one word of {', '.join(sorted(slot.words))}")
    choice = families.find(slot.members, words[0])
    if choice is None:
        value = _other(slot, words[0])
        return config if value == now else _put(config, route, value)
    cls, preset = choice
    before = _get(first, route)
    if type(now) is cls and not preset:
        return config
    if type(before) is cls and not preset:  # the choice of another part had replaced it
        return _put(config, route, before)
    new: Any = cls(**preset)
    if hasattr(new, "inherit"):
        new = new.inherit(now, first)
    if new == now:
        return config
    prefers = hasattr(new, "prefers") and _differs(new, now, config)
    return new.prefers(config) if prefers else _put(config, route, new)


def _differs(new: Any, now: Any, config: Any) -> bool:
    """True if two members differ in type, or in the settings that suit them."""
    if type(new) is not type(now):
        return True
    return hasattr(new, "suits") and new.suits(config) != now.suits(config)


def _member(slot: Slot, word: str) -> Any:
    found = families.words(slot.members)
    if word not in found:
        allowed = sorted(slot.words)
        near = [*allowed, *families.presets(slot.members)]
        hint = _number(slot, word) or did_you_mean(word, near, f"--{slot.name} {{}}")
        raise ValueError(f"--{slot.name} must be one of {', '.join(allowed)}, not {word!r}{hint}")
    return found[word]


def _number(slot: Slot, word: str) -> str:
    """Hint for a number in the place of a word, as in `--guidance 2`."""
    for member in slot.members:
        if word.replace(".", "", 1).isdigit() and "weight" in _hints(member):
            return f"; type --{slot.name} {families.word(member)} --{slot.name}.weight {word}"
    return ""


def _misplaced(slot: Slot, words: Sequence[str]) -> str:
    """Hint for words behind the value of a flag, as in `--count 4 runs/photos`."""
    used = 0 if slot.hint is bool else 1
    if len(words) <= used:
        return ""
    try:
        convert(slot.hint, words[:used])
    except ValueError:
        return ""
    return f"; put {' '.join(words[used:])} before all flags"


def _other(slot: Slot, word: str) -> Any:
    """Value that is not a record: None, a literal, a number."""
    for hint in slot.others:
        try:
            return convert(hint, [word])
        except ValueError:
            continue
    return _member(slot, word)


def _get(record: Any, route: Sequence[str]) -> Any:
    """Value at a route of fields, or None."""
    for part in route:
        if isinstance(record, tuple):
            record = next((v for v in record if families.word(type(v)) == part), None)
        else:
            record = getattr(record, part, None)
    return record


def _put(record: Any, route: Sequence[str], value: Any) -> Any:
    if not route:
        return value
    part, rest = route[0], route[1:]
    if isinstance(record, tuple):
        return tuple(_put(v, rest, value) if families.word(type(v)) == part else v for v in record)
    return replace(record, **{part: _put(getattr(record, part), rest, value)})


# ---- Values ----


def assign(record: T, flag_words: FlagWords, path: tuple[str, ...] = ()) -> T:
    """Record with the values of the flags; `ValueError` names field and value."""
    changes: dict[str, Any] = {}
    for slot in slots(record, path):
        value: Any = slot.value
        if slot.kind == "leaf":
            value = _leaf(slot, flag_words)
        elif slot.kind == "several":
            value = tuple(assign(inner, flag_words, place) for place, inner in slot.below())
        else:
            for place, inner in slot.below():
                value = assign(inner, flag_words, place)
        if value is not slot.value and (type(value) is not type(slot.value) or value != slot.value):
            changes[slot.field] = value
    try:
        return replace(record, **changes) if changes else record  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise ValueError(f"{'.'.join(path)}: {error}" if path else str(error)) from None


def _leaf(slot: Slot, flag_words: FlagWords) -> Any:
    if slot.hint is bool and slot.negative in flag_words:
        if slot.name in flag_words:
            raise ValueError(f"--{slot.negative} and --{slot.name} exclude each other")
        if words := flag_words[slot.negative]:
            raise ValueError(
                f"--{slot.negative} takes no value, not {' '.join(words)!r}; a RUN or DATA comes "
                "before all flags"
            )
        return False
    if slot.name not in flag_words:
        return slot.value
    words = flag_words[slot.name]
    try:
        return convert(slot.hint, words)
    except ValueError:
        told = repr(" ".join(words)) if words else "nothing"
        hint = did_you_mean(words[0], choices(slot.hint)) if words else ""
        hint = _misplaced(slot, words) or hint
        raise ValueError(f"--{slot.name} must be {wanted(slot.hint)}, not {told}{hint}") from None
