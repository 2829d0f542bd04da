"""Read and fit all images of a source, in order, by several threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from patchdiffusion.data.columns import ColumnBase, Stored
from patchdiffusion.data.example import (
    MAX_LABEL,
    BadImage,
    Example,
    Source,
    entry_of,
    has_fetch,
)
from patchdiffusion.data.frame import Fitted, Frame, Plan, usable, with_channels

Entry = Callable[[], Iterable[Example | BadImage]]
"""Decodes an entry of a source: see `entry_of`."""
_TASK = 32
_FETCHED = 4
"""Entries of a task that are read before it runs, so that they are in memory."""


@dataclass(frozen=True, eq=False)
class Ready:
    """One image of a pack: a picture, or one of the windows that it is cut into."""

    fitted: Fitted
    values: list[Stored | None]
    """One for each column."""
    key: str
    picture: str
    """Key of the whole picture."""
    first: bool
    """False for further windows of a picture."""
    group: str | None
    held_out: bool | None
    mode: str
    complaints: tuple[str, ...]


def results(
    source: Source, plan: Plan, columns: Sequence[ColumnBase], workers: int
) -> Iterator[list[Ready | BadImage]]:
    """Images of each entry of a source, in order; few tasks are in flight, to save memory."""

    def task(entries: Iterable[Entry]) -> list[list[Ready | BadImage]]:
        return [ready(source, entry, plan, columns) for entry in entries]

    if workers == 1:
        for index in range(len(source)):
            yield ready(source, entry_of(source, index), plan, columns)
        return
    several = plan.frame.fit == "windows" or getattr(source, "has_stacks", False)
    size, most = (1, 4) if several else (_FETCHED if has_fetch(source) else _TASK, 2)
    starts = iter(range(0, len(source), size))
    flying: deque[Future[list[list[Ready | BadImage]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        while True:
            for start in islice(starts, most * workers - len(flying)):
                stop = min(start + size, len(source))
                entries = [entry_of(source, index) for index in range(start, stop)]
                flying.append(pool.submit(task, entries))
            if not flying:
                return
            yield from flying.popleft().result()


def ready(
    source: Source, entry: Entry, plan: Plan, columns: Sequence[ColumnBase]
) -> list[Ready | BadImage]:
    """All images of one entry of a source, or why they cannot be used."""
    made: list[Ready | BadImage] = []
    try:
        for example in entry():
            if isinstance(example, BadImage):
                made.append(example)
            else:
                made += _cut(source, example, plan, columns)
    except BadImage as error:
        made.append(error)
    return made


def _cut(
    source: Source, example: Example, plan: Plan, columns: Sequence[ColumnBase]
) -> Sequence[Ready | BadImage]:
    """Windows of an example, of which there is one unless they are asked for."""
    try:
        made = [_ready(example, *part, plan, columns) for part in _parts(example, plan.frame)]
    except BadImage as error:
        return [error]
    label, limit = example.label, len(source.classes) or MAX_LABEL + 1
    if label is not None and not 0 <= label < limit:
        raise ValueError(
            f"{source.name}: {example.key} has the label {label}; allowed are 0 to {limit - 1}"
        )
    return made


def _parts(example: Example, frame: Frame) -> list[tuple[Frame, str, str | None]]:
    """Frame, key and group of each window; together they are a group, never divided."""
    if frame.fit != "windows":
        return [(frame, example.key, example.group)]
    height, width = usable(example.key, with_channels(example)).shape[-3:-1]
    frames = frame.windows(example.key, width, height)
    if len(frames) == 1:
        return [(frames[0], example.key, example.group)]
    group = example.group or example.key
    return [(f, f"{example.key}#{f.window + 1}of{len(frames)}", group) for f in frames]


def _ready(
    example: Example,
    frame: Frame,
    key: str,
    group: str | None,
    plan: Plan,
    columns: Sequence[ColumnBase],
) -> Ready:
    return Ready(
        fitted=plan.fitted(example, frame),
        values=[column.value(example, frame) for column in columns],
        key=key,
        picture=example.key,
        first=frame.window == 0,
        group=group,
        held_out=example.held_out,
        mode=example.mode,
        complaints=example.complaints,
    )
