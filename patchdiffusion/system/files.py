"""Files: atomic writes, durable renames, digests, locks, and the folder of the cache."""

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchdiffusion.system.trust import NO_LINK, open_regular, read_regular

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None

_UMASK = os.umask(0)
os.umask(_UMASK)
_UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of file systems that cannot flush a folder or a file."""
_TOLD: set[str] = set()


def cache_dir() -> Path:
    """$PATCHDIFFUSION_CACHE, else $XDG_CACHE_HOME/patchdiffusion, else ~/.cache/patchdiffusion.

    Raises `OSError` for a user without a home.
    """
    if folder := os.environ.get("PATCHDIFFUSION_CACHE"):
        return Path(folder)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "patchdiffusion"
    try:
        return Path.home() / ".cache" / "patchdiffusion"
    except RuntimeError as error:
        raise OSError(
            "there is no home folder to keep prepared data in; name one by PATCHDIFFUSION_CACHE"
        ) from error


def expanded(path: str | Path) -> Path:
    """Path with `~` replaced; raises `ValueError` for an unknown user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path} does not exist: there is no such home folder") from error


def sha256(path: Path) -> str:
    """Hex SHA-256 digest of a file's content."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk, as far as the file system can."""
    try:
        handle = os.open(path, os.O_RDWR if os.name == "nt" and path.is_file() else os.O_RDONLY)
    except PermissionError:
        if not path.is_dir():
            raise
        return  # Windows opens no folders
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        _warn_once("flush", f"{path} cannot be flushed to the disk: a power cut may lose more")
    finally:
        os.close(handle)


def _follow_umask(path: Path) -> None:
    try:
        path.chmod(0o666 & ~_UMASK)
    except OSError as error:
        _warn_once("mode", f"the permissions of {path} cannot be changed: {error.strerror}")


def _warn_once(kind: str, text: str) -> None:
    if kind not in _TOLD:
        _TOLD.add(kind)
        print(f"warning: {text}", file=sys.stderr)


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file in the same folder, then rename it to `path`.

    A reader sees the old content or the new, never a part. Permissions follow the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        _follow_umask(temporary)
        fsync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes atomically."""

    def fill(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomic(path, fill)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinities are refused."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; raises `ValueError`, also for values that are nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path) -> Any:
    """Read a JSON file; raises `ValueError` that names the file when it is not valid JSON."""
    try:
        return parse_json(read_regular(path).decode())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def link_or_copy(source: Path, target: Path) -> None:
    """Make a file a second name of another one (a hard link), or a copy where that is impossible.

    Neither may be written to afterwards, only replaced.
    """
    source = source.resolve()
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def free_name(path: Path, name: str) -> Path:
    """The first free NAME-1, NAME-2 ... in the folder of a path."""
    number = 1
    while (free := path.with_name(f"{name}-{number}")).exists():
        number += 1
    return free


SEAL = "seal"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with a digest of themselves, so that a change is noticed; see `unsealed`."""
    text = json.dumps(dict(content), sort_keys=True, allow_nan=False)
    return {**content, SEAL: hashlib.sha256(text.encode()).hexdigest()}


def unsealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values without the digest of `sealed`; raises `ValueError` if they have changed.

    Files of older versions have no seal and are taken as they are.
    """
    plain = {key: value for key, value in content.items() if key != SEAL}
    try:
        intact = SEAL not in content or sealed(plain) == content
    except RecursionError:
        intact = False
    if not intact:
        raise ValueError("it was changed after it was written: its digest differs")
    return plain


def check_writable(folder: Path) -> None:
    """Raise `OSError` that names the folder if no file can be created in it."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"files cannot be created in {folder}: {error.strerror}") from error


def check_place(folder: Path) -> None:
    """Raise `OSError` if a folder cannot be made, or files in it; writes nothing."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists() or p.is_symlink())
    if not there.is_dir():
        raise OSError(f"{folder} cannot be made: {there} is no folder; choose another with --out")
    check_writable(there)


@contextlib.contextmanager
def folder_atomic(path: Path) -> Iterator[Path]:
    """Context of a folder `<path>.tmp` to fill; on success it is flushed and renamed to `path`."""
    temporary, old = (path.with_name(path.name + suffix) for suffix in (".tmp", ".old"))
    if old.exists() and not path.exists():  # an earlier process died between the two renames
        old.rename(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file() and file.stat().st_nlink == 1:  # not of another folder
                _follow_umask(file)
            fsync(file)
        fsync(temporary)
        # A rename onto a folder that is not empty fails; the old one goes last.
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
        fsync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- Locks ----


@dataclass
class Lock:
    """Right to write something, held as a lock on a file."""

    path: Path
    handle: int
    locked: bool
    """False where files cannot be locked."""

    def keep(self) -> bool:
        """True if the lock is still held; a deleted file is created again if it is free."""
        if not _is(self.path, self.handle):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            taken = _take(self.path) if self.locked or not self.path.exists() else None
            if taken is None:
                return False
            os.close(self.handle)
            self.handle, self.locked = taken
            self.sign()
        return True

    def sign(self) -> None:
        """Write the holder to the file."""
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
        os.ftruncate(self.handle, 0)
        os.lseek(self.handle, 0, os.SEEK_SET)
        os.write(self.handle, json.dumps(facts).encode() + b"\n")


@contextlib.contextmanager
def lock(
    path: Path,
    what: Path,
    *,
    patience: float = 0.0,
    waiting: Callable[[str], object] | None = None,
) -> Iterator[Lock]:
    """Hold an exclusive lock on a file, which stands for the right to write `what`.

    The file names its holder. The system releases the lock when the process ends, however it ends.
    Waits `patience` seconds for another holder, which is passed to `waiting` once, then raises
    `ValueError` that names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    while (taken := _take(path)) is None:
        message = f"{what} is in use {_holder(path)}"
        if time.monotonic() - start > patience:
            raise ValueError(message)
        if waiting is not None:
            waiting(message)
            waiting = None
        time.sleep(0.1)
    held = Lock(path, *taken)
    try:
        held.sign()
        yield held
    finally:
        if _is(path, held.handle):
            with contextlib.suppress(PermissionError):  # Windows deletes no open file
                path.unlink()
        os.close(held.handle)


def is_held(path: Path) -> bool | None:
    """True if a process holds a lock; None if unknown."""
    if fcntl is None:
        return None
    try:
        handle = os.open(path, os.O_RDONLY | NO_LINK)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(handle)
    return False


def _take(path: Path) -> tuple[int, bool] | None:
    """Open handle and whether it is locked; None if another process holds the lock."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o666)
    if fcntl is None:
        return handle, False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:  # a file system without locks
        return handle, False
    if not _is(path, handle):  # its holder has deleted it in the meantime
        os.close(handle)
        return None
    return handle, True


def _is(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except OSError:
        return False


def _holder(path: Path) -> str:
    try:
        facts = read_json(path)
        return f"by process {facts['pid']} on {facts['host']} since {facts['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "by another process"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def share(path: Path) -> Callable[[], None]:
    """Take a shared lock on a file, which is released by calling the result."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return lambda: None
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return functools.partial(os.close, handle)


@contextlib.contextmanager
def exclusively(path: Path) -> Iterator[bool]:
    """Context of an exclusive lock on a file; yields False if it is shared or cannot be locked."""
    handle = os.open(path, os.O_RDONLY)
    try:
        alone = fcntl is not None
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                alone = False
        yield alone
    finally:
        os.close(handle)
