"""Time in each phase of a step, and heartbeat files of the processes."""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from patchdiffusion.system.files import read_json
from patchdiffusion.system.place import Place

BEAT_SECONDS = 1.0
COMPUTE = ("forward", "backward", "update", "average")
SLOW_SECONDS = 1.0
SLOW_FACTOR = 5.0


@dataclass(frozen=True)
class Slow:
    """Step that took much longer than those before it, with its longest phase."""

    step: int
    seconds: float
    phase: str
    in_phase: float


class Phases:
    """Host seconds in each phase of the steps; the time of a nested phase counts there only.

    On CUDA the host only launches kernels, so phases show where it waits, not the time of kernels.
    """

    def __init__(self) -> None:
        self.step = 0
        self.current = "start"
        self.since = time.monotonic()
        self.seconds: dict[str, float] = {}
        self.slowest: Slow | None = None
        self.broken_in = ""
        """Phase in which an error was raised, or ""."""
        self._of_step: dict[str, float] = {}
        self._usual = 0.0

    def _switch(self, name: str) -> str:
        now = time.monotonic()
        spent, before = now - self.since, self.current
        self.seconds[before] = self.seconds.get(before, 0.0) + spent
        self._of_step[before] = self._of_step.get(before, 0.0) + spent
        self.current, self.since = name, now
        return before

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Context of a phase."""
        before = self._switch(name)
        try:
            yield
        except BaseException:
            self.broken_in = self.broken_in or name
            raise
        finally:
            self._switch(before)

    def begin_step(self, step: int) -> None:
        """Start the time of a step."""
        self._switch("loop")
        self.step = step
        self._of_step = {}

    def end_step(self) -> float:
        """Stop the time of a step, and remember the step if it was slow; returns its seconds."""
        self._switch("loop")
        total = sum(self._of_step.values())
        if self._usual and total > max(SLOW_SECONDS, SLOW_FACTOR * self._usual):
            phase = max(self._of_step, key=lambda name: self._of_step[name])
            if self.slowest is None or total > self.slowest.seconds:
                self.slowest = Slow(self.step, total, phase, self._of_step[phase])
        else:
            self._usual = total if not self._usual else 0.9 * self._usual + 0.1 * total
        return total

    def read(self) -> tuple[dict[str, float], Slow | None]:
        """Seconds by phase and the slowest step since the last call."""
        self._switch(self.current)
        seconds, slowest = self.seconds, self.slowest
        self.seconds, self.slowest = {}, None
        return seconds, slowest


# ---- Heartbeats ----


def _beat_file(folder: Path, rank: int) -> Path:
    return folder / "ranks" / f"rank-{rank:04d}.json"


@contextmanager
def heartbeat(folder: Path, where: Place, phases: Phases) -> Iterator[None]:
    """Context in which a thread keeps writing step and phase of this process to a file.

    The file shows where a process hangs, and becomes old when it dies; it is deleted at the end
    unless there was an error. A single process writes none.
    """
    if where.size == 1:
        yield
        return
    end = threading.Event()
    file = _beat_file(folder, where.rank)

    def beat() -> None:
        while True:
            facts = {
                "rank": where.rank,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "step": phases.step,
                "phase": phases.current,
                "seconds": round(time.monotonic() - phases.since, 1),
            }
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                temporary = file.with_suffix(".tmp")
                temporary.write_text(json.dumps(facts))
                temporary.replace(file)
            except OSError:
                pass  # a full disk is no reason to stop; an error message then says less
            if end.wait(BEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    good = False
    try:
        yield
        good = True
    finally:
        end.set()
        thread.join()
        if good:
            file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # other processes have not finished yet
                file.parent.rmdir()


def whereabouts(folder: Path, process: Place) -> str:
    """Last known step and phase of the other processes, in one line."""
    states = []
    for rank in range(process.size):
        file = _beat_file(folder, rank)
        if rank == process.rank or not file.exists():
            continue
        try:
            facts = read_json(file)
            silent = max(time.time() - file.stat().st_mtime, 0.0)
            where = f"in {facts['phase']} of step {facts['step']}"
            state = f"for {facts['seconds']:.0f} s {where}"
            if silent > 5 * BEAT_SECONDS:
                state = f"silent for {silent:.0f} s, last {where}"
            states.append(f"rank {rank} (process {facts['pid']} on {facts['host']}) {state}")
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return "; ".join(states) or "nothing is known of the others"
