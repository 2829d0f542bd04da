"""Signals that ask a program to end; importable without PyTorch."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

STOPPING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
)
"""SIGHUP is that of a terminal that was closed."""
DEFAULT = (signal.SIG_DFL, signal.default_int_handler)


class Interrupted(BaseException):
    """A signal has asked the program to end, and there is nothing to save first."""


@contextmanager
def handling(
    handle: Callable[[int, Any], object],
    signals: Sequence[int] = STOPPING,
    *,
    instead_of: Sequence[object] | None = None,
) -> Iterator[None]:
    """Let a function handle signals, if this is the main thread, which alone may do so.

    It takes the place of the handlers given, by default of all; a SIGHUP that is ignored, as
    `nohup` has it, stays so.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in signals}
    hangup = getattr(signal, "SIGHUP", None)
    replaced = {
        number: handler
        for number, handler in before.items()
        if not (number == hangup and handler == signal.SIG_IGN)
        and (instead_of is None or handler in instead_of)
    }
    for number in replaced:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


def exit_on(code: int) -> None:
    """Let a signal end the program at once with an exit code that is settled already."""
    if threading.current_thread() is threading.main_thread():
        for number in STOPPING:
            signal.signal(number, lambda *_: os._exit(code))
