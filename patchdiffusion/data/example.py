"""The contract of a data set: a `Source` of `Example`s, and `BadImage` for one that fails."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

MAX_LABEL = 10**6


class BadImage(ValueError):
    """Raised for one image that cannot be used, with its `key` and the `reason`."""

    def __init__(self, key: str, reason: str):
        super().__init__(key, reason)
        self.key = key
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}"


@dataclass(frozen=True, eq=False)
class Example:
    """One image as stored in its source, before it is fitted to the size of a pack."""

    image: np.ndarray
    """[H, W, C] or [H, W]; bool, integers or float."""
    label: int | None
    """Index into the classes of the source."""
    key: str
    """Name of the image within its source."""
    group: str | None = None
    """Images of one group are never divided between training and held-out images."""
    held_out: bool | None = None
    """True if the source holds it out from training; None leaves that to `prepare`."""
    alpha: bool = False
    """True if the last of four channels is alpha; else they are bands."""
    span: tuple[float, float] | None = None
    """Values that become -1 and 1; None for the full range of an integer type."""
    mode: str = ""
    """Stored format, for the report."""
    caption: str | None = None
    """Text about the image."""
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Further data of the image, by name."""
    complaints: tuple[str, ...] = ()
    """Problems of data that are left out, for the report; the image is used without them."""


class Source(Protocol):
    """A data set: anything with a length, examples by index, class names and a name.

    More attributes are used if they are there: `stamp`, a string that changes when the data
    change, so that a pack can be reused; `notes`, lines for the report; `ignored`, the number of
    files ignored by kind; `examples(i)`, all images of file i if it may hold several, of which
    `source[i]` is the first; and `fetch(i)` of a source that is read in order by one thread, which
    reads entry i and returns a function that any thread decodes it with. `source[i]` raises
    `BadImage` if image i is unusable.
    """

    @property
    def name(self) -> str:
        """Short name for folders and reports."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, or () when there are no labels."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


def examples_of(source: Source, index: int) -> Iterable[Example | BadImage]:
    """All examples of one entry of a source: the pages of a file, usually one."""
    several = getattr(source, "examples", None)
    return (source[index],) if several is None else several(index)


def entry_of(source: Source, index: int) -> Callable[[], Iterable[Example | BadImage]]:
    """Function that decodes an entry of a source, in any thread.

    A source that is read in order is read here; call it for one entry after the other.
    """
    fetch = getattr(source, "fetch", None)
    return partial(examples_of, source, index) if fetch is None else fetch(index)


def has_fetch(source: Source) -> bool:
    """True for a source that is read in order by one thread, and decoded by any."""
    return hasattr(source, "fetch")
