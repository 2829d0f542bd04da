"""The help of a command: the flags of what is chosen, in groups, with their texts and values.

`--help` has a line for each flag and each member of a family; `--help network` has the whole texts
of a group or a flag, and `--help all` those of all.
"""

import ast
import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

from patchdiffusion.cli.flags import Slot, slots
from patchdiffusion.cli.values import NONE, metavar, shown
from patchdiffusion.system import families

_COLUMN = 34
_HINT = (
    "Texts are cut to a line here. `--help WORD` shows those of a group or a flag in full, "
    "such as --help {example}; --help all shows everything."
)


class Group(NamedTuple):
    """Flags below one heading."""

    title: str
    text: str
    slots: list[Slot]


def help_text(record: Any, usage: str, words: Sequence[str] = ()) -> str:
    """What `--help` prints, for the groups and flags that are named, or for all in short.

    Raises `ValueError` for a word that names none.
    """
    width = max(min(shutil.get_terminal_size().columns, 100), 60)
    found = groups(record)
    if words and tuple(words) != ("all",):
        found = [group for word in words for group in _named(found, word.lstrip("-"))]
        return "\n".join(line for g in found for line in _section(g, width, short=False)).strip()
    lines = [f"usage: {usage} [options]", "", *_paragraphs(type(record).__doc__ or "", width)]
    for field in fields(record):
        if listed := field.metadata.get("listed"):
            lines += ["", *_listed(record, field.name, listed, width)]
    for group in found:
        lines += _section(group, width, short=not words)
    if not words:
        lines += ["", *textwrap.wrap(_HINT.format(example=found[-1].title), width)]
    return "\n".join(lines)


# ---- Groups ----


def groups(record: Any, path: tuple[str, ...] = (), title: str = "options") -> list[Group]:
    """Headings and flags: the fields of a record, then those of the records in it."""
    first, later = _groups(record, path, title)
    return first + later


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
    """The choice of members and the fields of the chosen, and groups of what these hold."""
    below = [group for place, value in slot.below() for group in groups(value, place, slot.name)]
    own = [s for group in below if group.title == slot.name for s in group.slots]
    text = docs(slot.owner).get(slot.field, "")
    return [Group(slot.name, text, [slot, *own]), *(g for g in below if g.title != slot.name)]


def _named(found: Sequence[Group], word: str) -> list[Group]:
    chosen = [g for g in found if g.title == word or g.title.startswith(f"{word}.")]
    flags = [g._replace(slots=[s for s in g.slots if s.name == word]) for g in found]
    chosen = chosen or [group for group in flags if group.slots]
    if not chosen:
        titles = ", ".join(group.title for group in found)
        raise ValueError(f"--help {word} names no flag and no group; groups are {titles}")
    return chosen


# ---- Lines ----


def _section(group: Group, width: int, *, short: bool) -> list[str]:
    heading = f"{group.title}: {group.text}" if group.text else group.title
    lines = ["", _cut(heading, width) if short else textwrap.fill(heading, width)]
    return lines + [line for slot in group.slots for line in _flag(slot, width, short)]


def _flag(slot: Slot, width: int, short: bool) -> Iterator[str]:
    """The lines of a flag, and of the members that it may name."""
    family = slot.kind != "leaf"
    text = "" if family else docs(slot.owner).get(slot.field, "")
    if slot.hint is bool:
        last = slot.path[-1].replace("_", "-")
        name = f"--{slot.name.removesuffix(last)}[no-]{last}"
        value = "yes" if slot.value else "no"
    else:
        value = _chosen(slot) if family else shown(slot.value)
        kind = "WORD" + " ..." * (slot.kind == "several") if family else metavar(slot.hint)
        name = f"--{slot.name} {kind}"
        if len(name) > _COLUMN - 4 and (allowed := re.search(r"{.*}", kind)):
            name = name.replace(allowed[0], "WORD")
            if len(allowed[0]) <= _COLUMN or not short:
                text = f"{allowed[0]} {text}"
        if short:
            name, value = name.removesuffix(f"|{NONE}"), _cut(value, 24)
    yield from _columns(f"  {name}", text, f"[{value}]", width, short)
    for member in slot.members if family else ():
        left = f"      {families.word(member)}"
        yield from _columns(left, first_line(member), "", width, short)


def _chosen(slot: Slot) -> str:
    values = slot.value if isinstance(slot.value, tuple) else (slot.value,)
    known = [families.word(type(v)) if type(v) in slot.members else shown(v) for v in values]
    return " ".join(known) or NONE


def _columns(left: str, text: str, end: str, width: int, short: bool) -> list[str]:
    """A flag and its text, in one line if `short`."""
    start = max(len(left) + 2, _COLUMN) if short else _COLUMN
    if short:
        room = width - start - len(end) - 1
        return [f"{left:<{start}}{f'{_cut(text, room)} {end}'.strip()}".rstrip()]
    pad = " " * start
    lines = textwrap.wrap(f"{text} {end}".strip(), width, initial_indent=pad, subsequent_indent=pad)
    if len(left) + 2 > start:
        return [left, *lines]
    return [left + lines[0][len(left) :], *lines[1:]] if lines else [left]


def _cut(text: str, room: int) -> str:
    if len(text) <= room:
        return text
    return text[: max(room - 3, 0)].rsplit(" ", 1)[0].rstrip(",;:. ") + " ..."


def _paragraphs(text: str, width: int) -> list[str]:
    blocks = inspect.cleandoc(text).split("\n\n")
    return [line for block in blocks for line in (*textwrap.wrap(block, width), "")][:-1]


def _listed(record: Any, field: str, listed: Mapping[str, object], width: int) -> list[str]:
    """What may stand before the flags."""
    lines = textwrap.wrap(docs(type(record))[field], width)
    for name, value in listed.items():
        lines += _columns(f"  {name}", first_line(value), "", width, True)
    return lines


# ---- Texts ----


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
