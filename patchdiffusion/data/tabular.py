"""Tables that hold images, parquet and Arrow, as a `Source`: read a few rows at a time.

Data sets of Hugging Face are such tables: an image is a column of bytes, or of records with
`bytes`, and the schema names classes.
"""

import bisect
import hashlib
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchdiffusion.data.captions import text_of
from patchdiffusion.data.decode import decoded
from patchdiffusion.data.example import BadImage, Example
from patchdiffusion.data.labels import LabelSource, classes_of
from patchdiffusion.data.limits import MAX_BYTES
from patchdiffusion.data.splits import HELD_OUT, TEST, TRAIN, are_splits
from patchdiffusion.data.tablefiles import TableFile, open_table
from patchdiffusion.data.tables import CAPTION_COLUMNS, LABEL_COLUMNS, Cell, Table
from patchdiffusion.system.text import counted

IMAGE_COLUMNS = ("image", "img", "images", "picture", "photo", "jpg", "png", "webp", "x")
"""Names of columns that hold images; else the first that can is used."""
FIELDS = ("image", "label", "caption")
"""Parts of an image that a column may be named for."""


class Cursor:
    """Rows of several tables by their number: quick in rising order, with a few in memory."""

    def __init__(self, files: Sequence[TableFile], columns: Sequence[str]):
        self._files, self._columns = files, list(columns)
        self._ends = list(itertools.accumulate(file.rows for file in files))
        self._lock = threading.Lock()
        self._batches: Iterator[tuple[int, Any]] = iter(())
        self._file = -1
        self._start = self._stop = 0
        self._rows: Any = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def place(self, index: int) -> tuple[int, int]:
        """Number of the file of a row, and of the row in it."""
        file = bisect.bisect_right(self._ends, index)
        return file, index - (self._ends[file] - self._files[file].rows)

    def row(self, index: int) -> Mapping[str, Any]:
        """Values of a row by their columns."""
        file, row = self.place(index)
        with self._lock:
            if file != self._file or not self._start <= row < self._stop:
                self._seek(file, row)
            return self._rows.slice(row - self._start, 1).to_pylist()[0]

    def _seek(self, file: int, row: int) -> None:
        table = self._files[file]
        is_ahead = file == self._file and row >= self._stop
        if not is_ahead or table.group_of(row) > table.group_of(self._stop):
            self._batches = table.batches(self._columns, row)
            self._file = file
        for start, rows in self._batches:
            if start <= row < start + len(rows):
                self._start, self._stop, self._rows = start, start + len(rows), rows
                return
        self._file = -1
        raise BadImage(f"{table.key}#{row}", "the table holds fewer rows than it says")


@dataclass(frozen=True, eq=False)
class TableSource:
    """A `Source` over the rows of tables."""

    name: str
    files: tuple[TableFile, ...] = field(repr=False)
    cursor: Cursor = field(repr=False)
    columns: Mapping[str, str]
    """Name of the column of the image, and of label and caption if there are any."""
    numbers: Mapping[Cell, int] | None
    """Class of each value of the column of labels; None for the values themselves."""
    classes: tuple[str, ...]
    held_out: tuple[bool, ...] | None
    """True for each file that is held out from training; None without splits."""
    stamp: str
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.cursor)

    def __getitem__(self, index: int) -> Example:
        return self._example(index, self._values(index))

    def fetch(self, index: int) -> Callable[[], Iterable[Example | BadImage]]:
        """Read a row; the result decodes it."""
        try:
            values = self._values(index)
        except BadImage as error:
            bad = error
            return lambda: (bad,)
        return lambda: (self._example(index, values),)

    def _key(self, index: int) -> str:
        file, row = self.cursor.place(index)
        return f"{self.files[file].key}#{row}"

    def _values(self, index: int) -> Mapping[str, Any]:
        try:
            return self.cursor.row(index)
        except BadImage:
            raise
        except Exception as error:  # a damaged page: each coding has errors of its own
            raise BadImage(self._key(index), f"cannot be read: {_line(error)}") from error

    def _example(self, index: int, values: Mapping[str, Any]) -> Example:
        key, file = self._key(index), self.cursor.place(index)[0]
        content = values[self.columns["image"]]
        content = content.get("bytes") if isinstance(content, Mapping) else content
        if not isinstance(content, bytes):
            raise BadImage(key, "it holds no image")  # a path alone is not followed
        if len(content) > MAX_BYTES:
            raise BadImage(key, f"larger than {MAX_BYTES} bytes")
        pixels = decoded(content, key)
        caption, complaints = self._caption(values)
        return Example(
            pixels.image,
            self._label(values),
            key,
            alpha=pixels.alpha,
            span=pixels.span,
            mode=pixels.mode,
            held_out=None if self.held_out is None else self.held_out[file],
            caption=caption,
            complaints=complaints,
        )

    def _label(self, values: Mapping[str, Any]) -> int | None:
        label = values[self.columns["label"]] if "label" in self.columns else None
        if label is None or label == -1:  # none, in data sets of Hugging Face
            return None
        return int(label) if self.numbers is None else self.numbers.get(label)

    def _caption(self, values: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
        text = values[self.columns["caption"]] if "caption" in self.columns else None
        text = next(iter(text), None) if isinstance(text, list) else text
        try:
            return (text_of(text.encode()) if isinstance(text, str) else None), ()
        except ValueError as error:
            return None, (f"its {self.columns['caption']} is left out: {error}",)


def table_source(
    name: str,
    paths: Mapping[str, Path],
    labels: LabelSource = "auto",
    splits: Sequence[str | None] = (),
    fields: Mapping[str, str] | None = None,
) -> TableSource:
    """All images in tables, by the names of these, which may belong to splits such as train.

    `fields` names the columns of image, label and caption where their names do not tell. Files of
    the split test are left out if there is one to hold out. Raises `ValueError` for tables that
    cannot be read, or without images.
    """
    notes: list[str] = []
    keys, held_out = list(paths), None
    if are_splits(filter(None, splits)):
        kinds = dict(zip(paths, (split or TRAIN for split in splits), strict=True))
        left_out = HELD_OUT in kinds.values()
        keys = [key for key in paths if not (left_out and kinds[key] == TEST)]
        held_out = tuple(kinds[key] != TRAIN for key in keys)
        notes.append("splits: the names of the tables divide the images")
        if gone := len(paths) - len(keys):
            tables = counted(gone, "table of test images is", "tables of test images are")
            notes.append(f"splits: {tables} left out: neither trained on nor held out")
    files = tuple(open_table(key, paths[key]) for key in keys)
    columns = _chosen(files, fields or {})
    if labels == "off":
        columns.pop("label", None)
    classes, numbers = (), None
    if column := columns.get("label"):
        classes, numbers = _classes(files, column)
        if not classes:
            del columns["label"]
            notes.append(f"no labels: the column {column} is none of classes")
        else:
            notes.append(f"labels: column {column}")
    digest = hashlib.sha256(repr((columns, classes, held_out)).encode())
    for key, file in zip(keys, files, strict=True):
        digest.update(repr((key, file.rows, file.mark)).encode())
    cursor = Cursor(files, list(columns.values()))
    stamp = f"tables {digest.hexdigest()}"
    return TableSource(
        name, files, cursor, columns, numbers, classes, held_out, stamp, tuple(notes)
    )


def _chosen(files: Sequence[TableFile], fields: Mapping[str, str]) -> dict[str, str]:
    """Columns of image, label and caption, which all tables must have."""
    first, columns = files[0], {}
    for part, named in fields.items():
        if part not in FIELDS:
            raise ValueError(f"fields has {part!r}; allowed are {', '.join(FIELDS)}, as image=NAME")
        if named not in first.columns:
            there = ", ".join(first.columns)
            raise ValueError(f"{first.path} has no column {named!r}; its columns are {there}")
        columns[part] = named
    images = [name for name, kind in first.columns.items() if kind == "image"]
    images.sort(key=lambda n: (n not in first.images, _rank(n, IMAGE_COLUMNS)))
    texts = [name for name, kind in first.columns.items() if kind == "text"]
    labels = [n for n, kind in first.columns.items() if kind in ("number", "text")]
    guessed = {
        "image": images,
        "label": [n for n in labels if n in first.names]
        or sorted((n for n in labels if n.casefold() in LABEL_COLUMNS), key=_label_rank),
        "caption": sorted((n for n in texts if n.casefold() in CAPTION_COLUMNS), key=_text_rank),
    }
    for part, names in guessed.items():
        names = [name for name in names if name not in columns.values()]
        if names and part not in columns:
            columns[part] = names[0]
    if "image" not in columns or first.columns[columns["image"]] != "image":
        kinds = ", ".join(f"{name} ({kind})" for name, kind in first.columns.items())
        raise ValueError(
            f"{first.path} has no column of images, encoded as files are; its columns are {kinds}"
        )
    for file in files:
        kinds = {name: first.columns[name] for name in columns.values()}
        if missing := [n for n, kind in kinds.items() if file.columns.get(n) != kind]:
            raise ValueError(f"{file.path} has no column {missing[0]!r} as {first.path} has it")
    return {part: columns[part] for part in FIELDS if part in columns}


def _rank(name: str, names: Sequence[str]) -> int:
    return names.index(name.casefold()) if name.casefold() in names else len(names)


def _label_rank(name: str) -> int:
    return _rank(name, LABEL_COLUMNS)


def _text_rank(name: str) -> int:
    return _rank(name, CAPTION_COLUMNS)


def _classes(
    files: Sequence[TableFile], column: str
) -> tuple[tuple[str, ...], Mapping[Cell, int] | None]:
    """Names of the classes, and the class of each value of the column."""
    if names := files[0].names.get(column):
        return names, None
    distinct: set[Cell] = set()
    count = 0
    for file in files:
        try:
            for value, times in file.counts(column):
                distinct.add(value)
                count += times
        except Exception as error:
            raise ValueError(f"{file.path} cannot be read: {_line(error)}") from error
    distinct -= {None, -1}
    if not distinct:
        return (), None
    classes, numbers = classes_of(distinct, count, Table(files[0].key, column=column))
    return classes or (), numbers


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
