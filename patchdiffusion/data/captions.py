"""Captions of image files: `cat.txt` beside `cat.png`, or lines of a table in JSON."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from patchdiffusion.data.example import BadImage
from patchdiffusion.system.files import parse_json
from patchdiffusion.system.text import counted, same_form

TABLES = ("captions.jsonl", "metadata.jsonl")
"""Names of tables with a line {"file_name": ..., "text": ...} for each image of their folder."""
TEXT = ".txt"
_MAX_BYTES = 2**16


@dataclass(frozen=True)
class Captions:
    """Captions of a data set, by image, or the files that hold them."""

    files: Mapping[str, str] = field(default_factory=dict)
    """Caption file of each image that has one."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Caption of each image that a table names."""
    notes: tuple[str, ...] = ()
    """Problems of the tables, one line each."""

    def of(self, key: str, read: Callable[[str], bytes]) -> tuple[str | None, tuple[str, ...]]:
        """Caption of an image or None, and complaints; a file takes precedence over a table."""
        if key not in self.files:
            return self.texts.get(key), ()
        file = self.files[key]
        try:
            return text_of(read(file)), ()
        except BadImage as error:
            return None, (f"{file} is left out: {error.reason}",)
        except ValueError as error:
            return None, (f"{file} is left out: {error}",)


def find_captions(
    keys: Sequence[str],
    texts: Collection[str],
    tables: Sequence[str],
    read: Callable[[str], bytes],
    others: Mapping[str, str] | None = None,
) -> Captions:
    """Captions of images: `texts` are the names of .txt files, `tables` those of tables.

    `others` are captions of images in tables of labels, for images that have no other one.
    """
    stems = {same_form(text[: -len(TEXT)]): text for text in texts}
    stem_of = {key: same_form(key.rpartition(".")[0]) for key in keys}
    files = {key: stems[stem] for key, stem in stem_of.items() if stem in stems}
    captions = dict(others or {})
    notes: list[str] = []
    images = {same_form(key): key for key in keys}
    for table in tables:
        unknown = []
        for entry in _rows(table, read):
            if isinstance(entry, str):
                notes.append(entry)
            elif (key := images.get(same_form(entry[0]))) is not None:
                captions[key] = entry[1]
            else:
                unknown.append(entry[0])
        if unknown:
            number = counted(len(unknown), "image that does", "images that do")
            missing = f"{number} not exist, the first is {unknown[0]!r}"
            notes.append(f"{table} names {missing}")
    return Captions(files, captions, tuple(notes))


def _rows(table: str, read: Callable[[str], bytes]) -> Iterator[tuple[str, str] | str]:
    """(Image, caption) of each line, or a complaint about the line."""
    folder = table.rpartition("/")[0]
    try:
        lines = read(table).splitlines()
    except BadImage as error:
        yield f"{table} is left out: {error.reason}"
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise ValueError("it has no file_name")
            if "text" not in row:
                continue  # a table of something else
            if not isinstance(row["text"], str):
                raise ValueError(f"its text is of type {type(row['text']).__name__}")
            text = text_of(row["text"].encode())
        except ValueError as error:
            yield f"{table} line {number} is left out: {error}"
            continue
        if text is not None:
            name = row["file_name"]
            yield f"{folder}/{name}" if folder else name, text


def text_of(content: bytes) -> str | None:
    """Decoded and stripped text, None if empty; raises `ValueError` unless it is UTF-8."""
    if len(content) > _MAX_BYTES:
        raise ValueError(f"{len(content)} bytes; allowed are {_MAX_BYTES}")
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"not text in UTF-8 (byte {error.start})") from error
    if "\0" in text:
        raise ValueError("not text: it holds a zero byte")
    return text or None
