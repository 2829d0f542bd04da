"""Writes a pack image by image, with checksums and statistics on the way."""

import contextlib
import hashlib
import json
import math
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from patchdiffusion.data.pack import BLOCK_BYTES, IMAGES, LABELS, ArrayInfo, PackInfo
from patchdiffusion.data.space import Pixels, tally
from patchdiffusion.data.split import digest
from patchdiffusion.system.files import write_json
from patchdiffusion.system.serialize import encode


class ArrayWriter:
    """Appends rows to a file and keeps a checksum of each block of them."""

    def __init__(self, stream: BinaryIO, dtype: str, row: tuple[int, ...]):
        self.rows = 0
        self._stream = stream
        self._dtype = np.dtype(dtype)
        self._row = row
        self._block = max(1, BLOCK_BYTES // (math.prod(row) * self._dtype.itemsize))
        self._crc32: list[int] = []

    def add(self, row: np.ndarray) -> bytes:
        """Append one row of the type and shape given; returns what was written."""
        content = row.astype(self._dtype.newbyteorder("<"), casting="equiv", copy=False).tobytes()
        if self.rows % self._block == 0:
            self._crc32.append(0)
        self._crc32[-1] = zlib.crc32(content, self._crc32[-1])
        self._stream.write(content)
        self.rows += 1
        return content

    @property
    def info(self) -> ArrayInfo:
        """What pack.json says of it."""
        shape = (self.rows, *self._row)
        return ArrayInfo(self._dtype.name, shape, self._block, tuple(self._crc32))


class PackWriter:
    """Writes images one after another into a new pack; memory does not grow with the pixels."""

    def __init__(
        self, folder: Path, shape: tuple[int, ...], dtype: str, images: BinaryIO, keys: BinaryIO
    ):
        self.folder = folder
        self.digests = array("Q")
        self.groups = array("Q")
        self.labels = array("q")
        self._images = ArrayWriter(images, dtype, shape)
        self._keys = keys
        self._sha = hashlib.sha256()
        self._tally = tally(dtype, shape[-1])

    def add(self, image: np.ndarray, label: int | None, key: str, group: str | None) -> None:
        """Append one image of the shape and type given."""
        content = self._images.add(image)
        self._sha.update(content)
        self._keys.write(json.dumps([key, group]).encode() + b"\n")
        self._tally.add(image)
        self.digests.append(digest(content))
        named = group is not None
        self.groups.append(
            digest(b"group " + group.encode(errors="surrogatepass")) if named else self.digests[-1]
        )
        self.labels.append(-1 if label is None else label)

    def finish(
        self,
        *,
        name: str,
        classes: tuple[str, ...],
        heldout: np.ndarray,
        stamp: str,
        options: dict[str, Any],
    ) -> PackInfo:
        """Write labels and pack.json."""
        images = self._images.info
        arrays = {IMAGES: images}
        labels = np.array(self.labels, dtype=np.int32)
        labelled = bool((labels >= 0).any())
        if labelled:
            arrays[LABELS], content = self._write(LABELS, labels)
            self._sha.update(content)
            classes = classes or tuple(str(i) for i in range(int(labels.max()) + 1))
        counts = np.bincount(labels[labels >= 0], minlength=len(classes)) if labelled else ()
        stored = np.memmap(self.folder / f"{IMAGES}.bin", images.dtype, "r", shape=images.shape)
        found = self._tally.finish(stored)
        header: list[Any] = [images.shape, classes if labelled else (), [int(i) for i in heldout]]
        if not isinstance(found.space, Pixels):
            header.append(encode(found.space))
        self._sha.update(json.dumps(header).encode())
        info = PackInfo(
            name=name,
            arrays=arrays,
            space=found.space,
            classes=classes if labelled else (),
            class_counts=tuple(int(count) for count in counts),
            mean=found.mean,
            std=found.std,
            sigma_data=found.sigma_data,
            heldout=tuple(int(i) for i in heldout),
            stamp=stamp,
            options=options,
            fingerprint=self._sha.hexdigest(),
        )
        write_json(self.folder / "pack.json", encode(info))
        return info

    def _write(self, name: str, rows: np.ndarray) -> tuple[ArrayInfo, bytes]:
        """A whole array that is small; also what was written."""
        with open(self.folder / f"{name}.bin", "wb") as stream:
            writer = ArrayWriter(stream, rows.dtype.name, rows.shape[1:])
            content = b"".join([writer.add(row) for row in rows])
        return writer.info, content


@contextlib.contextmanager
def pack_writer(folder: Path, shape: tuple[int, ...], dtype: str) -> Iterator[PackWriter]:
    """A writer of images [*S, C] into a folder; leave the context before `finish`."""
    with open(folder / "images.bin", "wb") as images, open(folder / "keys.jsonl", "wb") as keys:
        yield PackWriter(folder, shape, dtype, images, keys)
