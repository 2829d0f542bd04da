"""Progress bars of loops with a known end."""

import sys
from typing import NoReturn

from tqdm import tqdm


def progress_bar(
    total: int, unit: str, *, name: str | None = None, disable: bool = False
) -> "tqdm[NoReturn]":
    """Progress bar on standard error; updated ten times a second, in a log file every 10 s."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total, unit=unit, desc=name, disable=disable, mininterval=interval, miniters=0
    )
