"""Image files as a `Source`: a folder or a zip, with labels and captions that lie beside them."""

import hashlib
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from patchdiffusion.data.captions import TABLES, TEXT, Captions, find_captions
from patchdiffusion.data.decode import EXTENSIONS, Decoded, images_of
from patchdiffusion.data.depths import find_depths, read_depth
from patchdiffusion.data.example import BadImage, Example
from patchdiffusion.data.labels import Labels, LabelSource, find_labels, natural
from patchdiffusion.data.limits import MAX_BYTES, member_content
from patchdiffusion.data.listing import Entry, Listing, list_folder, list_zip, suffix
from patchdiffusion.data.splits import HELD_OUT, TEST, TRAIN
from patchdiffusion.data.tables import Table
from patchdiffusion.system.text import counted
from patchdiffusion.system.trust import read_regular


@dataclass(frozen=True)
class FileSource:
    """A `Source` of image files; `read(key)` returns the bytes of one of them."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[str], bytes] = field(repr=False)
    labels: tuple[int | None, ...] | None = None
    classes: tuple[str, ...] = ()
    held_out: tuple[bool, ...] | None = None
    """True for each image that is held out from training; None without splits."""
    stamp: str = ""
    notes: tuple[str, ...] = ()
    ignored: dict[str, int] = field(default_factory=dict)
    captions: Captions = field(default_factory=Captions)
    depths: dict[str, str] = field(default_factory=dict)
    """Depth file of each image that has one."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def has_stacks(self) -> bool:
        """True if files may hold many images."""
        return any(suffix(key) in (".tif", ".tiff") for key in self.keys)

    def __getitem__(self, index: int) -> Example:
        first = next(iter(self.examples(index)))
        if isinstance(first, BadImage):
            raise first
        return first

    def examples(self, index: int) -> Iterator[Example | BadImage]:
        """All pages of a file; together they are a group."""
        key = self.keys[index]
        for name, content in images_of(self.read(key), key):
            if isinstance(content, BadImage):
                yield content
            else:
                yield self._example(index, name, content)

    def _example(self, index: int, name: str, content: Decoded) -> Example:
        key = self.keys[index]
        label = None if self.labels is None else self.labels[index]
        caption, complaints = self.captions.of(key, self.read)
        depth = self.depths.get(key)
        return Example(
            content.image,
            label,
            name,
            None if name == key else key,
            alpha=content.alpha,
            span=content.span,
            mode=content.mode,
            held_out=None if self.held_out is None else self.held_out[index],
            caption=caption,
            complaints=complaints,
            columns={"depth": read_depth(depth, self.read)} if depth else {},
        )


def folder_source(
    path: Path, labels: LabelSource = "auto", listing: Listing | None = None
) -> FileSource:
    """All images below a folder; symbolic links are followed, each real folder once.

    `listing` are its files, if they are listed already.
    """
    listing = list_folder(path) if listing is None else listing

    def read(key: str) -> bytes:
        try:
            file = path / key
            if file.stat().st_size > MAX_BYTES:
                raise BadImage(key, f"larger than {MAX_BYTES} bytes")
            return read_regular(file)
        except OSError as error:
            raise BadImage(key, error.strerror or type(error).__name__) from error

    return file_source(path.resolve().name, path, listing, read, labels)


def zip_source(path: Path, labels: LabelSource = "auto") -> FileSource:
    """All images in a zip, read in place.

    Raises `ValueError` if it is no zip, or if names are repeated or lead outside.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} cannot be read as a zip: {error}") from error
    listing = list_zip(path, archive)

    def read(key: str) -> bytes:
        try:
            return member_content(archive, listing.members[key])
        except Exception as error:  # CRC, truncation, encryption and each compression's own
            raise BadImage(key, f"cannot be read from the zip: {error}") from error

    return file_source(path.stem, path, listing, read, labels)


def file_source(
    name: str,
    path: Path,
    listing: Listing,
    read: Callable[[str], bytes],
    source: LabelSource,
    members: Table | None = None,
) -> FileSource:
    """Source of listed files; `members` is a table of their labels and captions, if there is one.

    Raises `ValueError` if there are no images among them.
    """
    if not listing.images:
        for entry in (*listing.texts, *listing.tables, *listing.shards):
            listing.ignored[suffix(entry.key)] += 1
        others = ", ".join(f"{kind} {count}" for kind, count in listing.ignored.most_common())
        content = f"no images, only other files ({others})" if others else "no images"
        raise ValueError(f"{path} holds {content}; images end in {' '.join(sorted(EXTENSIONS))}")
    for entry in listing.shards:
        listing.ignored[suffix(entry.key)] += 1
    entries = sorted(listing.images, key=lambda entry: natural(entry.key))
    if grids := _grids([entry.key for entry in entries]):
        entries = [entry for entry in entries if entry.key not in grids]
        listing.ignored["grid of samples"] = len(grids)
    depths = find_depths([entry.key for entry in entries])
    beside = set(depths.values())
    aside = [entry for entry in entries if entry.key in beside]
    entries = [entry for entry in entries if entry.key not in beside]
    keys = [entry.key for entry in entries]
    tables = sorted(entry.key for entry in listing.tables)
    try:
        labeled = find_labels(keys, tables, read, source, members)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    splits = labeled.splits or (None,) * len(keys)
    left_out = HELD_OUT in splits  # else the test images are those that are held out
    kept = [i for i, split in enumerate(splits) if not (left_out and split == TEST)]
    keys = tuple(keys[i] for i in kept)
    captions, texts = _captions(listing, keys, read, labeled)
    notes = (*listing.notes, *captions.notes, *labeled.notes)
    if gone := len(splits) - len(kept):
        images = counted(gone, "test image is", "test images are")
        notes += (f"splits: {images} left out: neither trained on nor held out",)
    labels = None if labeled.labels is None else tuple(labeled.labels[i] for i in kept)
    held = None if labeled.splits is None else tuple(splits[i] != TRAIN for i in kept)
    digest = hashlib.sha256()
    for i in kept:
        digest.update(repr(tuple(entries[i])).encode())
    # What is usual has the stamp that it had before there was anything else.
    extra = () if held is None else (held,)
    digest.update(repr((labels, labeled.classes, *extra)).encode())
    for entry in (*texts, *aside):
        digest.update(repr(tuple(entry)).encode())
    ignored = dict(listing.ignored.most_common())
    return FileSource(
        name,
        keys,
        read,
        labels,
        labeled.classes,
        held,
        digest.hexdigest(),
        notes,
        ignored,
        captions,
        depths,
    )


def _captions(
    listing: Listing, keys: Sequence[str], read: Callable[[str], bytes], labeled: Labels
) -> tuple[Captions, list[Entry]]:
    """Captions of images, and the files that hold them; other files are ignored and counted."""
    texts = [entry.key for entry in sorted(listing.texts)]
    tables = [e.key for e in sorted(listing.tables) if e.key.rpartition("/")[2] in TABLES]
    texts = [text for text in texts if text.endswith(TEXT)]
    captions = find_captions(keys, texts, tables, read, labeled.captions)
    names = {*captions.files.values(), *tables, *labeled.captioned}
    others = sorted((*listing.texts, *listing.tables))
    for entry in others:
        if entry.key not in names | labeled.used:
            listing.ignored[suffix(entry.key)] += 1
    return captions, [entry for entry in others if entry.key in names]


def _grids(keys: list[str]) -> set[str]:
    """Keys of the overviews that `patchdiffusion sample` writes beside its samples."""
    sample = re.compile(r"(^|/)seed-\d{8}\.(png|tiff)$")
    samples = {key.rpartition("/")[0] for key in keys if sample.search(key)}
    grids = {f"{folder}/grid.png" if folder else "grid.png" for folder in samples}
    return grids & set(keys)
