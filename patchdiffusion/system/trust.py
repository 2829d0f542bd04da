"""Protection against pipes, links and files of other users in the folders of this program."""

import os
import stat
from io import BufferedReader
from pathlib import Path

NO_LINK = getattr(os, "O_NOFOLLOW", 0)
"""Flag of `os.open` that refuses a link; 0 where there is none."""
_NO_WAIT = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_ALL_WRITE = stat.S_IWOTH
_OTHERS_WRITE = stat.S_IWGRP | _ALL_WRITE


def open_regular(path: Path, flags: int = 0) -> BufferedReader:
    """Open a file to be read; `OSError` if it is a pipe or device, which might never end."""
    handle = os.open(path, os.O_RDONLY | _NO_WAIT | flags)
    try:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            return os.fdopen(handle, "rb")
        raise OSError(f"{path} is no regular file")
    except BaseException:
        os.close(handle)
        raise


def read_regular(path: Path) -> bytes:
    """The content of a file; `OSError` if it is a pipe or device."""
    with open_regular(path) as stream:
        return stream.read()


def own_content(path: Path) -> bytes | None:
    """Content of a file that only this user can have written, else None.

    File and folder must belong to this user, let nobody else write, and be no links. Where files
    have no owners, as on Windows, nothing can be said of them.
    """
    if not hasattr(os, "getuid"):
        return None
    try:
        folder = os.lstat(path.parent)
        with open_regular(path, NO_LINK) as stream:
            file = os.fstat(stream.fileno())
            if stat.S_ISDIR(folder.st_mode) and _is_own(folder) and _is_own(file):
                return stream.read() if file.st_nlink == 1 else None
    except OSError:
        pass
    return None


def is_own_file(path: Path) -> bool:
    """True if there is a file of this user, which is enough for numbers that are cached."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and _is_own(status, _ALL_WRITE)


def _is_own(status: os.stat_result, writers: int = _OTHERS_WRITE) -> bool:
    known = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    return known and not status.st_mode & writers


def make_private(folder: Path) -> None:
    """Make a folder private; raises `OSError` if it is a link or belongs to another user."""
    handle = os.open(folder, os.O_RDONLY | NO_LINK)
    try:
        os.fchmod(handle, 0o700)
    finally:
        os.close(handle)


def check_links(folder: Path) -> None:
    """Raise `ValueError` if a link below a folder leads out of it."""
    root = os.path.realpath(folder)
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(where, name)
            if os.path.islink(path):
                target = os.path.realpath(path)
                if os.path.commonpath([root, target]) != root:
                    raise ValueError(
                        f"{path} is a link to {target}, out of the run: nothing is read or written "
                        "through it; remove it"
                    )
