"""Image files as a `Source`: a folder, a zip, or either of them with an EDM `dataset.json`."""

import hashlib
import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from patchdiffusion.data.captions import TABLES, TEXT, Captions, find_captions
from patchdiffusion.data.decode import EXTENSIONS, decode
from patchdiffusion.data.example import BadImage, Example
from patchdiffusion.data.labels import LABEL_FILE, edm_labels, folder_labels, natural
from patchdiffusion.data.pixels import unit_span

_MAX_BYTES = 2**30


@dataclass(frozen=True)
class FileSource:
    """A `Source` of image files; `read(key)` returns the bytes of one of them."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[str], bytes] = field(repr=False)
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] = ()
    stamp: str = ""
    notes: tuple[str, ...] = ()
    ignored: dict[str, int] = field(default_factory=dict)
    captions: Captions = field(default_factory=Captions)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Example:
        key = self.keys[index]
        image, mode = decode(self.read(key), key)
        label = None if self.labels is None else self.labels[index]
        caption, complaints = self.captions.of(key, self.read)
        return Example(
            image,
            label,
            key,
            span=unit_span(image),
            mode=mode,
            caption=caption,
            complaints=complaints,
        )


@dataclass(frozen=True)
class _Listing:
    """Files of a folder or zip: (key, size, change mark) of each image, and ignored files."""

    entries: list[tuple[str, int, int]]
    texts: list[tuple[str, int, int]]
    """Files that may hold captions, in the same form."""
    ignored: Counter[str]
    label_file: bool
    notes: tuple[str, ...] = ()


def folder_source(path: Path) -> FileSource:
    """All images below a folder; symbolic links are followed, each real folder once."""
    listing = _scan(path)

    def read(key: str) -> bytes:
        try:
            file = path / key
            if file.stat().st_size > _MAX_BYTES:
                raise BadImage(key, f"larger than {_MAX_BYTES} bytes")
            return file.read_bytes()
        except OSError as error:
            raise BadImage(key, error.strerror or type(error).__name__) from error

    return _source(path.resolve().name, path, listing, read)


def zip_source(path: Path) -> FileSource:
    """All images in a zip, read in place.

    Raises `ValueError` if it is no zip, or if names are repeated or lead outside.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} cannot be read as a zip: {error}") from error
    listing = _list_zip(path, archive)

    def read(key: str) -> bytes:
        try:
            info = archive.getinfo(key)
            if info.file_size > _MAX_BYTES:
                raise BadImage(key, f"larger than {_MAX_BYTES} bytes")
            return archive.read(info)
        except BadImage:
            raise
        except Exception as error:  # CRC, truncation, encryption and each compression's own
            raise BadImage(key, f"cannot be read from the zip: {error}") from error

    return _source(path.stem, path, listing, read)


def _visible(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "no extension"


def _scan(root: Path) -> _Listing:
    """List a folder; real folders first, so that a link to one of the same tree adds nothing."""
    entries: list[tuple[str, int, int]] = []
    texts: list[tuple[str, int, int]] = []
    ignored: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    repeated: list[str] = []
    unreadable: list[str] = []
    links = [""]
    while links:
        pending, links = links, []
        while pending:
            prefix = pending.pop()
            status = os.stat(root / prefix)
            if (status.st_dev, status.st_ino) in seen:
                repeated.append(prefix)
                continue
            seen.add((status.st_dev, status.st_ino))
            try:
                children = sorted(os.scandir(root / prefix), key=lambda child: child.name)
            except OSError as error:
                unreadable.append(f"{prefix or root}: {error.strerror}")
                continue
            for child in children:
                key = f"{prefix}/{child.name}" if prefix else child.name
                if not _visible(child.name):
                    ignored["hidden"] += 1
                elif child.is_dir():
                    (links if child.is_symlink() else pending).append(key)
                else:
                    _add(key, child, texts if _may_caption(key) else entries, ignored)
    notes = [f"linked folder read already: {key}" for key in repeated]
    notes += [f"folder not readable: {text}" for text in unreadable]
    has_labels = (root / LABEL_FILE).is_file()
    return _Listing(entries, texts, ignored, has_labels, tuple(notes))


def _may_caption(name: str) -> bool:
    return name.endswith(TEXT) or name.rpartition("/")[2] in TABLES


def _add(
    key: str, child: os.DirEntry[str], entries: list[tuple[str, int, int]], ignored: Counter[str]
) -> None:
    if key == LABEL_FILE:
        return
    if _suffix(key) not in EXTENSIONS and not _may_caption(key):
        ignored[_suffix(key)] += 1
        return
    try:
        status = child.stat()
    except OSError:  # a broken link; reading it will tell
        entries.append((key, -1, 0))
        return
    if stat.S_ISREG(status.st_mode):
        entries.append((key, status.st_size, status.st_mtime_ns))
    else:
        ignored["special file"] += 1


def leads_outside(name: str) -> bool:
    """Whether a file of this name in a zip would, on any system, be unpacked outside of it."""
    above = name.startswith("/") or ".." in name.split("/")
    return above or "\\" in name or re.match("[A-Za-z]:", name) is not None


def _list_zip(path: Path, archive: zipfile.ZipFile) -> _Listing:
    entries: list[tuple[str, int, int]] = []
    texts: list[tuple[str, int, int]] = []
    ignored: Counter[str] = Counter()
    names: set[str] = set()
    for info in archive.infolist():
        name = info.filename
        if leads_outside(name):
            raise ValueError(f"{path} is refused: the name {name!r} leads outside of the zip")
        if name in names:
            raise ValueError(f"{path} is refused: the name {name!r} occurs twice")
        names.add(name)
        if info.is_dir() or name == LABEL_FILE:
            continue
        if not all(_visible(part) for part in name.split("/")):
            ignored["hidden"] += 1
        elif _may_caption(name):
            texts.append((name, info.file_size, info.CRC))
        elif _suffix(name) not in EXTENSIONS:
            ignored[_suffix(name)] += 1
        else:
            entries.append((name, info.file_size, info.CRC))
    return _Listing(entries, texts, ignored, LABEL_FILE in names)


def _source(name: str, path: Path, listing: _Listing, read: Callable[[str], bytes]) -> FileSource:
    if not listing.entries:
        ignored = listing.ignored + Counter(_suffix(name) for name, _, _ in listing.texts)
        others = ", ".join(f"{kind} {count}" for kind, count in ignored.most_common())
        content = f"no images, only other files ({others})" if ignored else "no images"
        raise ValueError(f"{path} holds {content}; images end in {' '.join(sorted(EXTENSIONS))}")
    entries = sorted(listing.entries, key=lambda entry: natural(entry[0]))
    if grids := _grids([key for key, _, _ in entries]):
        entries = [entry for entry in entries if entry[0] not in grids]
        listing.ignored["grid of samples"] = len(grids)
    keys = tuple(entry[0] for entry in entries)
    captions, used = _captions(listing, keys, read)
    labels = None
    notes = (*listing.notes, *captions.notes)
    if listing.label_file:
        labels, classes, note = edm_labels(path, read(LABEL_FILE), keys)
    else:
        labels, classes, note = folder_labels(keys)
    notes += note
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(repr(entry).encode())
    digest.update(repr((labels, classes)).encode())
    for entry in used:
        digest.update(repr(entry).encode())
    ignored = dict(listing.ignored.most_common())
    stamp = digest.hexdigest()
    return FileSource(name, keys, read, labels, classes, stamp, notes, ignored, captions)


def _captions(
    listing: _Listing, keys: tuple[str, ...], read: Callable[[str], bytes]
) -> tuple[Captions, list[tuple[str, int, int]]]:
    """Captions of images, and the files that hold them; other texts are ignored and counted."""
    texts = sorted(listing.texts)
    tables = [name for name, _, _ in texts if name.rpartition("/")[2] in TABLES]
    captions = find_captions(keys, [n for n, _, _ in texts if n.endswith(TEXT)], tables, read)
    names = {*captions.files.values(), *tables}
    listing.ignored.update(_suffix(name) for name, _, _ in texts if name not in names)
    return captions, [entry for entry in texts if entry[0] in names]


def _grids(keys: list[str]) -> set[str]:
    """Keys of the overviews that `patchdiffusion sample` writes beside its samples."""
    sample = re.compile(r"(^|/)seed-\d{8}\.(png|tiff)$")
    samples = {key.rpartition("/")[0] for key in keys if sample.search(key)}
    grids = {f"{folder}/grid.png" if folder else "grid.png" for folder in samples}
    return grids & set(keys)
