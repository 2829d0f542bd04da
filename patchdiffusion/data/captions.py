"""Texts about image files: `cat.txt` beside `cat.png`, or lines of a table in JSON."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from patchdiffusion.data.example import BadImage
from patchdiffusion.system.files import parse_json

TABLES = ("captions.jsonl", "metadata.jsonl")
"""Names of tables with one {"file_name": ..., "text": ...} for each image of their folder."""
TEXT = ".txt"
_MOST_BYTES = 2**16


@dataclass(frozen=True)
class Captions:
    """Where the text of each image is."""

    files: Mapping[str, str] = field(default_factory=dict)
    """File of the text, by the image."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """The text itself, by the image."""
    notes: tuple[str, ...] = ()
    """What is wrong with the tables, a line each."""

    def of(self, key: str, read: Callable[[str], bytes]) -> tuple[str | None, tuple[str, ...]]:
        """The text of an image, and what is wrong with it; a file goes before a table."""
        if key not in self.files:
            return self.texts.get(key), ()
        file = self.files[key]
        try:
            return _text(read(file)), ()
        except BadImage as error:
            return None, (f"{file} is left out: {error.reason}",)
        except ValueError as error:
            return None, (f"{file} is left out: {error}",)


def find_captions(
    keys: Sequence[str],
    texts: Collection[str],
    tables: Sequence[str],
    read: Callable[[str], bytes],
) -> Captions:
    """The texts of images, from the files that end in .txt and the tables that are there."""
    stems = {text[: -len(TEXT)]: text for text in texts}
    files = {key: stems[stem] for key in keys if (stem := key.rpartition(".")[0]) in stems}
    found: dict[str, str] = {}
    notes: list[str] = []
    known = set(keys)
    for table in tables:
        strange = []
        for entry in _rows(table, read):
            if isinstance(entry, str):
                notes.append(entry)
            elif entry[0] in known:
                found[entry[0]] = entry[1]
            else:
                strange.append(entry[0])
        if strange:
            told = f"{len(strange)} images that are not there, the first is {strange[0]!r}"
            notes.append(f"{table} names {told}")
    return Captions(files, found, tuple(notes))


def _rows(table: str, read: Callable[[str], bytes]) -> Iterator[tuple[str, str] | str]:
    """Image and text of each line, or what is wrong with it."""
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
            text = _text(row["text"].encode())
        except ValueError as error:
            yield f"{table} line {number} is left out: {error}"
            continue
        if text is not None:
            name = row["file_name"]
            yield f"{folder}/{name}" if folder else name, text


def _text(content: bytes) -> str | None:
    """A text without the spaces around it, None if nothing is left; `ValueError` for no text."""
    if len(content) > _MOST_BYTES:
        raise ValueError(f"{len(content)} bytes; allowed are {_MOST_BYTES}")
    try:
        text = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"no text in UTF-8 (byte {error.start})") from error
    if "\0" in text:
        raise ValueError("no text: it holds a zero byte")
    return text or None
