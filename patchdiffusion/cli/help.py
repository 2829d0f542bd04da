"""The help of a command: common flags, groups of all flags, and each group in full.

`--help` shows the flags in the record's `common`, and a line for each group; `--help network` shows
the flags of a group, or one flag, and `--help all` everything. A record says by class attributes
what its help begins with: `example`, a command line, and `common`, names of flags.
"""

import ast
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

from patchdiffusion.cli.flags import Slot, slots, walk
from patchdiffusion.cli.values import NONE, metavar, shown
from patchdiffusion.cli.words import did_you_mean
from patchdiffusion.system import families

_FLAGS = 30  # columns of flags
_TITLES = 22  # columns of groups and recipes


class Group(NamedTuple):
    """Flags below one heading."""

    title: str
    text: str
    slots: list[Slot]


def help_text(record: Any, usage: str, words: Sequence[str] = (), note: str = "") -> str:
    """Text of `--help`: an overview, or the groups and flags that are named.

    `note` goes on after "Values in [ ] are the defaults". Raises `ValueError` for a word that names
    neither a group nor a flag.
    """
    width = max(min(shutil.get_terminal_size().columns, 100), 60)
    found = groups(record)
    note = f"Values in [ ] are the defaults{note}."
    if words and "all" not in words:
        found = [group for word in words for group in _named(found, word.lstrip("-"))]
        lines = [line for group in found for line in _section(group, width)]
        return "\n".join([*lines, "", *_wrap(note, width)]).strip()
    lines = [f"usage: {usage} [options]", "", *_paragraphs(type(record).__doc__ or "", width)]
    if example := getattr(record, "example", ""):
        lines += ["", f"example: {example}"]
    for field in fields(record):
        if listed := field.metadata.get("listed"):
            lines += ["", *_listed(record, field.name, listed, width)]
    lines += ["", *_wrap(note, width)]
    if words or not (common := getattr(record, "common", "").split()):
        return "\n".join([*lines, *(line for g in found for line in _section(g, width))])
    return "\n".join([*lines, *_overview(record, found, common, width)])


def _overview(record: Any, found: Sequence[Group], common: Sequence[str], width: int) -> list[str]:
    """Common flags, and a line about each group."""
    known = {slot.name: slot for slot in walk(record)}
    first = [known[name] for name in common if name in known]
    lines = ["", "set most"]
    lines += [line for slot in first for line in _flag(slot, width, short=True)]
    lines += ["", "all options, in groups"]
    for group in found:
        head = group.slots[0]
        if head.kind != "leaf":
            text = f"{' | '.join(head.words)}: {_sentence(group.text)} [{_value(head)}]"
        elif group.text:
            text = _sentence(group.text)
        else:
            names = [s.name for s in group.slots if s.name not in common]
            text = f"also {', '.join(names)}" if names else ""
        lines += _columns(f"  {group.title}", text, width, _TITLES) if text else []
    titles = [group.title for group in found]
    shown = "network" if "network" in titles else titles[-1]
    hint = (
        f"--help {shown} shows the options of a group, --help {common[0]} one option in full, "
        "--help all everything."
    )
    return [*lines, "", *_wrap(hint, width)]


# ---- Groups ----


def groups(record: Any, path: tuple[str, ...] = (), title: str = "options") -> list[Group]:
    """Headings and flags: the fields of a record, then those of the records in it."""
    first, later = _groups(record, path, title)
    titled: dict[str, Group] = {}
    for group in first + later:
        known = titled.get(group.title)
        titled[group.title] = known._replace(slots=known.slots + group.slots) if known else group
    return list(titled.values())


def _groups(record: Any, path: tuple[str, ...], title: str) -> tuple[list[Group], list[Group]]:
    """Groups of plain fields, and groups of parts."""
    inside = slots(record, path)
    leaves = [slot for slot in inside if slot.kind == "leaf"]
    first = [Group(title, first_line(type(record)) if path else "", leaves)] if leaves else []
    later: list[Group] = []
    for slot in inside:
        if slot.flat:
            plain, parts = _groups(slot.value, slot.path[:-1], slot.flat)
            first, later = first + plain, later + parts
        elif slot.kind == "record":
            later += groups(slot.value, slot.path, slot.name)
        elif slot.kind != "leaf":
            later += _family(slot)
    return first, later


def _family(slot: Slot) -> list[Group]:
    """Groups of a family: its word and the fields of the member, then records in these."""
    below = [group for place, value in slot.below() for group in groups(value, place, slot.name)]
    own = [s for group in below if group.title == slot.name for s in group.slots]
    text = docs(slot.owner).get(slot.field, "")
    return [Group(slot.name, text, [slot, *own]), *(g for g in below if g.title != slot.name)]


def _named(found: Sequence[Group], word: str) -> list[Group]:
    chosen = [g for g in found if g.title == word or g.title.startswith(f"{word}.")]
    flags = [g._replace(slots=[s for s in g.slots if s.name == word]) for g in found]
    chosen = chosen or [group for group in flags if group.slots]
    if not chosen:
        titles = [group.title for group in found]
        hint = did_you_mean(word, [*titles, *(s.name for g in found for s in g.slots)])
        raise ValueError(
            f"--help {word} names no flag and no group; groups are {', '.join(titles)}{hint}"
        )
    return chosen


# ---- Lines ----


def _section(group: Group, width: int) -> list[str]:
    heading = f"{group.title}: {_plain(group.text)}" if group.text else group.title
    flags = (line for slot in group.slots for line in _flag(slot, width))
    return ["", *_wrap(heading, width), *flags]


def _flag(slot: Slot, width: int, *, short: bool = False) -> Iterator[str]:
    """The lines of a flag, and of the members that it may name.

    In short, the first sentence of its text, without members.
    """
    family = slot.kind != "leaf"
    text = docs(slot.owner).get(slot.field, "")
    text = _sentence(text) if short else _plain(text)
    if family and not short:
        text = ""  # it is the heading
    if slot.hint is bool:
        last = slot.path[-1].replace("_", "-")
        name = f"--{slot.name.removesuffix(last)}[no-]{last}"
    else:
        kind = "WORD" + " ..." * (slot.kind == "several") if family else metavar(slot.hint)
        if len(kind) + len(slot.name) > _FLAGS - 6 and (allowed := re.search(r"{.*}", kind)):
            kind = kind.replace(allowed[0], "WORD")
            text = f"{allowed[0]} {text}"
        name = f"--{slot.name} {kind.removesuffix(f'|{NONE}') if short else kind}"
    value = "" if short and _value(slot) in ("", NONE) else f"[{_value(slot)}]"
    yield from _columns(f"  {name}", f"{text} {value}".strip(), width, _FLAGS)
    for member in () if short or not family else slot.members:
        text = _plain(first_line(member), slot.members)
        if names := families.presets(member):
            text += f" Presets: {', '.join(_shortened(names))}."
        yield from _columns(f"      {families.word(member)}", text, width, _FLAGS)


def _value(slot: Slot) -> str:
    """Present value of a flag, as it would be typed."""
    if slot.hint is bool:
        return "yes" if slot.value else "no"
    if slot.kind == "leaf":
        return shown(slot.value)
    values = slot.value if isinstance(slot.value, tuple) else (slot.value,)
    words = [families.word(type(v)) if type(v) in slot.members else shown(v) for v in values]
    return " ".join(words) or NONE


def _wrap(text: str, width: int, pad: str = "") -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=pad, subsequent_indent=pad, break_on_hyphens=False
    )


def _columns(left: str, text: str, width: int, start: int) -> list[str]:
    """Lines of a name with a wrapped text beside it."""
    pad = " " * start
    lines = _wrap(text, width, pad)
    if len(left) + 2 > start:
        return [left, *lines]
    return [left + lines[0][len(left) :], *lines[1:]] if lines else [left]


def _paragraphs(text: str, width: int) -> list[str]:
    blocks = inspect.cleandoc(text).split("\n\n")
    return [line for block in blocks for line in (*_wrap(block, width), "")][:-1]


def _listed(record: Any, field: str, listed: Mapping[str, object], width: int) -> list[str]:
    """Lines about the values of a positional argument."""
    lines = _wrap(docs(type(record))[field], width)
    for name, value in listed.items():
        lines += _columns(f"  {name}", _plain(first_line(value)), width, _TITLES)
    return lines


# ---- Texts ----


def _plain(text: str, members: Iterable[type] = ()) -> str:
    """Docstring for the command line, with words instead of class names and None."""
    words = {member.__name__: families.word(member) for member in members}
    text = re.sub(r"`(\w+)`", lambda m: words.get(m[1], m[1]), text)
    return re.sub(r"\bNone\b", NONE, text)


def _sentence(text: str) -> str:
    """The first sentence of a text."""
    return re.split(r"(?<=[^.]\.)\s", _plain(text), maxsplit=1)[0]


def first_line(documented: object) -> str:
    """The first line of a docstring."""
    return (documented.__doc__ or "").strip().split("\n")[0]


@cache
def docs(cls: type) -> dict[str, str]:
    """The text below each field of a class."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # made at run time: it has no texts
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for field, text in pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def _shortened(names: Iterable[str]) -> list[str]:
    """Words that differ only behind a slash as one: dit-s/2|4|8."""
    ends: dict[str, list[str]] = {}
    for name in names:
        stem, _, end = name.partition("/")
        ends.setdefault(stem, []).append(end)
    return ["/".join(filter(None, (stem, "|".join(same)))) for stem, same in ends.items()]
