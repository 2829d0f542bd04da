"""A data set decoded once: a folder with the pixels of all images in one memory-mapped file.

| file         | content                                                                        |
|--------------|--------------------------------------------------------------------------------|
| images.bin   | uint8 [N, H, W, C], row by row                                                 |
| labels.bin   | little-endian int32 [N], -1 = none; absent without labels                      |
| keys.jsonl   | one line per image: ["name", "group" or null]                                  |
| pack.json    | shape, classes, statistics, held-out images, checksums                         |
| report.json, | what was read, what was refused and why                                        |
| report.txt   |                                                                                |
"""

import contextlib
import functools
import hashlib
import json
import math
import warnings
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.data.example import Example
from patchdiffusion.data.split import digest
from patchdiffusion.system.files import parse_json, read_json, write_json
from patchdiffusion.system.serialize import decode

FORMAT = 1
_BLOCK_BYTES = 2**22


@dataclass(frozen=True)
class PackInfo:
    """The content of pack.json."""

    name: str
    shape: tuple[int, int, int, int]
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    mean: tuple[float, ...]
    """Of each channel; data units, where 0 and 255 are -1 and 1."""
    std: tuple[float, ...]
    sigma_data: float
    """Standard deviation of all values together, in data units."""
    heldout: tuple[int, ...]
    stamp: str
    """Changes when the source changes; empty if the source cannot tell."""
    options: dict[str, Any]
    fingerprint: str
    """SHA-256 of the pixels, labels, classes and held-out images."""
    block: int
    """Images per checksum."""
    crc32: tuple[int, ...]
    labels_crc32: int | None
    format: int = FORMAT


@dataclass(frozen=True, eq=False)
class Pack:
    """A pack on disk; also a `Source`. Open one with `Pack.open`, make one with `prepare`."""

    path: Path
    info: PackInfo
    images: Tensor
    """uint8 [N, H, W, C] on the CPU, mapped from the file; writing to it ends the process."""
    labels: Tensor | None
    """int64 [N], -1 = none."""
    train: Tensor
    """int64, indices of the images to train on."""
    heldout: Tensor
    """int64, indices of the images kept for evaluation."""

    @classmethod
    def open(cls, path: str | Path) -> "Pack":
        """Map a pack without reading its pixels; `ValueError` if files are not as recorded."""
        path = Path(path)
        info = _read_info(path / "pack.json")
        count = info.shape[0]
        _expect(path / "images.bin", math.prod(info.shape))
        mapped = np.memmap(path / "images.bin", np.uint8, "r", shape=info.shape)
        with warnings.catch_warnings():
            # Read-only on purpose: a private writable mapping would count as memory in full.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            images = torch.from_numpy(mapped)
        labels = None
        if info.labels_crc32 is not None:
            _expect(path / "labels.bin", 4 * count)
            stored = np.fromfile(path / "labels.bin", "<i4")
            if not ((stored >= -1) & (stored < len(info.classes))).all():
                raise ValueError(f"{path}/labels.bin names classes that pack.json does not have")
            labels = torch.from_numpy(stored.astype(np.int64))
        held = torch.zeros(count, dtype=torch.bool)
        held[list(info.heldout)] = True
        index = torch.arange(count)
        return cls(path, info, images, labels, index[~held], index[held])

    @property
    def name(self) -> str:
        """The name of the source."""
        return self.info.name

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, or ()."""
        return self.info.classes

    @property
    def sigma_data(self) -> float:
        """Measured standard deviation in data units."""
        return self.info.sigma_data

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content."""
        return self.info.fingerprint

    @property
    def stamp(self) -> str:
        """The fingerprint: a pack made from this pack is reused while the content is the same."""
        return self.info.fingerprint

    @functools.cached_property
    def keys(self) -> list[tuple[str, str | None]]:
        """Name and group of each image, read on first use."""
        try:
            with open(self.path / "keys.jsonl", encoding="ascii") as lines:
                keys = [(key, group) for key, group in map(parse_json, lines)]
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path}/keys.jsonl is damaged: {error}") from error
        if len(keys) != len(self):
            raise ValueError(f"{self.path}/keys.jsonl has {len(keys)} lines, not {len(self)}")
        return keys

    def some_held_out(self, most: int) -> Tensor:
        """Indices of at most so many held-out images, evenly spaced: classes follow each other."""
        count = min(most, len(self.heldout))
        return self.heldout[torch.arange(count) * len(self.heldout) // max(count, 1)]

    def __len__(self) -> int:
        return self.info.shape[0]

    def __getitem__(self, index: int) -> Example:
        key, group = self.keys[index]
        label = -1 if self.labels is None else int(self.labels[index])
        image = self.images[index].numpy().copy()
        return Example(image, None if label < 0 else label, key, group, mode="pack")

    def verify(self) -> None:
        """Read everything and compare checksums; raises `ValueError` that names the bad block."""
        info = self.info
        step = info.block * int(np.prod(info.shape[1:]))
        with open(self.path / "images.bin", "rb") as stream:
            for number, expected in enumerate(info.crc32):
                if zlib.crc32(stream.read(step)) != expected:
                    first = number * info.block
                    last = min(first + info.block, len(self)) - 1
                    raise ValueError(
                        f"{self.path}/images.bin is damaged: block {number} "
                        f"(images {first} to {last}) does not have its recorded checksum"
                    )
        if info.labels_crc32 is not None:
            content = (self.path / "labels.bin").read_bytes()
            if zlib.crc32(content) != info.labels_crc32:
                raise ValueError(f"{self.path}/labels.bin does not have its recorded checksum")


def _expect(file: Path, size: int) -> None:
    actual = file.stat().st_size if file.is_file() else None
    if actual != size:
        found = "is missing" if actual is None else f"has {actual} bytes"
        raise ValueError(f"{file} {found}; {size} bytes are recorded in pack.json")


def _read_info(file: Path) -> PackInfo:
    if not file.is_file():
        raise ValueError(f"{file.parent} is not a pack: it has no pack.json")
    content = read_json(file)
    names = {f.name for f in fields(PackInfo)}
    if not isinstance(content, dict) or content.get("format") != FORMAT or set(content) != names:
        raise ValueError(f"{file} is not a pack of format {FORMAT}; prepare the data again")
    try:
        info = decode(PackInfo, content)
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    count = info.shape[0] if min(info.shape) > 0 else 0
    blocks = -(-count // info.block) if info.block > 0 else 0
    if not count or len(info.crc32) != blocks or not all(0 <= i < count for i in info.heldout):
        raise ValueError(f"{file} contradicts itself (shape, blocks or held-out images)")
    return info


class PackWriter:
    """Writes images one after another into a new pack; memory does not grow with the pixels."""

    def __init__(self, folder: Path, shape: tuple[int, int, int], images: BinaryIO, keys: BinaryIO):
        self.folder = folder
        self.shape = shape
        self.block = max(1, _BLOCK_BYTES // int(np.prod(shape)))
        self.digests = array("Q")
        self.groups = array("Q")
        self.labels = array("q")
        self._crc32: list[int] = []
        self._sha = hashlib.sha256()
        self._histogram = np.zeros((shape[2], 256), dtype=np.int64)
        self._images = images
        self._keys = keys

    def add(self, image: np.ndarray, label: int | None, key: str, group: str | None) -> None:
        """Append one image, uint8 of the shape given."""
        content = image.tobytes()
        if len(self.digests) % self.block == 0:
            self._crc32.append(0)
        self._crc32[-1] = zlib.crc32(content, self._crc32[-1])
        self._sha.update(content)
        self._images.write(content)
        self._keys.write(json.dumps([key, group]).encode() + b"\n")
        for channel, counts in enumerate(self._histogram):
            counts += np.bincount(image[:, :, channel].reshape(-1), minlength=256)
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
        labels = np.array(self.labels, dtype="<i4")
        labelled = bool((labels >= 0).any())
        content = labels.tobytes() if labelled else b""
        if labelled:
            (self.folder / "labels.bin").write_bytes(content)
            classes = classes or tuple(str(i) for i in range(int(labels.max()) + 1))
        counts = np.bincount(labels[labels >= 0], minlength=len(classes)) if labelled else ()
        mean, std = _moments(self._histogram)
        shape = (len(labels), *self.shape)
        header = [shape, classes if labelled else (), [int(i) for i in heldout]]
        sha = self._sha.copy()
        sha.update(content)
        sha.update(json.dumps(header).encode())
        info = PackInfo(
            name=name,
            shape=shape,
            classes=classes if labelled else (),
            class_counts=tuple(int(count) for count in counts),
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            sigma_data=float(_moments(self._histogram.sum(0, keepdims=True))[1][0]),
            heldout=tuple(int(i) for i in heldout),
            stamp=stamp,
            options=options,
            fingerprint=sha.hexdigest(),
            block=self.block,
            crc32=tuple(self._crc32),
            labels_crc32=zlib.crc32(content) if labelled else None,
        )
        write_json(self.folder / "pack.json", asdict(info))
        return info


@contextlib.contextmanager
def pack_writer(folder: Path, shape: tuple[int, int, int]) -> Iterator[PackWriter]:
    """A writer of images [H, W, C] into a folder; leave the context before `finish`."""
    with open(folder / "images.bin", "wb") as images, open(folder / "keys.jsonl", "wb") as keys:
        yield PackWriter(folder, shape, images, keys)


def _moments(histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation in data units of each row of counts [C, 256]."""
    values = np.arange(256) / 127.5 - 1
    weight = histogram / histogram.sum(1, keepdims=True)
    mean = weight @ values
    return mean, np.sqrt((weight * (values - mean[:, None]) ** 2).sum(1))
