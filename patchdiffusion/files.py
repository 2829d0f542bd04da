"""Files that are either whole or absent: atomic writes, durable renames, digests, the cache."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_UMASK = os.umask(0)
os.umask(_UMASK)


def cache_dir() -> Path:
    """$PATCHDIFFUSION_CACHE, else $XDG_CACHE_HOME/patchdiffusion, else ~/.cache/patchdiffusion."""
    if own := os.environ.get("PATCHDIFFUSION_CACHE"):
        return Path(own)
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
    """Let `write` fill a temporary neighbour, then rename it onto `path`.

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


def read_json(path: Path) -> Any:
    """Read a JSON file; raises `ValueError` that names the file when it is not valid JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


@contextlib.contextmanager
def folder_atomic(path: Path) -> Iterator[Path]:
    """A context with `<path>.tmp` to fill; on success it is flushed and renamed to `path`."""
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
