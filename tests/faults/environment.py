"""Faults of the environment of a run: memory, disk, files."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from moments import at, during_saves

from patchdiffusion.data.pack import Pack
from patchdiffusion.system import files


def raise_in(phase: str, step: int, error: str) -> None:
    """An exception when a phase of a step begins."""
    kinds: dict[str, Callable[[], BaseException]] = {
        "memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        "bug": lambda: RuntimeError("a bug"),
    }

    def act() -> None:
        raise kinds[error]()

    at(phase, step, act)


def remove(path: str, phase: str, step: int) -> None:
    """Delete a folder or a file when a phase of a step begins."""
    at(phase, step, lambda: shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path))


def seize(path: str, phase: str, step: int) -> None:
    """Somebody deletes a lock, and another trainer takes it."""

    def act() -> None:
        Path(path).unlink()
        assert files._take(Path(path)) is not None

    at(phase, step, act)


def block(path: str, phase: str, step: int) -> None:
    """A folder takes the place of a file, which cannot be written any more."""

    def act() -> None:
        Path(path).unlink(missing_ok=True)
        Path(path).mkdir()

    at(phase, step, act)


def jump(seconds: float, phase: str, step: int) -> None:
    """Somebody sets the clock."""
    clock = time.time

    def act() -> None:
        time.time = lambda: clock() + seconds

    at(phase, step, act)


def forbid(path: str) -> None:
    """Nothing can be made below a folder, as where `chmod` has taken the right to write.

    For root, as whom these tests may run, `chmod` means nothing.
    """
    unnamed = getattr(os, "O_TMPFILE", -1)  # files that are opened by the name of their folder

    def refuse(call: Callable[..., Any]) -> Callable[..., Any]:
        def checked(name: Any, *args: Any, **kwargs: Any) -> Any:
            inside = args and args[0] & unnamed == unnamed
            made = Path(name) / "file" if inside else Path(name)
            if Path(path) in made.parents:
                raise PermissionError(13, "Permission denied", str(name))
            return call(name, *args, **kwargs)

        return checked

    os.open, os.mkdir = refuse(os.open), refuse(os.mkdir)


def limit_file_size(size: int, saves: list[int]) -> None:
    """No file may grow beyond `size` bytes during some saves: a full disk, to the program."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def limit(to: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (to, hard))

    during_saves(saves, lambda: limit(size), lambda: limit(hard))


def fill_disk(free: int, saves: list[int] | None = None) -> None:
    """The disk says that only so many bytes are free, during some saves or all the time."""
    usage = shutil.disk_usage
    full = usage("/")._replace(free=free)

    def fill() -> None:
        shutil.disk_usage = lambda path: full

    def empty() -> None:
        shutil.disk_usage = usage

    if saves is None:
        fill()
    else:
        during_saves(saves, fill, empty)


def cut(path: str, phase: str, step: int) -> None:
    """A file loses its second half."""
    at(phase, step, lambda: os.truncate(path, os.path.getsize(path) // 2))


def damage_pack(file: str, position: int, phase: str, step: int) -> None:
    """A byte of a pack changes while it is trained on, before its background check begins."""
    begin, verify = threading.Event(), Pack.verify

    def late(self: Pack) -> None:
        begin.wait()
        verify(self)

    def act() -> None:
        with open(file, "r+b") as stream:
            stream.seek(position)
            (byte,) = stream.read(1)
            stream.seek(position)
            stream.write(bytes([byte ^ 1]))
        begin.set()
        for thread in threading.enumerate():
            if thread.name == "verification":
                thread.join()

    Pack.verify = late
    at(phase, step, act)
