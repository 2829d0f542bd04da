"""Labels and captions in tables beside images: `dataset.json` of EDM, CSV, TSV, JSON lines.

A table speaks of the images below its folder. Names match whatever their Unicode form; names of
rows may leave out folders and the extension where that is not ambiguous, as tables of Kaggle do.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from patchdiffusion.data.captions import TABLES as CAPTION_TABLES
from patchdiffusion.data.captions import text_of
from patchdiffusion.data.example import BadImage
from patchdiffusion.data.splits import split_of
from patchdiffusion.system.files import parse_json
from patchdiffusion.system.text import printable, same_form

LABEL_FILE = "dataset.json"
JSON_LINES = (".jsonl", ".ndjson")
_SEPARATED = (".csv", ".tsv")
LABEL_COLUMNS = (
    *("label", "labels", "class", "class_name", "classname", "category", "target", "class_id"),
    *("label_id", "category_id", "species", "breed", "diagnosis", "y"),
)
"""Names of columns that hold classes; the first one found is used."""
CAPTION_COLUMNS = ("caption", "captions", "text", "prompt", "description")
"""Names of columns that hold texts about images; the first one found is used."""
SPLIT_COLUMNS = ("split", "set", "subset", "partition")
"""Names of columns that hold train, val or test."""
_LOOKED_AT = 200

Cell = str | int | None
"""Value of a cell: a label, or the name of an image."""


@dataclass
class Table:
    """Content of a table that names images: label and split of each image, by its key."""

    name: str
    labels: dict[str, Cell] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    """Names of images that do not exist."""
    column: str | None = None
    """Column of the labels; None if there is none."""
    named: bool = True
    """True if the column has one of the names in `LABEL_COLUMNS`."""
    exact: bool = False
    """True for `dataset.json`: numbers are class indices, and no image may be left out."""


def is_table(name: str) -> bool:
    """True if a file may be a table, by its name."""
    path = PurePosixPath(name)
    return path.name == LABEL_FILE or path.suffix.lower() in (*JSON_LINES, *_SEPARATED)


class Names:
    """Index of images by the names that tables use."""

    def __init__(self, keys: Sequence[str]):
        self._whole = {same_form(key): key for key in keys}
        self._short: dict[str, str | None] = {}
        for name, key in self._whole.items():
            path = PurePosixPath(name)
            for short in {path.name, path.stem, str(path.with_suffix(""))} - {name}:
                self._short[short] = None if short in self._short else key

    def find(self, name: str, folder: str) -> str | None:
        """Key of the image with a name in a table in `folder`, or None."""
        name = same_form(name.strip().replace("\\", "/"))
        parts = [part for part in name.split("/") if part not in ("", ".")]
        relative = "/".join(parts)
        whole = f"{same_form(folder)}/{relative}" if folder else relative
        key = self._whole.get(whole) or self._whole.get(relative) or self._short.get(whole)
        if key is None and parts and ".." not in parts:
            key = self._short.get(relative) or self._short.get(parts[-1])
            key = key or self._whole.get(parts[-1])
        return key if key and _below(key, folder) else None


def _below(key: str, folder: str) -> bool:
    return not folder or key.startswith(f"{folder}/")


def read_table(name: str, read: Callable[[str], bytes], names: Names) -> Table | None:
    """Read labels and splits of images from a file; None if it names no images.

    Raises `ValueError` if it cannot be read, or is a `dataset.json` of another form.
    """
    try:
        content = read(name)
    except BadImage as error:
        raise ValueError(f"{printable(name)} cannot be read: {error.reason}") from error
    if PurePosixPath(name).name == LABEL_FILE:
        return _edm(name, content, names)
    json_lines = PurePosixPath(name).suffix.lower() in JSON_LINES
    rows = _json_rows(content) if json_lines else _csv_rows(name, content, names)
    return _from_rows(name, rows, names)


# ---- dataset.json ----


def _edm(name: str, content: bytes, names: Names) -> Table:
    rule = '{"labels": [["name.png", 3], ...]} or {"labels": null}; numbers from 0, or names'
    table, folder = Table(name, exact=True, column="labels"), name.rpartition("/")[0]
    try:
        rows = parse_json(content)["labels"] or []
        for key, label in rows.items() if isinstance(rows, dict) else rows:
            if not isinstance(key, str):
                raise TypeError(f"{key!r} is not the name of an image")
            if isinstance(label, bool) or not isinstance(label, int | str | None):
                raise ValueError(f"the label of {key!r} is {label!r}, not an integer from 0")
            if isinstance(label, int) and label < 0:
                raise ValueError(f"the label of {key!r} is {label!r}, not an integer from 0")
            if (found := names.find(key, folder)) is None:
                table.unknown.append(key)
            else:
                table.labels[found] = label
        if len({type(v) for v in table.labels.values() if v is not None}) > 1:
            raise ValueError("some labels are numbers and some are names")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{printable(name)} is not of the form {rule} ({problem})") from error
    return table


# ---- Rows ----


def _csv_rows(name: str, content: bytes, names: Names) -> list[Mapping[str, Cell]]:
    """Rows by column names, or by column numbers in a file without a header."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", "replace")
    lines = text.splitlines()
    if not lines:
        return []
    tabs = name.lower().endswith(".tsv")
    separator = "\t" if tabs else max(",;\t|", key=lambda c: (lines[0].count(c), c == ","))
    try:
        rows = [row for row in csv.reader(lines, delimiter=separator) if row]
    except csv.Error as error:
        raise ValueError(f"{printable(name)} cannot be read: {error}") from error
    folder = name.rpartition("/")[0]
    headless = any(names.find(cell, folder) for cell in rows[0])
    head = [str(i) for i in range(len(rows[0]))] if headless else [c.strip() for c in rows[0]]
    body = rows if headless else rows[1:]
    return [dict(zip(head, row, strict=False)) for row in body]


def _json_rows(content: bytes) -> list[Mapping[str, Cell]]:
    rows: list[Mapping[str, Cell]] = []
    for line in content.splitlines():
        try:
            row = parse_json(line) if line.strip() else None
        except ValueError:
            continue  # captions, if it is one of them, have a word about it
        if isinstance(row, dict):
            plain = {k: v for k, v in row.items() if isinstance(v, str | int | None)}
            rows.append({k: int(v) if isinstance(v, bool) else v for k, v in plain.items()})
    return rows


def _from_rows(name: str, rows: list[Mapping[str, Cell]], names: Names) -> Table | None:
    """Table from rows, or None if no column names images."""
    folder = name.rpartition("/")[0]
    head = list(dict.fromkeys(column for row in rows[:_LOOKED_AT] for column in row))

    def found_in(column: str) -> int:
        cells = (row.get(column) for row in rows[:_LOOKED_AT])
        return sum(isinstance(c, str) and names.find(c, folder) is not None for c in cells)

    counts = {column: found_in(column) for column in head}
    files = max(head, key=lambda column: counts[column], default=None)
    if files is None or not counts[files]:
        return None
    table = Table(name)
    low = {column.casefold().replace(" ", "_"): column for column in head if column != files}
    table.column = next((low[c] for c in LABEL_COLUMNS if c in low), None)
    split = next((low[c] for c in SPLIT_COLUMNS if c in low), None)
    texts = next((low[c] for c in CAPTION_COLUMNS if c in low), None)
    if table.column is None and len(head) == 2:  # the image, and what it is
        other = next(c for c in head if c != files)
        if other != texts:
            table.column, table.named = other, False
    if texts == "text" and PurePosixPath(name).name in CAPTION_TABLES:
        texts = None  # which is read with a complaint about each line that cannot be used
    for row in rows:
        cell = row.get(files)
        key = names.find(cell, folder) if isinstance(cell, str) else None
        if key is None:
            table.unknown.append(str(cell))
            continue
        if table.column is not None:
            value = row.get(table.column)
            value = value.strip() if isinstance(value, str) else value
            table.labels[key] = None if value == "" else value
        if texts is not None and (text := _caption(row.get(texts))):
            table.captions[key] = text
        if split and (kind := split_of(str(row.get(split)))):
            table.splits[key] = kind
    return table


def _caption(cell: Cell) -> str | None:
    """Text of a cell; None if it cannot be a caption."""
    try:
        return text_of(cell.encode()) if isinstance(cell, str) else None
    except ValueError:  # too long, or no text
        return None
