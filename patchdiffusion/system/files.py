"""Files: atomic writes, durable renames, digests, locks, and the folder of the cache."""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None

_UMASK = os.umask(0)
os.umask(_UMASK)


def cache_dir() -> Path:
    """$PATCHDIFFUSION_CACHE, else $XDG_CACHE_HOME/patchdiffusion, else ~/.cache/patchdiffusion."""
    if folder := os.environ.get("PATCHDIFFUSION_CACHE"):
        return Path(folder)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "patchdiffusion"
    return Path.home() / ".cache" / "patchdiffusion"


def sha256(path: Path) -> str:
    """Hex SHA-256 digest of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
        temporary.chmod(0o666 & ~_UMASK)
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
        return parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def check_writable(folder: Path) -> None:
    """Raise `OSError` that names the folder if no file can be created in it."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"files cannot be created in {folder}: {error.strerror}") from error


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
            if file.is_file():
                file.chmod(0o666 & ~_UMASK)
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


@contextlib.contextmanager
def lock(
    path: Path,
    what: Path,
    *,
    patience: float = 0.0,
    waiting: Callable[[str], object] | None = None,
) -> Iterator[bool]:
    """Hold an exclusive lock on a file, which stands for the right to write `what`.

    The file names its holder. The system releases the lock when the process ends, however it ends.
    Waits `patience` seconds for another holder, which is passed to `waiting` once, then raises
    `ValueError` that names it. Yields False where files cannot be locked.
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
    handle, locked = taken
    try:
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
        os.truncate(handle, 0)
        os.pwrite(handle, json.dumps(facts).encode() + b"\n", 0)
        yield locked
    finally:
        if _is(path, handle):
            path.unlink()
        os.close(handle)


def _take(path: Path) -> tuple[int, bool] | None:
    """Open handle and whether it is locked; None if another process holds the lock."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
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
