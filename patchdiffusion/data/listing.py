"""List the files of a folder or zip: images, texts and tables, and counts of others by kind."""

import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from patchdiffusion.data.captions import TEXT
from patchdiffusion.data.decode import EXTENSIONS
from patchdiffusion.data.junk import RUNS, is_run, is_run_config, junk_in, kind_of_junk
from patchdiffusion.data.limits import member_content
from patchdiffusion.data.tables import is_table
from patchdiffusion.system.text import printable

SHARDS = (".tar", ".parquet", ".arrow")
"""Extensions of files that hold many images with their labels and captions."""
_MAX_DEPTH = 64
"""Number of nested folders; deeper ones are reported as not read."""
_LARGEST_CONFIG = 2**20


class Entry(NamedTuple):
    """A file: its path below the folder, its size, and a mark that changes with its content."""

    key: str
    size: int
    mark: int


@dataclass
class Listing:
    """Files of a folder or zip by kind."""

    images: list[Entry] = field(default_factory=list)
    texts: list[Entry] = field(default_factory=list)
    """Text files, which may hold captions."""
    tables: list[Entry] = field(default_factory=list)
    """Tables, which may hold labels or captions."""
    shards: list[Entry] = field(default_factory=list)
    """Archives and tables that hold images themselves, by their names."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Number of ignored files and folders, by kind."""
    notes: list[str] = field(default_factory=list)
    members: dict[str, zipfile.ZipInfo] = field(default_factory=dict)
    """Members of a zip, by the name under which they are listed."""

    def add(self, entry: Entry) -> None:
        """Add a file to the list of its kind, by its name."""
        if is_table(entry.key):
            self.tables.append(entry)
        elif suffix(entry.key) == TEXT:
            self.texts.append(entry)
        elif suffix(entry.key) in EXTENSIONS:
            self.images.append(entry)
        elif suffix(entry.key) in SHARDS:
            self.shards.append(entry)
        else:
            self.ignored[suffix(entry.key)] += 1


def suffix(name: str) -> str:
    """Extension of a name in lower case."""
    return PurePosixPath(name).suffix.lower() or "no extension"


# ---- A folder ----


def list_folder(root: Path) -> Listing:
    """List all files below a folder; symbolic links are followed, each real folder once.

    Real folders first, so that a link to a folder of the same tree adds nothing.
    """
    listing = Listing()
    seen: set[tuple[int, int]] = set()
    links = [""]
    while links:
        pending, links = links, []
        while pending:
            prefix = pending.pop()
            for child in _children(root, prefix, seen, listing):
                key = f"{prefix}/{child.name}" if prefix else child.name
                try:
                    inner = child.is_dir()
                except OSError:  # a link to itself; reading it will tell
                    inner = False
                if kind := kind_of_junk(child.name, folder=inner):
                    listing.ignored[kind] += 1
                elif inner and is_run(root / key):
                    listing.ignored[RUNS] += 1
                elif inner:
                    (links if child.is_symlink() else pending).append(key)
                else:
                    _add_file(listing, key, child)
    return listing


def _children(
    root: Path, prefix: str, seen: set[tuple[int, int]], listing: Listing
) -> list[os.DirEntry[str]]:
    """Entries of a folder in the order of their names; empty if it has been read already."""
    if prefix.count("/") >= _MAX_DEPTH:
        listing.notes.append(f"folder not read: {printable(prefix[:80])}... is too deep")
        return []
    try:
        status = os.stat(root / prefix)
        if (status.st_dev, status.st_ino) in seen:
            listing.notes.append(f"linked folder read already: {printable(prefix)}")
            return []
        seen.add((status.st_dev, status.st_ino))
        return sorted(os.scandir(root / prefix), key=lambda child: child.name)
    except OSError as error:
        listing.notes.append(
            f"folder not readable: {printable(prefix or str(root))}: {error.strerror}"
        )
        return []


def _add_file(listing: Listing, key: str, child: os.DirEntry[str]) -> None:
    try:
        status = child.stat()
    except OSError:  # a broken link; reading it will tell
        listing.add(Entry(key, -1, 0))
        return
    if stat.S_ISREG(status.st_mode):
        listing.add(Entry(key, status.st_size, status.st_mtime_ns))
    elif suffix(key) in EXTENSIONS:
        listing.ignored["special file"] += 1
    else:
        listing.ignored[suffix(key)] += 1


# ---- A zip ----


def leads_outside(name: str) -> bool:
    """True if a file of this name in a zip would, on any system, be unpacked outside of it."""
    above = name.startswith("/") or ".." in name.split("/")
    return above or re.match("[A-Za-z]:", name) is not None


def member_name(info: zipfile.ZipInfo) -> str:
    """Intended name of a member of a zip.

    Backslashes are separators, as written by PowerShell and .NET. Names that are valid UTF-8 but
    not marked as such, as written by macOS, are read as UTF-8, others as code page 437.
    """
    name = info.filename
    if not info.flag_bits & 0x800:
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:
            name = info.filename
    return name.replace("\\", "/")


def list_zip(path: Path, archive: zipfile.ZipFile) -> Listing:
    """List all members of a zip; raises `ValueError` if names are repeated or lead outside."""
    listing = Listing()
    entries: list[Entry] = []
    for info in archive.infolist():
        name = member_name(info)
        if leads_outside(name):
            raise ValueError(
                f"{path} is refused: the name {info.filename!r} leads outside of the zip"
            )
        if name in listing.members:
            raise ValueError(f"{path} is refused: the name {name!r} occurs twice")
        listing.members[name] = info
        if not name.endswith("/"):
            entries.append(Entry(name, info.file_size, info.CRC))
    runs = _runs(archive, listing.members)
    ignored: dict[str, str] = {}
    for entry in entries:
        if junk := _within(entry.key, runs) or junk_in(entry.key):
            ignored[junk[0]] = junk[1]
        else:
            listing.add(entry)
    listing.ignored.update(Counter(ignored.values()))
    return listing


def _runs(archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> set[str]:
    """Folders of runs among the members of a zip, without its top."""
    folders = set()
    for name, info in members.items():
        folder, _, file = name.rpartition("/")
        if not folder or file != "config.json" or info.file_size > _LARGEST_CONFIG:
            continue
        if f"{folder}/log.jsonl" in members or is_run_config(_content(archive, info)):
            folders.add(folder)
    return folders


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    try:
        return member_content(archive, info)
    except Exception:  # CRC, truncation, encryption and each compression's own
        return b""


def _within(key: str, folders: set[str]) -> tuple[str, str] | None:
    parents = (str(parent) for parent in PurePosixPath(key).parents)
    return next(((parent, RUNS) for parent in parents if parent in folders), None)
