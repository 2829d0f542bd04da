"""Write a pack image by image, with checksums and statistics."""

import contextlib
import hashlib
import json
import math
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from patchdiffusion.data.columns import ColumnBase, Stored
from patchdiffusion.data.findings import Levels
from patchdiffusion.data.packinfo import (
    BLOCK_BYTES,
    ENDS,
    IMAGES,
    LABELS,
    SHAPE,
    ArrayInfo,
    PackInfo,
    header,
)
from patchdiffusion.data.space import Space, tally
from patchdiffusion.data.split import digest
from patchdiffusion.system.files import sealed, write_json
from patchdiffusion.system.mapped import Mapped, watch
from patchdiffusion.system.serialize import encode


class ArrayWriter:
    """Appends rows to a file and computes a checksum of each block of them."""

    def __init__(self, stream: BinaryIO, dtype: str, row: tuple[int, ...]):
        self.rows = 0
        self._stream = stream
        self._dtype = np.dtype(dtype)
        self.row = row
        self._block = max(1, BLOCK_BYTES // (math.prod(row) * self._dtype.itemsize))
        self._crc32: list[int] = []

    def add(self, row: np.ndarray) -> bytes:
        """Append one row of the declared type and shape; returns the bytes written."""
        content = self._bytes(row)
        if self.rows % self._block == 0:
            self._crc32.append(0)
        self._crc32[-1] = zlib.crc32(content, self._crc32[-1])
        self._stream.write(content)
        self.rows += 1
        return content

    def extend(self, rows: np.ndarray) -> None:
        """Append many small rows."""
        while len(rows):
            free = self._block - self.rows % self._block
            if free == self._block:
                self._crc32.append(0)
            content = self._bytes(rows[:free])
            self._crc32[-1] = zlib.crc32(content, self._crc32[-1])
            self._stream.write(content)
            self.rows += len(rows[:free])
            rows = rows[free:]

    def _bytes(self, rows: np.ndarray) -> bytes:
        stored = self._dtype.newbyteorder("<")
        return rows.astype(stored, casting="equiv", copy=False).tobytes()

    @property
    def info(self) -> ArrayInfo:
        """Entry of the array in pack.json."""
        shape = (self.rows, *self.row)
        return ArrayInfo(self._dtype.name, shape, self._block, tuple(self._crc32))


class ColumnWriter:
    """Appends the values of a column: one array, or two for values of any length."""

    def __init__(self, folder: Path, column: ColumnBase, stack: contextlib.ExitStack):
        self.column = column
        self.count = 0
        """Number of images that have a value."""
        self._folder = folder
        self._stack = stack
        self._arrays: dict[str, ArrayWriter] = {}

    def add(self, value: Stored | None) -> None:
        """Append the value of an image; None appends the column's value for missing ones."""
        self.count += value is not None
        value = self.column.missing if value is None else value
        assert value is not None  # `misfit` would have refused it
        name = self.column.name
        if isinstance(value, np.ndarray):
            self._array(name, value.dtype.name, value.shape).add(value)
            return
        content = self._array(name, "uint8", ())
        content.extend(np.frombuffer(value, dtype=np.uint8))
        self._array(name + ENDS, "int64", ()).add(np.array(content.rows))

    def _array(self, name: str, dtype: str, row: tuple[int, ...]) -> ArrayWriter:
        if name not in self._arrays:
            stream = self._stack.enter_context(_new(self._folder, f"{name}.bin"))
            self._arrays[name] = ArrayWriter(stream, dtype, row)
        return self._arrays[name]

    def misfit(self, value: Stored | None) -> str:
        """Reason why the value of an image cannot be appended, or ""."""
        if value is None and self.column.missing is None:
            return f"it has no {self.column.name}"
        array = self._arrays.get(self.column.name)
        if array is None or not isinstance(value, np.ndarray) or value.shape == array.row:
            return ""
        return f"{self.column.name} has the shape {list(value.shape)}, not {list(array.row)}"

    def finish(self) -> dict[str, ArrayInfo]:
        """Arrays that were written; none, and no files, if no image has a value."""
        if self.count:
            return {name: array.info for name, array in self._arrays.items()}
        for name in self._arrays:
            (self._folder / f"{name}.bin").unlink()
        return {}


class PackWriter:
    """Writes images one after another into a new pack; memory does not grow with the pixels."""

    def __init__(
        self,
        folder: Path,
        shape: tuple[int, ...],
        dtype: str,
        columns: Sequence[ColumnBase],
        stack: contextlib.ExitStack,
        alpha: bool,
    ):
        self.folder = folder
        self.levels: Levels | None = None
        """Use of the 256 values of pixels; set by `finish`."""
        self.digests = array("Q")
        self.groups = array("Q")
        self.columns = [ColumnWriter(folder, column, stack) for column in columns]
        self._images = ArrayWriter(stack.enter_context(_new(folder, f"{IMAGES}.bin")), dtype, shape)
        self._keys = stack.enter_context(_new(folder, "keys.jsonl"))
        self._sha = hashlib.sha256()
        self._mapped: list[Mapped] = []
        self._tally = tally(dtype, shape[-1], alpha=alpha)

    def misfit(self, values: Sequence[Stored | None]) -> str:
        """Reason why an image with these values cannot be appended, or ""."""
        pairs = zip(self.columns, values, strict=True)
        return next((why for column, value in pairs if (why := column.misfit(value))), "")

    def add(
        self, image: np.ndarray, values: Sequence[Stored | None], key: str, group: str | None
    ) -> None:
        """Append one image of the declared shape and type, with its value of each column."""
        content = self._images.add(image)
        self._sha.update(content)
        self._keys.write(json.dumps([key, group]).encode() + b"\n")
        self._tally.add(image)
        for column, value in zip(self.columns, values, strict=True):
            column.add(value)
        self.digests.append(digest(content))
        is_grouped = group is not None
        self.groups.append(
            digest(b"group " + group.encode(errors="surrogatepass"))
            if is_grouped
            else self.digests[-1]
        )

    def finish(
        self,
        *,
        name: str,
        classes: tuple[str, ...],
        heldout: np.ndarray,
        stamp: str,
        options: dict[str, Any],
    ) -> PackInfo:
        """Write pack.json."""
        images = self._images.info
        arrays = {IMAGES: images}
        for column in self.columns:
            arrays |= column.finish()
        columns = [column.column for column in self.columns if column.count]
        counts: np.ndarray = np.zeros(0, dtype=np.int64)
        if LABELS in arrays:
            labels = self._read(LABELS, arrays[LABELS])
            classes = classes or tuple(str(i) for i in range(int(labels.max()) + 1))
            counts = np.bincount(labels[labels >= 0], minlength=len(classes))
        else:
            classes = ()
        statistics = self._tally.finish(self._read(IMAGES, images))
        self.levels = statistics.levels
        for mapped in self._mapped:
            mapped.check()
        fingerprint = self._fingerprint(statistics.space, arrays, columns, classes, heldout)
        info = PackInfo(
            name=name,
            arrays=arrays,
            space=statistics.space,
            columns=tuple(columns),  # pyright: ignore[reportArgumentType]
            classes=classes,
            class_counts=tuple(int(count) for count in counts),
            mean=statistics.mean,
            std=statistics.std,
            sigma_data=statistics.sigma_data,
            heldout=tuple(int(i) for i in heldout),
            stamp=stamp,
            options=options,
            fingerprint=fingerprint,
        )
        write_json(self.folder / "pack.json", sealed({**encode(info), SHAPE: list(info.shape)}))
        return info

    def _read(self, name: str, of: ArrayInfo) -> np.ndarray:
        file = self.folder / f"{name}.bin"
        array = np.memmap(file, of.dtype, "r", shape=of.shape)
        self._mapped.append(watch(array, file))
        return array

    def _fingerprint(
        self,
        space: Space,
        arrays: dict[str, ArrayInfo],
        columns: list[ColumnBase],
        classes: tuple[str, ...],
        heldout: np.ndarray,
    ) -> str:
        """SHA-256 of all content that a run depends on; of pixels with labels as in format 1."""
        for name in arrays:
            if name != IMAGES:
                with open(self.folder / f"{name}.bin", "rb") as stream:
                    while content := stream.read(BLOCK_BYTES):
                        self._sha.update(content)
        self._sha.update(header(space, arrays, columns, classes, heldout.tolist()))
        return self._sha.hexdigest()


def _new(folder: Path, name: str) -> BinaryIO:
    return open(folder / name, "wb")


@contextlib.contextmanager
def pack_writer(
    folder: Path,
    shape: tuple[int, ...],
    dtype: str,
    columns: Sequence[ColumnBase] = (),
    *,
    alpha: bool = False,
) -> Iterator[PackWriter]:
    """Context of a writer of images [*S, C] into a folder; leave it before calling `finish`."""
    with contextlib.ExitStack() as stack:
        yield PackWriter(folder, shape, dtype, columns, stack, alpha)
