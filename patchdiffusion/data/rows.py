"""Data sets in Python as a `Source`: lists of arrays, (image, label) tuples, rows of others."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, TypeGuard

import numpy as np
from PIL import Image
from torch import Tensor

from patchdiffusion.data.arrays import channels_last, memory_source, span_of
from patchdiffusion.data.decode import decode_image, decoded
from patchdiffusion.data.example import BadImage, Example, Source
from patchdiffusion.data.stream import Stream, is_stream, stream_of
from patchdiffusion.system.trust import read_regular

_IMAGES = ("image", "img", "images", "x")
_LABELS = ("label", "labels", "class", "y")
_CAPTIONS = ("caption", "text")
_PROBED = 256


class Rows(Protocol):
    """A map-style data set, for example of Hugging Face: a length, and rows by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> object: ...


@dataclass(frozen=True)
class RowSource:
    """A `Source` over rows that are mappings, or sequences, of a Pillow image or array and a label.

    `image`, `label` and `caption` name the columns: "image" and "label", or positions such as 0 and
    1; an `image` of None is the row itself. A label of -1 means no label, as in data sets of
    Hugging Face. `columns` names further columns, which hold arrays. `span` are the values of float
    arrays that stand for -1 and 1.
    """

    rows: Rows
    name: str
    classes: tuple[str, ...] = ()
    image: str | int | None = "image"
    label: str | int | None = None
    caption: str | int | None = None
    columns: tuple[str, ...] = ()
    span: tuple[float, float] | None = None
    stamp: str = ""
    """Changes with the content, so that a pack can be reused; empty if unknown."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.example(self.rows[index], str(index))

    def example(self, row: object, key: str) -> Example:
        """Decode a row; raises `BadImage` for one without an image."""
        picture = row if self.image is None else _column(row, self.image)
        label = None if self.label is None else _label(_column(row, self.label), key)
        text = None if self.caption is None else _column(row, self.caption)
        text = next(iter(text), None) if isinstance(text, list) else text
        content = _encoded(picture, key)
        if not isinstance(text, str | None):
            kind = type(text).__name__
            raise ValueError(f"row {key} has a caption of type {kind}; allowed are str and None")
        if isinstance(picture, Image.Image):
            pixels, mode, alpha, span = decode_image(picture, key)
        elif content is not None:
            pixels, mode, alpha, span = decoded(content, key)
        elif isinstance(picture, np.ndarray | Tensor):
            pixels, alpha = channels_last(np.asarray(picture)), False
            mode, span = str(pixels.dtype), self.span if pixels.dtype.kind == "f" else None
        else:
            where = "" if self.image is None else f"column {self.image!r} "
            kind = type(picture).__name__
            raise BadImage(
                key, f"{where}is a {kind}; allowed are Pillow image, array, bytes of a file, Path"
            )
        return Example(
            pixels,
            label,
            key,
            alpha=alpha,
            span=span,
            mode=mode,
            caption=text,
            columns={name: np.asarray(_column(row, name)) for name in self.columns},
        )


@dataclass(frozen=True)
class StreamSource(RowSource):
    """A `RowSource` over the rows of a stream, which one thread reads and any decodes."""

    def fetch(self, index: int) -> Callable[[], Iterable[Example | BadImage]]:
        """Read a row; the result decodes it."""
        try:
            row = self.rows[index]
        except BadImage as error:
            bad = error
            return lambda: (bad,)
        return lambda: (self.example(row, str(index)),)


def _encoded(picture: object, key: str) -> bytes | None:
    """Content of an encoded image: bytes, a record of them as of Hugging Face, or a file."""
    if isinstance(picture, Mapping):
        picture = picture.get("bytes")
    if isinstance(picture, Path):
        try:
            return read_regular(picture)
        except OSError as error:
            raise BadImage(key, f"{picture}: {error.strerror or error}") from error
    return picture if isinstance(picture, bytes) else None


def _label(value: object, key: str) -> int | None:
    if value is None:
        return None
    if not isinstance(value, SupportsIndex):
        raise ValueError(f"row {key} has the label {value!r}; allowed are integers and None")
    number = value.__index__()
    return None if number == -1 else number


def _column(row: object, name: str | int) -> object:
    if isinstance(row, Mapping):
        return row[name]
    if isinstance(row, Sequence) and isinstance(name, int):
        return row[name]
    raise ValueError(f"a row is a {type(row).__name__} without the column {name!r}")


# ---- Anything that holds images ----


def is_source(data: object) -> TypeGuard[Source]:
    """True if an object is a `Source`."""
    return hasattr(data, "name") and hasattr(data, "classes") and hasattr(data, "__getitem__")


def as_source(data: Any, name: str = "images", classes: Sequence[str] = ()) -> Source:
    """Convert a collection of images to a `Source`.

    An array [N, ...] as for `array_source`, or anything with `len` and `[i]`: images, of Pillow,
    arrays [H, W], [H, W, C] or [C, H, W], bytes or `Path`s of files; tuples of an image and a
    label or a text; or mappings with image, label, caption (or img, text ...). Also a stream of
    such rows without a length, which can be iterated several times, or a function that returns an
    iterator. Floats are [0, 1], or [-1, 1] if some are below 0. Labels are named by `classes`, the
    names that the data set has, or their numbers. Raises `ValueError` for other data.
    """
    if isinstance(data, np.ndarray | Tensor):
        return memory_source(np.asarray(data), name)
    if is_source(data):
        return data
    rows = data
    if not isinstance(data, str | bytes | Mapping) and is_stream(data):
        rows = stream_of(data)
    elif isinstance(data, str | bytes) or not (
        hasattr(data, "__len__") and hasattr(data, "__getitem__")
    ):
        raise ValueError(
            f"images are a {type(data).__name__}; allowed are a path, an array [N, ...], anything "
            "with len and [i], such as a list of arrays or of (image, label), and a stream of rows"
        )
    if len(rows) == 0:
        raise ValueError(f"{name} holds no images")
    first = rows[0]
    image, label, caption = _columns_of(first)
    floats, names = _floats(rows, image, first), tuple(classes)
    if label is not None:
        names = names or _classes(rows, data, label)
    stamp = ""
    if isinstance(data, list | tuple):  # all of it is in memory
        stamp = f"rows {name} {names} {_digest(data, image, label, caption)}"
    kind = StreamSource if isinstance(rows, Stream) else RowSource
    return kind(
        rows=rows,
        name=name,
        classes=names,
        image=image,
        label=label,
        caption=caption,
        span=span_of(floats) if floats else None,
        stamp=stamp,
    )


Column = str | int | None


def _columns_of(row: object) -> tuple[Column, Column, Column]:
    """Names or positions of image, label and caption in a row."""
    if isinstance(row, Mapping):
        columns = [next((n for n in names if n in row), None) for names in (_IMAGES, _LABELS)]
        text = next((n for n in _CAPTIONS if isinstance(row.get(n), str)), None)
        if columns[0] is None:
            raise ValueError(
                f"a row has the columns {', '.join(map(str, row))}; allowed for the image are "
                f"{', '.join(_IMAGES)}; name others by RowSource(rows, name, image=...)"
            )
        return columns[0], columns[1], text
    if isinstance(row, tuple | list):
        labels = [i for i, value in enumerate(row) if i and _is_number(value)]
        texts = [i for i, value in enumerate(row) if i and isinstance(value, str)]
        return 0, labels[0] if labels else None, texts[0] if texts else None
    return None, None, None


def _is_number(value: object) -> bool:
    """True if a value is a single integer, not an array."""
    return isinstance(value, SupportsIndex) and getattr(value, "ndim", 0) == 0


def _probed(rows: Rows, count: int = _PROBED) -> Sequence[int]:
    """Indices of some rows, evenly spaced."""
    return range(0, len(rows), max(len(rows) // count, 1))


def _floats(rows: Rows, image: Column, first: object) -> list[np.ndarray]:
    """Float images among some rows, or among all of a list; of a stream, if the first is one."""
    picture = first if image is None else _column(first, image)
    if isinstance(rows, Stream) and not isinstance(picture, np.ndarray | Tensor):
        return []
    numbers = range(len(rows)) if isinstance(rows, list | tuple) else _probed(rows)
    pictures = (rows[i] if image is None else _column(rows[i], image) for i in numbers)
    arrays = (np.asarray(p) for p in pictures if isinstance(p, np.ndarray | Tensor))
    return [array for array in arrays if array.dtype.kind == "f"]


def _classes(rows: Rows, data: Any, label: str | int) -> tuple[str, ...]:
    """Class names of the data set, or else numbers."""
    names = getattr(data, "classes", None)  # torchvision
    feature = (getattr(data, "features", None) or {}).get(label)  # Hugging Face
    names = names or getattr(feature, "names", None)
    if names:
        return tuple(map(str, names))
    labels = (_label(_column(rows[i], label), str(i)) for i in range(len(rows)))
    highest = max((number for number in labels if number is not None), default=-1)
    return tuple(map(str, range(highest + 1)))


def _digest(rows: Sequence[Any], image: Column, label: Column, caption: Column) -> str:
    """SHA-256 of images, labels and captions in memory."""
    total = hashlib.sha256()
    for row in rows:
        picture = row if image is None else _column(row, image)
        with contextlib.suppress(BadImage):  # which reading it will tell
            content = _encoded(picture, "")
            picture = picture if content is None else np.frombuffer(content, dtype=np.uint8)
        array = np.asarray(picture) if isinstance(picture, Image.Image | np.ndarray | Tensor) else 0
        others = [None if place is None else _column(row, place) for place in (label, caption)]
        total.update(repr((np.shape(array), np.asarray(array).dtype.str, others)).encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()
