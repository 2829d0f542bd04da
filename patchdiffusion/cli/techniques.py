"""Write docs/techniques.md: one table for each family whose members the command line names.

python -m patchdiffusion.cli.techniques > docs/techniques.md
"""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from patchdiffusion import recipes
from patchdiffusion.cli import COMMANDS
from patchdiffusion.cli.flags import Slot, slots
from patchdiffusion.cli.help import docs, first_line
from patchdiffusion.system import families
from patchdiffusion.system.families import word

_HEAD = (
    "# Techniques\n\n"
    "Members of each family, by the flag that chooses one; the fields of a member are flags "
    "below it. This page is generated\n"
    "from the classes by `python -m patchdiffusion.cli.techniques > docs/techniques.md`."
    "\n[Extending](extending.md) says how to add one."
)


def reachable(records: Iterable[Any]) -> Iterator[Slot]:
    """Fields of records and of all records that they can hold, each type of record once."""
    seen: set[type] = set()
    for record in records:
        yield from _below(record, (), seen)


def _below(record: Any, path: tuple[str, ...], seen: set[type]) -> Iterator[Slot]:
    if type(record) in seen:
        return
    seen.add(type(record))
    fields = slots(record, path)
    yield from fields
    for slot in fields:
        prefix = slot.path[:-1] if slot.flat else slot.path
        for member in slot.members:
            end = (word(member),) if slot.kind == "several" else ()
            yield from _below(member(), (*prefix, *end), seen)


def page() -> str:
    """Page in Markdown."""
    blocks = [_HEAD, "## Recipes", _table(["recipe", "trains"], _recipes())]
    done: set[tuple[type, ...]] = set()
    for slot in reachable(command.arguments() for command in COMMANDS.values()):
        if slot.kind in ("family", "several") and slot.members not in done:
            done.add(slot.members)
            text = docs(slot.owner).get(slot.field, "")
            rows = [_row(member, slot.members) for member in slot.members]
            table = _table(["word", "class", "description", "source"], rows)
            blocks += [f"## `--{slot.name}`", text, table, *map(_presets, slot.members)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _recipes() -> list[list[str]]:
    return [[f"`{name}`", first_line(recipe)] for name, recipe in recipes.RECIPES.items()]


def _row(member: type, family: Sequence[type]) -> list[str]:
    alone = sum(other.__module__ == member.__module__ for other in family) == 1
    texts = [member.__doc__ or "", (sys.modules[member.__module__].__doc__ or "") * alone]
    papers = next(filter(None, (re.findall(r"\b\d{4}\.\d{5}\b", text) for text in texts)), [])
    unique = dict.fromkeys(papers)
    links = ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in unique)
    module = member.__module__.removeprefix("patchdiffusion.")
    return [f"`{word(member)}`", f"`{module}.{member.__name__}`", first_line(member), links]


def _presets(member: type) -> str:
    names = ", ".join(f"`{name}`" for name in families.presets(member))
    return f"Presets of `{word(member)}`, by words like its own: {names}." if names else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *([c.replace("|", "\\|") for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


if __name__ == "__main__":
    print(page(), end="")
