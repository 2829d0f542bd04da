"""The help of a command: the flags of what is chosen, in groups, with their texts and defaults."""

import ast
import inspect
import shutil
import textwrap
from functools import cache
from itertools import pairwise
from typing import Any

from patchdiffusion.cli.flags import Slot, slots
from patchdiffusion.cli.values import metavar, shown
from patchdiffusion.system import families

_INDENT = 30


def help_text(record: Any, usage: str) -> str:
    """What `--help` prints."""
    width = min(shutil.get_terminal_size().columns, 100)
    description = " ".join((type(record).__doc__ or "").split())
    lines = [f"usage: {usage} [options]", "", *textwrap.wrap(description, width)]
    for heading, group in _groups(record, (), "options"):
        lines += ["", heading]
        for slot in group:
            lines += _entry(slot, width)
    return "\n".join(lines)


def _groups(record: Any, path: tuple[str, ...], heading: str) -> list[tuple[str, list[Slot]]]:
    """Headings, and the fields below them: those of a record, then of the records in it."""
    here: list[Slot] = []
    later: list[tuple[str, list[Slot]]] = []
    for slot in slots(record, path):
        if slot.kind in ("family", "several", "leaf"):
            here.append(slot)
        for place, inner in slot.below():
            name = heading if slot.flat else ".".join(place)
            later += _groups(inner, place, name)
    return [(heading, here), *later] if here else later


def _entry(slot: Slot, width: int) -> list[str]:
    """The lines of a flag."""
    name = f"--{slot.name}"
    if slot.kind == "leaf":
        invocation = f"{name}, --{slot.negative}" if slot.hint is bool else name
        invocation = f"  {invocation} {metavar(slot.hint)}".rstrip()
        text = f"{docs(slot.owner).get(slot.field, '')} [{shown(slot.value)}]"
        return _columns(invocation, text, width)
    now = slot.value if isinstance(slot.value, tuple) else (slot.value,)
    chosen = " ".join(families.word(type(v)) if v is not None else "none" for v in now)
    text = f"{docs(slot.owner).get(slot.field, '')} [{chosen}]".strip()
    lines = _columns(f"  {name} WORD" + " ..." * (slot.kind == "several"), text, width)
    for member in slot.members:
        first = (member.__doc__ or "").strip().splitlines()[0]
        word = f"{' ' * _INDENT}  {families.word(member)}: {first}"
        lines += textwrap.wrap(
            word, width, initial_indent="", subsequent_indent=" " * (_INDENT + 4)
        )
    return lines


def _columns(left: str, text: str, width: int) -> list[str]:
    pad = " " * _INDENT
    lines = textwrap.wrap(text, width, initial_indent=pad, subsequent_indent=pad) or [""]
    if len(left) < _INDENT - 1:
        return [left + lines[0][len(left) :], *lines[1:]]
    return [left, *lines]


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
