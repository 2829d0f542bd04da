"""The content of pack.json: arrays, space, columns and statistics of a pack."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from patchdiffusion.data.columns import Caption, Column, ColumnBase, Label
from patchdiffusion.data.space import Pixels, Space
from patchdiffusion.system.files import SEAL, read_json, unsealed
from patchdiffusion.system.serialize import decode, encode

FORMAT = 2
BLOCK_BYTES = 2**22
IMAGES = "images"
LABELS = Label().name
CAPTIONS = Caption().name
SHAPE = "shape"
"""Entry of pack.json for other programs: shape N, *S, C of the images."""
ENDS = "_ends"
"""Suffix of the array that holds the end of each entry of another one, of any length."""
TYPES = ("uint8", "uint16", "int32", "int64", "float16", "float32")
"""Types of arrays, always stored little-endian."""


@dataclass(frozen=True)
class ArrayInfo:
    """One array of a pack, stored row by row in the file of its name."""

    dtype: str
    shape: tuple[int, ...]
    """The first axis counts the images."""
    block: int
    """Rows per checksum."""
    crc32: tuple[int, ...]

    @property
    def row(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.shape[0] * self.row

    def contradicts(self) -> bool:
        """True if type, shape, block and number of checksums are inconsistent."""
        if self.dtype not in TYPES or not self.shape or min(self.shape) < 1 or self.block < 1:
            return True
        return len(self.crc32) != -(-self.shape[0] // self.block)


@dataclass(frozen=True)
class PackInfo:
    """The content of pack.json."""

    name: str
    arrays: dict[str, ArrayInfo]
    space: Space
    """Meaning of the stored values of the images."""
    columns: tuple[Column, ...]
    """Columns of the images; each is stored in the array of its name."""
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]
    mean: tuple[float, ...]
    """Mean of each channel, in the units of the network."""
    std: tuple[float, ...]
    sigma_data: float
    """Standard deviation of all values, in the units of the network."""
    heldout: tuple[int, ...]
    stamp: str
    """Changes when the source changes; empty if the source cannot tell."""
    options: dict[str, Any]
    fingerprint: str
    """SHA-256 of the images, columns, classes and held-out images."""
    format: int = FORMAT

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array of images: N, *S, C."""
        return self.arrays[IMAGES].shape


def read_info(file: Path) -> PackInfo:
    """Content of a pack.json; raises `ValueError` if it has another format."""
    if not file.is_file():
        raise ValueError(f"{file.parent} is not a pack: it has no pack.json")
    content = read_json(file)
    names = {"type", *(f.name for f in fields(PackInfo))}
    known = isinstance(content, dict) and content.get("format") == FORMAT
    if not known or content.keys() - {SEAL, SHAPE} != names:
        raise ValueError(f"{file} is not a pack of format {FORMAT}; prepare the data again")
    try:
        info = decode(PackInfo, {k: v for k, v in unsealed(content).items() if k != SHAPE})
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if _contradicts(info) or content.get(SHAPE, list(info.shape)) != list(info.shape):
        raise ValueError(f"{file} contradicts itself (arrays, space or held-out images)")
    return info


def _contradicts(info: PackInfo) -> bool:
    images = info.arrays.get(IMAGES)
    if images is None or images.contradicts() or images.dtype != info.space.dtype:
        return True
    try:
        info.space.channels(images.shape[-1])
    except ValueError:
        return True
    count = images.shape[0]
    if not all(0 <= i < count for i in info.heldout):
        return True
    for name, array in info.arrays.items():
        named = re.fullmatch("[a-z][a-z0-9_]*", name)  # the name of a file
        if not named or array.contradicts():
            return True
        if array.shape[0] != count and name + ENDS not in info.arrays:
            return True
    names = [*(column.name for column in info.columns), *info.space.holds]
    return not all(name in info.arrays for name in names)


def header(
    space: Space,
    arrays: Mapping[str, ArrayInfo],
    columns: Iterable[ColumnBase],
    classes: Sequence[str],
    heldout: Sequence[int],
) -> bytes:
    """Bytes on which the fingerprint of a pack depends beside the content of its arrays."""
    parts: list[Any] = [arrays[IMAGES].shape, classes, heldout]
    others = [encode(column) for column in columns if column != Label()]
    if space.word != Pixels.word or others:
        parts.append([encode(space), others])
    return json.dumps(parts).encode()
