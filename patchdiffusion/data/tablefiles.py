"""Files of parquet and Arrow, read in batches of a few rows.

Both may come from strangers. Of parquet, the limits of unpacking hold for what the file says of
its columns; compressed pages are read one by one. Arrow files are mapped, their offsets checked
before use, and their buffers must not be compressed, as those of Hugging Face are not.
"""

import bisect
import contextlib
import itertools
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from patchdiffusion.data.limits import bomb
from patchdiffusion.system.files import parse_json
from patchdiffusion.system.optional import require
from patchdiffusion.system.trust import open_regular

Kind = Literal["image", "number", "text", "other"]

BATCH = 32
"""Rows that are read at a time, at most."""
_BATCH_BYTES = 2**28
"""Bytes to which they may unpack: a dictionary can hold one value for all rows."""
_MOST_ROWS = 2**40
_HUGGING_FACE = b"huggingface"
_MAGIC = b"ARROW1\0\0"


class TableFile(Protocol):
    """Table in a file."""

    @property
    def key(self) -> str: ...
    @property
    def path(self) -> Path: ...
    @property
    def rows(self) -> int: ...
    @property
    def mark(self) -> object:
        """Value that changes with the content."""
        ...

    @property
    def columns(self) -> Mapping[str, Kind]: ...
    @property
    def images(self) -> frozenset[str]:
        """Columns that the schema says are images."""
        ...

    @property
    def names(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the classes of columns that the schema says are labels."""
        ...

    def group_of(self, row: int) -> int:
        """Number of the group of rows that are read together."""
        ...

    def batches(self, columns: Sequence[str], row: int) -> Iterator[tuple[int, Any]]:
        """Number of the first row, and rows, from the group of a row on."""
        ...

    def counts(self, column: str) -> Iterator[tuple[Any, int]]:
        """Values of a column with their numbers, batch by batch."""
        ...


def open_table(key: str, path: Path) -> TableFile:
    """Open a table; raises `ValueError` in one line if it cannot be read."""
    require("pyarrow", extra="hub")
    try:
        with open_regular(path) as stream:
            start = stream.read(8)
        return ParquetTable(key, path) if start[:4] == b"PAR1" else ArrowTable(key, path)
    except (ValueError, OSError, RecursionError, MemoryError, NotImplementedError) as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} cannot be read as parquet or Arrow: {text}") from error


@dataclass(frozen=True, eq=False)
class Schema:
    """Columns of a table."""

    key: str
    path: Path
    ends: tuple[int, ...] = field(repr=False)
    """Row at which each group of rows ends."""
    mark: object
    columns: Mapping[str, Kind]
    images: frozenset[str]
    names: Mapping[str, tuple[str, ...]]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.ends[-1] if self.ends else 0

    def group_of(self, row: int) -> int:
        """Number of the group of a row."""
        return bisect.bisect_right(self.ends, row)

    def start(self, group: int) -> int:
        """Number of the first row of a group."""
        return self.ends[group - 1] if group else 0


class ParquetTable(Schema):
    """Table in a file of parquet."""

    batch: int
    """Rows that are read at a time."""

    def __init__(self, key: str, path: Path):
        file = self._open(path)
        facts, size = file.metadata, path.stat().st_size
        groups = [facts.row_group(i) for i in range(facts.num_row_groups)]
        rows = [group.num_rows for group in groups]
        if any(not 0 <= count < _MOST_ROWS for count in rows):
            raise ValueError("a group of rows has an impossible number of them")
        for number, group in enumerate(groups):
            packed = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
            if packed > size:
                raise ValueError(f"group {number} of its rows is larger than the file")
            if reason := bomb(group.total_byte_size, packed):
                raise ValueError(reason)
        chunks = [g.column(i).total_uncompressed_size for g in groups for i in range(g.num_columns)]
        most = max(1, min(BATCH, _BATCH_BYTES // max(*chunks, 1, 1)))
        object.__setattr__(self, "batch", most)
        ends = tuple(itertools.accumulate(rows))
        super().__init__(key, path, ends, _mark(path), *_described(file.schema_arrow))

    @staticmethod
    def _open(path: Path) -> Any:
        parquet = require("pyarrow.parquet", extra="hub")
        limit = {"thrift_string_size_limit": 2**26, "thrift_container_size_limit": 2**22}
        return parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False, **limit)

    def batches(self, columns: Sequence[str], row: int) -> Iterator[tuple[int, Any]]:
        """Batches of rows from the group of a row on."""
        with self._open(self.path) as file:
            for group in range(self.group_of(row), len(self.ends)):
                start = self.start(group)
                for batch in file.iter_batches(
                    self.batch, row_groups=[group], columns=list(columns), use_threads=False
                ):
                    yield start, batch
                    start += len(batch)

    def counts(self, column: str) -> Iterator[tuple[Any, int]]:
        """Values of a column with their numbers."""
        with self._open(self.path) as file:
            for batch in file.iter_batches(2**16, columns=[column], use_threads=False):
                yield from _counted(batch)


class ArrowTable(Schema):
    """Table in a file of Arrow, in the format of streams, as Hugging Face has it, or of files."""

    def __init__(self, key: str, path: Path):
        _refuse_compressed(path)
        with _stream(path) as reader:
            schema = reader.schema
            lengths = [len(batch) for batch in reader]
        ends = tuple(itertools.accumulate(lengths))
        super().__init__(key, path, ends, _mark(path), *_described(schema))

    def batches(self, columns: Sequence[str], row: int) -> Iterator[tuple[int, Any]]:
        """Batches of rows from the group of a row on."""
        first = self.group_of(row)
        with _stream(self.path) as reader:
            for number, batch in enumerate(reader):
                if number >= first:
                    yield self.start(number), _checked(batch.select(list(columns)))

    def counts(self, column: str) -> Iterator[tuple[Any, int]]:
        """Values of a column with their numbers."""
        with _stream(self.path) as reader:
            for batch in reader:
                yield from _counted(_checked(batch.select([column])))


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[Any]:
    """Mapped file at the start of its stream, which the format of files has behind a mark."""
    with require("pyarrow", extra="hub").memory_map(str(path)) as stream:
        stream.seek(len(_MAGIC) if stream.read(len(_MAGIC)) == _MAGIC else 0)
        yield stream


@contextlib.contextmanager
def _stream(path: Path) -> Iterator[Any]:
    """Reader of the batches of a file."""
    ipc = require("pyarrow.ipc", extra="hub")
    with _mapped(path) as stream, ipc.open_stream(stream) as reader:
        yield reader


def _checked(batch: Any) -> Any:
    batch.validate(full=True)  # offsets of strangers may point anywhere
    return batch


def _refuse_compressed(path: Path) -> None:
    """Raise `ValueError` if a batch is compressed: it would be unpacked to any size at once.

    Messages are tables of FlatBuffers, of which fields are looked up here: 2 is the header of a
    message, 3 the compression of a batch, and 1 the batch of a dictionary.
    """
    ipc = require("pyarrow.ipc", extra="hub")
    with _mapped(path) as stream:
        reader = ipc.MessageReader.open_stream(stream)
        while True:
            try:
                message = reader.read_next_message()
            except StopIteration:
                return
            data, kind = message.metadata.to_pybytes(), message.type
            table = _target(data, 0) if kind != "schema" else 0
            table = _target(data, _field(data, table, 2)) if table else 0
            if table and kind == "dictionary":
                table = _target(data, _field(data, table, 1))
            if table and _field(data, table, 3):
                raise ValueError(
                    "its batches are compressed, which is not read; write it without compression, "
                    "or as parquet"
                )


def _field(data: bytes, table: int, number: int) -> int:
    """Position of a field of a table; 0 if it is absent."""
    layout = table - _unpacked("<i", data, table)
    place = 4 + 2 * number
    if place + 2 > _unpacked("<H", data, layout):
        return 0
    offset = _unpacked("<H", data, layout + place)
    return table + offset if offset else 0


def _target(data: bytes, position: int) -> int:
    """Position that an offset points to."""
    return position + _unpacked("<I", data, position)


def _unpacked(form: str, data: bytes, position: int) -> int:
    if not 0 <= position <= len(data) - struct.calcsize(form):
        raise ValueError("the header of a batch is damaged")
    return struct.unpack_from(form, data, position)[0]


def _counted(batch: Any) -> Iterator[tuple[Any, int]]:
    compute = require("pyarrow.compute", extra="hub")
    for entry in compute.value_counts(batch.column(0)).to_pylist():
        yield entry["values"], entry["counts"]


def _mark(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _described(
    schema: Any,
) -> tuple[dict[str, Kind], frozenset[str], dict[str, tuple[str, ...]]]:
    """Kinds of the columns, those that are images, and names of classes."""
    columns: dict[str, Kind] = {
        name: _kind(schema.field(i).type) for i, name in enumerate(schema.names)
    }
    if len(columns) < len(schema.names):
        raise ValueError("two columns have the same name")
    images, names = set(), {}
    for name, feature in _features(schema.metadata or {}).items():
        if not isinstance(feature, dict) or name not in columns:
            continue
        classes = feature.get("names")
        if feature.get("_type") == "Image":
            images.add(name)
        is_label = feature.get("_type") == "ClassLabel" and columns[name] == "number"
        if is_label and isinstance(classes, list) and all(isinstance(x, str) for x in classes):
            names[name] = tuple(classes)
    return columns, frozenset(images), names


def _features(metadata: Mapping[bytes, bytes]) -> Mapping[str, Any]:
    """Description of the columns by the library datasets, if there is one."""
    try:
        features = parse_json(metadata.get(_HUGGING_FACE, b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _kind(of: Any) -> Kind:
    types = require("pyarrow.types", extra="hub")
    if types.is_dictionary(of):
        return _kind(of.value_type) if not _is_binary(of.value_type) else "other"
    if types.is_struct(of):
        inner = [of.field(i) for i in range(of.num_fields)]
        return "image" if any(f.name == "bytes" and _is_binary(f.type) for f in inner) else "other"
    if _is_binary(of):
        return "image"
    if types.is_integer(of):
        return "number"
    if types.is_list(of) and of.value_type != of:
        return "text" if _kind(of.value_type) == "text" else "other"
    return "text" if types.is_string(of) or types.is_large_string(of) else "other"


def _is_binary(of: Any) -> bool:
    types = require("pyarrow.types", extra="hub")
    return types.is_binary(of) or types.is_large_binary(of)
