"""Data sets without a length, which are only read from the start: streams of rows."""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from patchdiffusion.data.example import BadImage


class Stream:
    """Rows of a stream by their number: quick in rising order, with one row in memory.

    The first use of the length reads the stream once, to count. It must give the same rows each
    time it is read: `again` begins anew.
    """

    def __init__(self, again: Callable[[], Iterable[Any]], source: Any = None):
        self._again = again
        self._count: int | None = None
        self._rows: Iterator[Any] = iter(())
        self._next = -1
        self._last: tuple[int, Any] | None = None
        self._lock = threading.Lock()
        self.source = source
        """The object itself, whose further attributes, such as features, are used."""

    def __len__(self) -> int:
        if self._count is None:
            self._count = sum(1 for _ in self._again())
        return self._count

    def __getitem__(self, index: int) -> Any:
        with self._lock:
            if self._last is not None and self._last[0] == index:
                return self._last[1]
            if not 0 <= self._next <= index:
                self._rows, self._next = iter(self._again()), 0
            for row in self._rows:
                self._next += 1
                if self._next > index:
                    self._last = index, row
                    return row
            self._next = -1
        raise BadImage(str(index), "the stream ended before: it must give the same rows again")


def is_stream(data: Any) -> bool:
    """True for an object that is only read from the start, or a function that returns one."""
    has_rows = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return (callable(data) or hasattr(data, "__iter__")) and not has_rows


def stream_of(data: Any) -> Stream:
    """Stream over an object that can be read again, or a function that returns its rows.

    Raises `ValueError` for an iterator, which ends when it has been read.
    """
    if hasattr(data, "__next__"):
        raise ValueError(
            f"images are a {type(data).__name__}, which can be read only once; give the function "
            "that makes it (prepare(rows), not prepare(rows())), or the object that it iterates"
        )
    if hasattr(data, "__iter__"):
        return Stream(lambda: data, data)
    return Stream(data, data)
