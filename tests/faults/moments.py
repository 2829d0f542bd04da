"""When a fault happens: at a phase of a step, during a save, once."""

import os
from collections.abc import Callable
from typing import Any

from patchdiffusion.train import loop
from patchdiffusion.train.timing import Phases


def once(action: Callable[[], None]) -> Callable[[], None]:
    done: list[bool] = []

    def act() -> None:
        if not done:
            done.append(True)
            action()

    return act


def at(phase: str, step: int, action: Callable[[], None]) -> None:
    """Act when a phase of a step begins; steps count from 0. "after" is the end of the step."""
    act, switch, end = once(action), Phases._switch, Phases.end_step

    def switched(self: Phases, name: str) -> str:
        before = switch(self, name)
        if name == phase and self.step == step:
            act()
        return before

    def ended(self: Phases) -> float:
        seconds = end(self)
        if phase == "after" and self.step == step:
            act()
        return seconds

    Phases._switch, Phases.end_step = switched, ended


def once_ever(mark: str | None, action: Callable[[], None]) -> Callable[[], None]:
    """The action, unless the file `mark` exists: a restarted process does not do it again."""

    def act() -> None:
        if mark is None or not os.path.exists(mark):
            if mark is not None:
                open(mark, "x").close()
            action()

    return act


def during_saves(saves: list[int], begin: Callable[[], None], end: Callable[[], None]) -> None:
    """Something lasts as long as some of the saves; they count from 0."""
    number = [-1]
    write = loop.Saver.__call__

    def call(self: Any, **kwargs: Any) -> None:
        number[0] += 1
        if number[0] not in saves:
            return write(self, **kwargs)
        begin()
        try:
            write(self, **kwargs)
        finally:
            end()

    loop.Saver.__call__ = call
