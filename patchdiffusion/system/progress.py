"""Progress bars of loops with a known end."""

import sys
from collections.abc import Callable
from typing import NoReturn, TextIO

from tqdm import tqdm


def progress_bar(
    total: int, unit: str, *, name: str | None = None, disable: bool = False
) -> "tqdm[NoReturn]":
    """Progress bar on standard error; updated ten times a second, in a log file every 10 s."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total, unit=unit, desc=name, disable=disable, mininterval=interval, miniters=0
    )


class StatusBar:
    """One line at the bottom of a terminal: a bar, and a text that is replaced.

    Lines are printed above it. A terminal that fails is left alone from then on.
    """

    def __init__(self, total: float, stream: TextIO):
        self.stream = stream
        self._bar: tqdm[NoReturn] | None = tqdm(
            total=total,
            file=stream,
            dynamic_ncols=True,
            leave=False,
            mininterval=0.1,
            bar_format="{percentage:3.0f}%|{bar:20}| {desc}",
        )

    def _try(self, action: Callable[["tqdm[NoReturn]"], object]) -> None:
        if self._bar is not None:
            try:
                action(self._bar)
            except (OSError, ValueError):
                self._bar = None

    def update(self, done: float) -> None:
        """Move the bar to `done` of the total."""
        self._try(lambda bar: bar.update(done - bar.n))

    def text(self, text: str) -> None:
        """Replace the text beside the bar."""
        self._try(lambda bar: bar.set_description_str(text))

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        self._try(lambda bar: bar.write(line, file=self.stream))

    def close(self) -> None:
        """Remove the bar."""
        self._try(lambda bar: bar.close())
        self._bar = None
