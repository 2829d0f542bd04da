"""Callbacks: functions of the caller that hear what happens in a run, and may end it."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchdiffusion.train.setup import Training


@dataclass(frozen=True)
class Event:
    """Event of a run: a step, a save, the end, or a line of `log.jsonl`."""

    kind: str
    """step, save, end; or that of the line: start, resume, status, preview, guard ..."""
    step: int
    """Optimizer steps done."""
    images: float
    """Clock of the run."""
    length: float
    """Clock at the end of the run."""
    folder: Path
    """Folder of the run."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Values of the line, such as loss; for a save the checkpoint, for the end the status."""


Callback = Callable[[Event], object]
"""Called with each event on rank 0; one that returns True ends the run, saved."""


class Callbacks:
    """Calls functions with events. One that raises ends the run, which is saved first."""

    def __init__(self, functions: Sequence[Callback], training: Training):
        self.functions = functions
        self.training = training
        self.stop = threading.Event()
        self.error: Exception | None = None
        if training.team.is_main and functions:
            training.log.listener = self.hear

    def attach(self, stop: threading.Event) -> None:
        """Ask for the end by this event from now on, and now if that was wanted before."""
        if self.stop.is_set():
            stop.set()
        self.stop = stop

    def hear(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Call all functions with an event; none any more once one has raised."""
        training = self.training
        event = Event(
            kind=kind,
            step=training.state.step,
            images=training.now,
            length=training.config.images,
            folder=training.folder,
            facts=facts,
        )
        for function in self.functions if self.error is None else ():
            try:
                if function(event) is True:
                    self.stop.set()
            except Exception as error:
                self.error = error
                self.stop.set()
                return

    def check(self) -> None:
        """Raise what a function has raised, once all is saved."""
        if self.error is not None:
            raise self.error
