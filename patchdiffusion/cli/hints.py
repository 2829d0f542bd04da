"""Error messages for unknown flags, with the flag that was probably meant."""

import difflib
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from patchdiffusion.cli.flags import Slot, names, walk
from patchdiffusion.cli.habits import HABITS
from patchdiffusion.cli.words import nearest, question
from patchdiffusion.system import families


def unknown_flag(record: Any, name: str, words: Sequence[str], command: str) -> str:
    """Error message for a flag that the record does not have, with what to type instead."""
    known = list(names(walk(record)))
    text = f"unknown flag --{name}"
    if owner := next(_owners(record, name), None):
        slot, members = owner
        command_line = shlex.join([f"--{slot.name}", members[0], f"--{name}", *words])
        return f"{text}: it belongs to --{slot.name} {' or '.join(members)}, so type {command_line}"
    above, _, last = name.rpartition(".")
    inside = sorted(n for n in known if n.rpartition(".")[0] == above) if above else []
    close = _by_end(last, inside, nearest) or _by_end(last, known, _alike)
    if not inside:
        close = [n for n in known if n.endswith(f".{last}")][:3] or _alike(name, known) or close
    if meant := habit_of(name, known, command) or habit_of(last, known, command):
        return f"{text}: {'use ' * meant.startswith('--')}{meant}"
    if close:
        return f"{text}{question([f'--{n}' for n in close])}"
    if inside:
        return f"{text}, allowed: {', '.join(f'--{n}' for n in inside)}"
    return f"{text}; patchdiffusion {command} --help lists the flags"


def _alike(name: str, names: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(name, names, 3, 0.75)


def _by_end(
    end: str, names: Iterable[str], choose: Callable[[str, Iterable[str]], list[str]]
) -> list[str]:
    """Names of which `choose` selects the last part for `end`."""
    ends = {name.rpartition(".")[2]: name for name in names}
    return [ends[part] for part in choose(end, ends)]


def habit_of(name: str, known: Sequence[str], command: str) -> str:
    """Replacement for a flag of another program, or ""."""
    for habit in HABITS:
        first = re.search(r"--([\w.-]*\w)", habit.meant)
        applies = not first or first[1] in known
        if habit.commands:
            applies = command in habit.commands.split()
        if applies and name.lower() in habit.names.split():
            return habit.meant
    return ""


def _owners(record: Any, name: str) -> Iterator[tuple[Slot, list[str]]]:
    """Families with members that have a flag of this name, and the words of these members."""
    for slot in walk(record):
        members = [
            families.word(member)
            for member in slot.members
            if slot.kind in ("family", "several") and name in _flags_of(slot, member)
        ]
        if members:
            yield slot, members


def _flags_of(slot: Slot, member: type) -> set[str]:
    word = (families.word(member),) if slot.kind == "several" else ()
    return set(names(walk(member(), (*slot.path, *word))))
