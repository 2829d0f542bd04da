"""The log of a run: lines on the terminal, `log.jsonl` for programs, `run.json` for its state."""

import contextlib
import json
import math
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from patchdiffusion.system.files import is_held, parse_json, read_json, write_json
from patchdiffusion.system.progress import StatusBar
from patchdiffusion.system.text import printable
from patchdiffusion.system.trust import NO_LINK, open_regular
from patchdiffusion.train.trackers import Trackers

REFERENCE = "real.png"
"""Picture of some images of the data, in the folder of a run."""


def duration(seconds: float) -> str:
    """Seconds as 12s, 3m05s, 2h04m or 3d04h."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(max(seconds, 0))
    for size, unit, small, mark in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // small:02d}{mark}"
    return f"{whole}s"


def quantity(value: float) -> str:
    """Number in at most five characters: 512, 9.87k, 12.3M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


class RunLog:
    """Writes the log of a run; a failure to write is reported and never stops training.

    A quiet one, of ranks other than 0, writes nothing.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stream: TextIO | None = None,
        quiet: bool = False,
        dry: bool = False,
    ):
        """A dry log prints, but writes no files."""
        self.listener: Callable[[str, dict[str, Any]], None] | None = None
        """Is called with what is recorded."""
        self.folder = folder
        self.dry = dry or quiet
        self.stream = stream or sys.stdout
        self.quiet = quiet
        self.bar: StatusBar | None = None
        """Bar at the bottom of a terminal, between `open_bar` and `close_bar`."""
        self.trackers = Trackers(self.say)
        self._failed: set[str] = set()
        self._logged_until = -1

    def say(self, text: str) -> None:
        """Print one line, unless the stream has been closed."""
        text = printable(text)  # names may be anything
        if self.quiet or "stream" in self._failed:
            return
        if self.bar is not None:
            self.bar.write(text)
            return
        try:
            print(text, file=self.stream, flush=True)
        except (OSError, ValueError):  # a pipe or terminal that was closed
            self._failed.add("stream")

    def open_bar(self, total: float, done: float) -> None:
        """Show a bar below the lines, if they go to a terminal."""
        with contextlib.suppress(OSError, ValueError):
            if not self.quiet and self.stream.isatty():
                self.bar = StatusBar(total, self.stream)
                self.bar.update(done)

    def close_bar(self) -> None:
        """Remove the bar; lines are printed as before."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def advance(self, done: float) -> None:
        """Move the bar, if there is one."""
        if self.bar is not None:
            self.bar.update(done)

    def now(self, text: str) -> None:
        """Replace the text beside the bar; without a bar, nothing is printed."""
        if self.bar is not None:
            self.bar.text(text)

    def resume(self, step: int, **values: Any) -> None:
        """Record a resume; status records up to the last one before it are marked as replayed."""
        if not self.quiet:
            self._logged_until = _last_step(self.folder / "log.jsonl")
        self.record("resume", step=step, **values)

    def record(self, kind: str, **values: Any) -> None:
        """Append one record to `log.jsonl`."""
        if self.dry:
            return
        if kind == "status" and values["step"] <= self._logged_until:
            values["replayed"] = True
        facts = _finite({"kind": kind, "time": round(time.time(), 3), **values})
        try:
            _append(self.folder / "log.jsonl", json.dumps(facts, allow_nan=False))
        except OSError as error:
            self._warn("log.jsonl", error)
        if self.listener is not None:
            self.listener(kind, facts)

    def tell(self, kind: str, **values: Any) -> None:
        """Let the listener know, if there is one."""
        if self.listener is not None:
            self.listener(kind, values)

    def status(self, status: str, **values: Any) -> None:
        """Replace `run.json`: running, finished, preempted or failed, with the progress."""
        if self.dry:
            return
        facts = {"status": status, "pid": os.getpid(), "host": socket.gethostname(), **values}
        try:
            write_json(self.folder / "run.json", facts)
        except OSError as error:
            self._warn("run.json", error)

    def _warn(self, name: str, error: OSError) -> None:
        if name not in self._failed:
            self.say(f"warning: cannot write {self.folder / name}: {error}")
        self._failed.add(name)


def run_state(folder: Path) -> dict[str, Any]:
    """Content of `run.json`, empty if there is none; failed instead of running for a dead process.

    If this host can tell, the file is corrected, too.
    """
    file = folder / "run.json"
    state = read_json(file) if file.exists() else {}
    if isinstance(state, dict) and state.get("status") == "running" and _is_dead(folder, state):
        state |= {
            "status": "failed",
            "reason": "its process has ended without a word, as by a kill",
        }
        with contextlib.suppress(OSError, ValueError):
            write_json(file, state)
    return state


def _is_dead(folder: Path, state: dict[str, Any]) -> bool:
    held, pid = is_held(folder / "lock"), state.get("pid")
    if held is not None:
        return not held
    if os.name == "nt" or state.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass  # it is that of another user
    return False


def _finite(value: Any) -> Any:
    """Copy with None in the place of NaN and infinities, which JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _last_step(path: Path) -> int:
    """Highest step of the status records in a log, -1 without any."""
    last = -1
    try:
        with open_regular(path) as lines:
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    record = parse_json(line)
                    if record["kind"] == "status":
                        last = max(last, record["step"])
    except OSError:
        pass  # `record` will say so
    return last


def _append(path: Path, line: str) -> None:
    """Append a line, after a line break if a crash has cut the last one short."""
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | NO_LINK, 0o666)
    with os.fdopen(handle, "a+b") as stream:
        cut = b""
        if stream.tell():
            stream.seek(-1, os.SEEK_END)
            cut = b"" if stream.read(1) == b"\n" else b"\n"
        stream.write(cut + line.encode() + b"\n")
