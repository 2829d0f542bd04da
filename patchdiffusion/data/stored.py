"""Packs in the cache: their sizes, the times of their last use, and their removal."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from patchdiffusion.data.pack import Pack
from patchdiffusion.data.packinfo import read_info
from patchdiffusion.data.store import packs_folder
from patchdiffusion.system.files import exclusively, lock

USED = "last-used"
"""File of a pack whose modification time is that of its last use."""

_DAY = 86_400


@dataclass(frozen=True)
class StoredPack:
    """Pack in the cache, or the remains of an unfinished one."""

    path: Path
    bytes: int
    shape: tuple[int, ...] | None
    """Shape of its images; None if it is unfinished or of another format."""
    used: float
    """Time of its last use, in seconds since 1970."""

    @property
    def days(self) -> float:
        """Days since its last use."""
        return max(time.time() - self.used, 0) / _DAY


def stored_packs() -> list[StoredPack]:
    """All packs in the cache, the most recently used first."""
    root = packs_folder()
    folders = [p for p in root.iterdir() if _is_own(p)] if root.is_dir() else []
    return sorted(map(_stored, folders), key=lambda pack: -pack.used)


def _is_own(path: Path) -> bool:
    """True if a folder in the cache is a pack, or the remains of one."""
    if path.is_symlink() or not path.is_dir():
        return False
    return (path / "pack.json").is_file() or path.suffix in (".tmp", ".old", ".removed")


def _stored(path: Path) -> StoredPack:
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file() and not f.is_symlink())
    times = [f.stat().st_mtime for f in (path / USED, path / "pack.json", path) if f.exists()]
    try:
        shape = read_info(path / "pack.json").shape
    except (OSError, ValueError):
        shape = None
    return StoredPack(path, size, shape, max(times))


def marked_used(pack: Pack) -> Pack:
    """Record the use of a pack in the cache; returns the pack."""
    if pack.path.parent == packs_folder():
        with contextlib.suppress(OSError):  # a cache that others have made
            (pack.path / USED).touch()
    return pack


def in_use(path: Path) -> bool:
    """True if a process has the pack open, or prepares it."""
    try:
        with _held(path):
            return False
    except ValueError:
        return True


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    """Context in which no other process can use a pack; raises `ValueError` if one does."""
    name = path.name.removesuffix(".tmp").removesuffix(".old").removesuffix(".removed")
    with lock(path.with_name(f"{name}.lock"), path):
        file = path / "pack.json"
        if file.is_file():
            with exclusively(file) as alone:
                if not alone:
                    raise ValueError(f"{path} is in use")
                yield
        else:
            yield


def find_packs(names: Sequence[str]) -> list[StoredPack]:
    """Packs by their names, or by the beginnings of their names.

    Raises `ValueError` for a name of no pack, or of several.
    """
    packs, selected = stored_packs(), []
    for name in names:
        named = Path(name).name if Path(name).parent == packs_folder() else name
        exact = [pack for pack in packs if pack.path.name == named]
        chosen = exact or [pack for pack in packs if named and pack.path.name.startswith(named)]
        if len(chosen) != 1:
            listed = ", ".join(pack.path.name for pack in chosen or packs) or "none"
            number = "several packs have" if chosen else "no pack has"
            raise ValueError(f"{number} the name {name!r}; packs are {listed}")
        selected += [pack for pack in chosen if pack not in selected]
    return selected


def remove_pack(pack: StoredPack) -> None:
    """Delete a pack; raises `ValueError`, and deletes nothing, if it is in use."""
    with _held(pack.path):
        aside = pack.path
        if pack.path.suffix != ".removed":
            aside = pack.path.with_name(f"{pack.path.name}.removed")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(pack.path, aside)  # at once: nobody opens half of it
        shutil.rmtree(aside)
    with contextlib.suppress(OSError):
        pack.path.with_name(f"{pack.path.name}.bad.txt").unlink()
