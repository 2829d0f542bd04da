"""Files mapped into memory, which may lose their end while they are read.

To touch a page that the file no longer has raises the signal SIGBUS, which ends the process without
a word. The handler of this module replaces such pages by zeros instead and marks the array, so that
a reader reaches its next call of `Mapped.check`, which raises an error. This costs nothing while
all is well, and holds in any library and thread that reads the array.
"""

import ctypes
import functools
import mmap
import signal
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from patchdiffusion.system.errors import Stop

DAMAGED = 23
"""Exit code."""
_FIXED = 0x10
"""MAP_FIXED of Linux, macOS and BSD, which the module `mmap` lacks."""
_TRIES = 64
"""Faults for which an array may be to blame: threads may touch the same pages at once."""
_MAPPED: "weakref.WeakKeyDictionary[mmap.mmap, Mapped]" = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class Mapped:
    """A file whose content an array maps into memory."""

    file: Path
    buffer: "weakref.ref[mmap.mmap]"
    address: int
    """Address of the first byte of the mapping."""
    faults: int = 0
    """Number of times that zeros were mapped in place of the file's end."""

    def check(self) -> None:
        """Raise `Stop` if the file was cut short since it was mapped."""
        buffer = self.buffer()
        if self.faults or (buffer is not None and _is_short(buffer)):
            raise Stop(f"{self.file} was cut short; prepare the data again", code=DAMAGED)

    def replace_lost(self) -> bool:
        """Map zeros in the place of pages that the file has lost; False if that cannot help."""
        buffer = self.buffer()  # which must not be unmapped in between
        if buffer is None or not _is_short(buffer) or self.faults >= _TRIES:
            return False
        kept = -(-buffer.size() // mmap.PAGESIZE) * mmap.PAGESIZE
        if kept < len(buffer):
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED
            start, size = self.address + kept, len(buffer) - kept
            if _c().mmap(start, size, mmap.PROT_READ, flags, -1, 0) != start:
                return False
        self.faults += 1
        return True


def watch(array: np.memmap, file: Path) -> Mapped:
    """Protect readers of an array, as numpy maps it, and of all views of it."""
    buffer: Any = array.base
    assert isinstance(buffer, mmap.mmap)
    address = array.ctypes.data - array.offset % mmap.ALLOCATIONGRANULARITY
    mapped = Mapped(file, weakref.ref(buffer), address)
    if hasattr(signal, "SIGBUS"):  # Windows shortens no file that is mapped
        _MAPPED[buffer] = mapped
        _install()
    return mapped


def _is_short(buffer: mmap.mmap) -> bool:
    try:
        return buffer.size() < len(buffer)
    except (OSError, ValueError):
        return False


@functools.cache
def _c() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
    library.signal.restype = ctypes.c_void_p
    library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    return library


@functools.cache
def _install() -> Any:
    """Set the handler; returns the object that C calls, which must live as long as the process.

    A handler of `signal.signal` would not do: it runs after the faulty instruction has succeeded,
    which without a change of the mapping is never.
    """
    previous: list[int | None] = []

    def handle(number: int) -> None:
        replaced = False
        try:
            for mapped in list(_MAPPED.values()):
                replaced |= mapped.replace_lost()
        finally:  # else the instruction is tried again, and what was there before has its turn
            if not replaced:
                _c().signal(number, previous[0])

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    previous.append(_c().signal(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p)))
    return handler
