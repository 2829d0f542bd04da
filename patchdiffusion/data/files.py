"""Image files as a `Source`: a folder, a zip, or either of them with an EDM `dataset.json`."""

import hashlib
import os
import re
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from patchdiffusion.data.decode import EXTENSIONS, decode
from patchdiffusion.data.example import MAX_LABEL, BadImage, Example
from patchdiffusion.data.pixels import unit_span
from patchdiffusion.system.files import parse_json

_MAX_BYTES = 2**30
_LABEL_FILE = "dataset.json"


@dataclass(frozen=True)
class FileSource:
    """A `Source` of image files; `read(key)` gives the bytes of one of them."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[str], bytes] = field(repr=False)
    labels: tuple[int, ...] | None = None
    classes: tuple[str, ...] = ()
    stamp: str = ""
    notes: tuple[str, ...] = ()
    ignored: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Example:
        key = self.keys[index]
        image, mode = decode(self.read(key), key)
        label = None if self.labels is None else self.labels[index]
        return Example(image, label, key, span=unit_span(image), mode=mode)


@dataclass(frozen=True)
class _Listing:
    """What was found: (key, size, change mark) of each image, and what was passed over."""

    entries: list[tuple[str, int, int]]
    ignored: Counter[str]
    label_file: bool
    notes: tuple[str, ...] = ()


def natural(text: str) -> tuple[list[str | int], str]:
    """A sort key by which img2 comes before img10, the same in any locale."""
    parts = re.split("([0-9]+)", text.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], text


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
    """Real folders first, so that a link to a folder of the same tree adds nothing."""
    entries: list[tuple[str, int, int]] = []
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
                    _add(key, child, entries, ignored)
    notes = [f"linked folder read already: {key}" for key in repeated]
    notes += [f"folder not readable: {text}" for text in unreadable]
    has_labels = (root / _LABEL_FILE).is_file()
    return _Listing(entries, ignored, has_labels, tuple(notes))


def _add(
    key: str, child: os.DirEntry[str], entries: list[tuple[str, int, int]], ignored: Counter[str]
) -> None:
    if key == _LABEL_FILE:
        return
    if _suffix(key) not in EXTENSIONS:
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
    """Whether a name in a zip is, on any system, that of a file outside of where it is unpacked."""
    above = name.startswith("/") or ".." in name.split("/")
    return above or "\\" in name or re.match("[A-Za-z]:", name) is not None


def _list_zip(path: Path, archive: zipfile.ZipFile) -> _Listing:
    entries: list[tuple[str, int, int]] = []
    ignored: Counter[str] = Counter()
    names: set[str] = set()
    for info in archive.infolist():
        name = info.filename
        if leads_outside(name):
            raise ValueError(f"{path} is refused: the name {name!r} leads outside of the zip")
        if name in names:
            raise ValueError(f"{path} is refused: the name {name!r} occurs twice")
        names.add(name)
        if info.is_dir() or name == _LABEL_FILE:
            continue
        if not all(_visible(part) for part in name.split("/")):
            ignored["hidden"] += 1
        elif _suffix(name) not in EXTENSIONS:
            ignored[_suffix(name)] += 1
        else:
            entries.append((name, info.file_size, info.CRC))
    return _Listing(entries, ignored, _LABEL_FILE in names)


def _source(name: str, path: Path, listing: _Listing, read: Callable[[str], bytes]) -> FileSource:
    ignored = dict(listing.ignored.most_common())
    if not listing.entries:
        others = ", ".join(f"{kind} {count}" for kind, count in ignored.items())
        found = f"no images, only other files ({others})" if ignored else "no images"
        raise ValueError(f"{path} holds {found}; images end in {' '.join(sorted(EXTENSIONS))}")
    entries = sorted(listing.entries, key=lambda entry: natural(entry[0]))
    if grids := _grids([key for key, _, _ in entries]):
        entries = [entry for entry in entries if entry[0] not in grids]
        ignored["grid of samples"] = len(grids)
    keys = tuple(entry[0] for entry in entries)
    labels = None
    notes = listing.notes
    if listing.label_file:
        labels, classes, note = _edm_labels(path, read(_LABEL_FILE), keys)
    else:
        labels, classes, note = _folder_labels(keys)
    notes += note
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(repr(entry).encode())
    digest.update(repr((labels, classes)).encode())
    return FileSource(name, keys, read, labels, classes, digest.hexdigest(), notes, ignored)


def _grids(keys: list[str]) -> set[str]:
    """The overview beside each set of samples, which `patchdiffusion sample` has drawn."""
    sample = re.compile(r"(^|/)seed-\d{8}\.(png|tiff)$")
    samples = {key.rpartition("/")[0] for key in keys if sample.search(key)}
    grids = {f"{folder}/grid.png" if folder else "grid.png" for folder in samples}
    return grids & set(keys)


def _folder_labels(
    keys: tuple[str, ...],
) -> tuple[tuple[int, ...] | None, tuple[str, ...], tuple[str, ...]]:
    """Labels by the first folder that differs, if every image lies in such a folder."""
    folders = [key.split("/")[:-1] for key in keys]
    levels = zip(*folders, strict=False)
    depth = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    loose = sum(len(parts) == depth for parts in folders)
    if loose:
        mixed = f"no labels: {loose} of {len(keys)} images lie outside of the sub-folders"
        return None, (), (mixed,) if loose < len(keys) else ()
    heads = [parts[depth] for parts in folders]
    classes = tuple(sorted(set(heads), key=natural))
    index = {head: i for i, head in enumerate(classes)}
    return tuple(index[head] for head in heads), classes, ()


def _pairs(path: Path, content: bytes) -> Iterator[tuple[str, int]]:
    rule = '{"labels": [["name.png", 3], ...]} or {"labels": null}'
    try:
        rows = parse_json(content)["labels"] or []
        for key, label in rows:
            if not isinstance(key, str):
                raise TypeError(f"{key!r} is not the name of an image")
            if isinstance(label, bool) or not isinstance(label, int) or label < 0:
                raise ValueError(f"the label of {key!r} is {label!r}, not an integer from 0")
            yield key, label
    except (ValueError, TypeError, KeyError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{_LABEL_FILE} of {path} is not of the form {rule} ({problem})"
        ) from error


def _edm_labels(
    path: Path, content: bytes, keys: tuple[str, ...]
) -> tuple[tuple[int, ...] | None, tuple[str, ...], tuple[str, ...]]:
    table = dict(_pairs(path, content))
    if not table:
        return None, (), ()
    missing = [key for key in keys if key not in table]
    if missing:
        raise ValueError(
            f"{_LABEL_FILE} of {path} gives no label for {len(missing)} of {len(keys)} images, "
            f"the first is {missing[0]!r}"
        )
    labels = tuple(table[key] for key in keys)
    if max(labels) > MAX_LABEL:
        raise ValueError(f"{_LABEL_FILE} of {path} has the label {max(labels)} > {MAX_LABEL}")
    classes = tuple(str(i) for i in range(max(labels) + 1))
    absent = sorted(table.keys() - set(keys))
    if not absent:
        return labels, classes, ()
    told = f"{len(absent)} images that are not there, the first is {absent[0]!r}"
    return labels, classes, (f"{_LABEL_FILE} names {told}",)
