"""Tar archives as a `Source`, also the shards of WebDataset, in which a sample is several members.

The headers are read here rather than by `tarfile`, which keeps a record of a kilobyte for each
member, follows chains of headers by recursion, and reads headers of any size. Nothing is unpacked:
members are read in place. Formats: ustar, GNU and pax (POSIX.1-2001).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from patchdiffusion.data.captions import text_of
from patchdiffusion.data.example import BadImage
from patchdiffusion.data.files import FileSource, file_source
from patchdiffusion.data.junk import junk_in
from patchdiffusion.data.labels import LabelSource
from patchdiffusion.data.limits import MAX_BYTES
from patchdiffusion.data.listing import Entry, Listing, leads_outside, suffix
from patchdiffusion.data.splits import are_splits
from patchdiffusion.data.tables import CAPTION_COLUMNS, LABEL_COLUMNS, Cell, Table, is_table
from patchdiffusion.system.files import parse_json
from patchdiffusion.system.text import printable
from patchdiffusion.system.trust import open_regular

BLOCK = 512
_LONGEST_NAME = 2**16
_LARGEST_HEADER = 2**20
_LARGEST_NOTE = 2**20
_FILE = b"\0" + b"07"
_FOLDER, _LONG_NAME, _LONG_LINK, _PAX, _PAX_ALL = b"5", b"L", b"K", b"x", b"g"
_FIELDS = (".cls", ".json", ".caption")
"""Extensions of members about a sample, beside its text (.txt)."""


class Member(NamedTuple):
    """Member of an archive: its name, and where its bytes lie; `kind` is its type."""

    name: str
    offset: int
    size: int
    kind: bytes
    mtime: int


class Place(NamedTuple):
    """Bytes of a file."""

    file: Path
    offset: int
    size: int


# ---- The format ----


def members(path: Path) -> Iterator[Member]:
    """Members of an archive, in order; raises `ValueError` for a damaged one."""
    with open_regular(path) as stream:
        end = stream.seek(0, 2)
        position, name, size = 0, None, None
        while position < end:
            stream.seek(position)
            header = stream.read(BLOCK)
            if header == bytes(len(header)):
                return  # the mark of the end, or what fills the last block
            member = _member(path, header, position)
            position = member.offset + -(-member.size // BLOCK) * BLOCK
            if member.kind == _PAX:
                fields = _pax(_content(path, stream, member))
                name, size = fields.get("path", name), fields.get("size", size)
                if any(key.startswith("GNU.sparse") for key in fields):
                    raise ValueError(f"{path} holds a sparse file, which is not read")
                continue
            if member.kind == _LONG_NAME:
                name = _text(_content(path, stream, member).partition(b"\0")[0])
                continue
            if member.kind in (_LONG_LINK, _PAX_ALL):
                continue
            actual = member.size if size is None else _whole(path, size)
            member = member._replace(name=member.name if name is None else name, size=actual)
            if member.offset + actual > end:
                raise ValueError(
                    f"{path} is cut short: {printable(member.name[:80])!r} should have "
                    f"{actual:,} bytes, and {max(end - member.offset, 0):,} are left"
                )
            position = member.offset + -(-actual // BLOCK) * BLOCK
            name = size = None
            yield member


def _member(path: Path, header: bytes, position: int) -> Member:
    if len(header) < BLOCK:
        raise ValueError(f"{path} is cut short: it ends inside of a header at byte {position:,}")
    total = sum(header) - sum(header[148:156]) + 8 * 32
    if _number(header[148:156]) != total:
        raise ValueError(f"{path} is no tar, or damaged: byte {position:,} begins no header")
    size = _number(header[124:136])
    if size is None:
        raise ValueError(f"{path} is damaged: the header at byte {position:,} has no size")
    name, prefix = (_text(part.partition(b"\0")[0]) for part in (header[:100], header[345:500]))
    is_ustar = header[257:263] == b"ustar\0"  # that of GNU has other fields there
    name = f"{prefix}/{name}" if prefix and is_ustar else name
    kind = header[156:157]
    if kind not in (*(bytes([k]) for k in _FILE), _LONG_NAME, _LONG_LINK, _PAX, _PAX_ALL, b"S"):
        size = 0  # links and devices have none, whatever they say
    return Member(name, position + BLOCK, size, kind, _number(header[136:148]) or 0)


def _number(field: bytes) -> int | None:
    """Number in octal digits, or in base 256 if the first bit is set; None for anything else."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _content(path: Path, stream: BufferedReader, member: Member) -> bytes:
    most = _LARGEST_HEADER if member.kind == _PAX else _LONGEST_NAME
    if member.size > most:
        raise ValueError(
            f"{path} is refused: a header of {member.size:,} bytes; allowed are {most:,}"
        )
    content = stream.read(member.size)
    if len(content) < member.size:
        raise ValueError(f"{path} is cut short: it ends inside of a header")
    return content


def _pax(content: bytes) -> dict[str, str]:
    """Fields of an extended header: lines of their length, a blank, a key, "=" and a value."""
    fields, start = {}, 0
    while start < len(content):
        blank = content.find(b" ", start, start + 12)
        digits = content[start:blank] if blank >= 0 else b""
        length = int(digits) if digits.isdigit() else 0
        if length <= blank - start or start + length > len(content):
            break  # what fills the block, or damage: the plain name is used
        key, _, value = content[blank + 1 : start + length - 1].partition(b"=")
        fields[_text(key)] = _text(value)
        start += length
    return fields


def _whole(path: Path, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ValueError(f"{path} is damaged: a member has the size {text[:40]!r}")
    return int(text)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


# ---- Shards ----


def tar_source(
    name: str,
    shards: Mapping[str, Path],
    labels: LabelSource = "auto",
    splits: Sequence[str | None] = (),
) -> FileSource:
    """All images in archives, by the names of these, which may belong to splits such as train.

    Beside images and tables as in a folder, members with the name of an image and the extension
    .txt or .caption are its caption, .cls its class, and .json both. Links and devices are ignored
    and counted. Raises `ValueError` for a damaged archive and for names that lead outside or occur
    twice in it.
    """
    places, listing, divided = {}, Listing(), are_splits(filter(None, splits))
    inside = {key: list(_named(path, listing)) for key, path in shards.items()}
    several = _repeated(inside)
    for index, (shard, entries) in enumerate(inside.items()):
        # A folder for the archive only where it says something: names are unique in most sets.
        outer = f"{splits[index] or 'train'}/" if divided else ""
        outer += f"{shard.removesuffix('.tar')}/" if several else ""
        for member in entries:
            entry = Entry(outer + member.name, member.size, member.mtime)
            if junk := junk_in(entry.key):
                listing.ignored[junk[1]] += 1
                continue
            if suffix(entry.key) not in _FIELDS or is_table(entry.key):
                listing.add(entry)
            places[entry.key] = Place(shards[shard], member.offset, member.size)
    _leave_out_further(listing)

    def read(key: str) -> bytes:
        return _read(places[key], key)

    paths = list(shards.values())
    path = paths[0] if len(paths) == 1 else paths[0].parent
    table = _about([entry.key for entry in listing.images], places, read)
    if several and labels == "auto" and not (table.labels or listing.tables or divided):
        labels = "off"  # the names of archives are no classes
    return file_source(name, path, listing, read, labels, table)


def _named(path: Path, listing: Listing) -> Iterator[Member]:
    """Files in an archive, with names that are safe and occur once."""
    seen: set[str] = set()
    for member in members(path):
        name = member.name.replace("\\", "/").removeprefix("./")
        if member.kind == _FOLDER or name.endswith("/") or not name:
            continue
        if member.kind not in (bytes([k]) for k in _FILE):
            listing.ignored["link or special file"] += 1
            continue
        if leads_outside(name):
            raise ValueError(f"{path} is refused: the name {name!r} leads outside of the archive")
        if name in seen:
            raise ValueError(f"{path} is refused: the name {name!r} occurs twice")
        seen.add(name)
        yield member._replace(name=name)


def _repeated(inside: Mapping[str, Sequence[Member]]) -> bool:
    """True if a name occurs in several archives."""
    names = [member.name for entries in inside.values() for member in entries]
    return len(inside) > 1 and len(set(names)) < len(names)


def _read(place: Place, key: str) -> bytes:
    if place.size > MAX_BYTES:
        raise BadImage(key, f"larger than {MAX_BYTES} bytes")
    try:
        with open_regular(place.file) as stream:
            stream.seek(place.offset)
            content = stream.read(place.size)
    except OSError as error:
        raise BadImage(key, error.strerror or type(error).__name__) from error
    if len(content) < place.size:
        raise BadImage(key, f"{place.file.name} was cut short after it was opened")
    return content


def _sample(key: str) -> str:
    """Name of the sample of a member: that up to the first point, as WebDataset has it."""
    folder, separator, name = key.rpartition("/")
    return folder + separator + name.partition(".")[0]


def _leave_out_further(listing: Listing) -> None:
    """Leave out `0001.mask.png` beside `0001.png`: a sample has one image."""
    plain = {e.key.rpartition(".")[0] for e in listing.images}
    kept = []
    for entry in listing.images:
        stem = entry.key.rpartition(".")[0]
        if stem != (sample := _sample(entry.key)) and sample in plain:
            listing.ignored["further image of a sample"] += 1
        else:
            kept.append(entry)
    listing.images = kept


def _about(
    images: Sequence[str], places: Mapping[str, Place], read: Callable[[str], bytes]
) -> Table:
    """Labels and captions of samples, by the members beside their images."""
    table = Table("members of the archive", column=".cls or .json")
    for key in images:
        stems = dict.fromkeys((key.rpartition(".")[0], _sample(key)))
        for extension in _FIELDS:
            beside = next((s + extension for s in stems if s + extension in places), None)
            if beside is None or places[beside].size > _LARGEST_NOTE:
                continue
            label, caption = _noted(extension, read(beside))
            if label is not None and key not in table.labels:
                table.labels[key] = label
            if caption is not None and key not in table.captions:
                table.captions[key] = caption
    return table


def _noted(extension: str, content: bytes) -> tuple[Cell, str | None]:
    """Label and caption in a member about a sample; None for what is not there."""
    try:
        if extension == ".caption":
            return None, text_of(content)
        if extension == ".cls":
            return text_of(content), None
        facts = parse_json(content)
        facts = facts if isinstance(facts, dict) else {}
        label = next((facts[name] for name in ("cls", *LABEL_COLUMNS) if name in facts), None)
        text = next((facts[name] for name in CAPTION_COLUMNS if name in facts), None)
        is_label = isinstance(label, str | int) and not isinstance(label, bool) and label != ""
        caption = text_of(text.encode()) if isinstance(text, str) else None
        return label if is_label else None, caption
    except ValueError:  # which is left out, as other texts that cannot be read
        return None, None
