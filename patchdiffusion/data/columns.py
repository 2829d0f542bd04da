"""Columns: what belongs to an image beside its pixels, from files through a pack to a batch.

A column says what is stored of an image, which field of `Cond` it fills in a batch (or that it
travels in `Batch.columns` under its name), and how it follows the crop. A new kind is a class with
`value` and `take`, and a place in the union `Column`.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import overload

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.data.example import BadImage, Example
from patchdiffusion.data.frame import Size, frame_by_frame
from patchdiffusion.data.values import fit, to_values
from patchdiffusion.patches import average_pool

Stored = np.ndarray | bytes
"""Of one image: an array of the same type and shape for all of them, or bytes of any length."""


@dataclass(frozen=True)
class Crops:
    """Which images a batch takes, and which pixels of them."""

    index: Tensor
    """int64 [B]"""
    places: tuple[Tensor, ...]
    """Along each axis the indices of the pixels, to be broadcast; of mirrored images mirrored."""
    pitch: int
    """Pixels that are averaged to one, along each axis."""

    def whole(self, stored: Tensor) -> Tensor:
        """What is stored of each image: [N, ...] -> [B, ...]."""
        return stored[self.index]

    def pixels(self, stored: Tensor) -> Tensor:
        """The pixels of each crop: [N, *S, C] -> [B, *size, C]."""
        each = (-1, *(1 for _ in self.places))
        return stored[(self.index.view(each), *self.places)]


@dataclass(frozen=True, kw_only=True)
class ColumnBase:
    """What every column has."""

    name: str
    """Of its array in a pack, and in `Batch.columns`."""
    fills: str | None = None
    """Field of the condition that it fills, such as extra or context; None is none."""

    @property
    def missing(self) -> Stored | None:
        """What is stored of an image that has no value; None refuses such images."""
        return None

    def value(self, example: Example, size: Size) -> Stored | None:
        """What is stored of an image that is brought to this size; None is no value."""
        raise NotImplementedError

    def take(self, stored: Tensor, crops: Crops) -> Tensor:
        """The values of a batch, where they are stored; they are moved as they are."""
        return crops.whole(stored)

    def seen(self, taken: Tensor, pitch: int) -> Tensor:
        """The same on the device, as the network sees them."""
        return taken


@dataclass(frozen=True, kw_only=True)
class Label(ColumnBase):
    """The class of an image; one may have none."""

    name: str = "labels"
    fills: str | None = "labels"

    @property
    def missing(self) -> Stored | None:
        """-1 is none."""
        return np.array(-1, dtype=np.int32)

    def value(self, example: Example, size: Size) -> Stored | None:
        """The number of its class."""
        return None if example.label is None else np.array(example.label, dtype=np.int32)


@dataclass(frozen=True, kw_only=True)
class Caption(ColumnBase):
    """A text about an image, of any length; in a batch stands the number of the image.

    `Pack.captions` gives the text of a number.
    """

    name: str = "captions"

    @property
    def missing(self) -> Stored | None:
        """An empty text is none."""
        return b""

    def value(self, example: Example, size: Size) -> Stored | None:
        """Its text in UTF-8."""
        return example.caption.encode() if example.caption else None

    def take(self, stored: Tensor, crops: Crops) -> Tensor:
        """Texts are no tensors: which images they belong to."""
        return crops.index


@dataclass(frozen=True, kw_only=True)
class Vector(ColumnBase):
    """Numbers about a whole image, such as a pose or the features of an encoder."""

    name: str = "vector"
    """Array of the .npz file, or entry of `Example.columns`."""

    def value(self, example: Example, size: Size) -> Stored | None:
        """The numbers as float32."""
        found = example.columns.get(self.name)
        if found is None:
            return None
        if found.dtype.kind not in "biuf" or not np.isfinite(found).all():
            raise BadImage(example.key, f"{self.name} holds {found.dtype}, NaN or infinity")
        return found.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Map(ColumnBase):
    """Numbers about every pixel, such as depth or a mask: cropped and mirrored with the image."""

    name: str = "map"
    """Array of the .npz file, or entry of `Example.columns`: [*S] or [*S, C], as the image."""
    fills: str | None = "image"

    def value(self, example: Example, size: Size) -> Stored | None:
        """The map as float32, brought to the size of the image in the same way."""
        found = example.columns.get(self.name)
        if found is None:
            return None
        shape = example.image.shape if example.image.ndim == 2 else example.image.shape[:-1]
        found = found[..., None] if found.ndim == len(shape) else found
        if found.shape[:-1] != shape:
            lengths = f"{list(found.shape[:-1])} instead of {list(shape)}"
            raise BadImage(example.key, f"{self.name} is of another size than the image: {lengths}")
        values = to_values(Example(found, None, example.key)).astype(np.float32)
        return frame_by_frame(lambda x: fit(x, size[-2:]), example.key, values, size).image

    def take(self, stored: Tensor, crops: Crops) -> Tensor:
        """The part that lies under each crop."""
        return crops.pixels(stored)

    def seen(self, taken: Tensor, pitch: int) -> Tensor:
        """Channels second, averaged as the image is: [B, *S, C] -> [B, C, *S]."""
        return average_pool(taken.movedim(-1, 1), pitch)


Column = Label | Caption | Vector | Map
AUTOMATIC: tuple[ColumnBase, ...] = (Label(), Caption())
"""Columns of every pack whose images have them."""


def all_columns(more: Iterable[ColumnBase]) -> tuple[ColumnBase, ...]:
    """The automatic ones and these; raises `ValueError` for an impossible name or field."""
    known = {column.name: column for column in AUTOMATIC}
    conditions = [f.name for f in fields(Cond)]
    for column in more:
        if column in AUTOMATIC:
            continue
        if not re.fullmatch("[a-z][a-z0-9_]*", column.name) or column.name in ("images", *known):
            taken = ", ".join(("images", *known))
            raise ValueError(f"columns: {column.name!r} is no name or taken; taken are {taken}")
        if column.fills not in (None, *conditions):
            allowed = f"allowed are {', '.join(conditions)}"
            raise ValueError(f"columns: {column.name} fills {column.fills!r}; {allowed}")
        known[column.name] = column
    return tuple(known.values())


# ---- In use ----


@dataclass(frozen=True, eq=False)
class Filled:
    """A column with its values for all images."""

    column: ColumnBase
    values: Tensor
    """[N, ...]"""

    def to(self, device: torch.device) -> "Filled":
        """The same on another device."""
        return Filled(self.column, self.values.to(device))


def used(columns: Iterable[Filled], reads: Collection[str]) -> tuple[Filled, ...]:
    """Those that a network which reads these fields of `Cond` needs, and those of the batch."""
    return tuple(c for c in columns if c.column.fills is None or c.column.fills in reads)


def with_labels(columns: Iterable[Filled], labels: Tensor | None) -> tuple[Filled, ...]:
    """The same columns with other labels, or without any."""
    others = tuple(c for c in columns if c.column.name != Label().name)
    return others if labels is None else (Filled(Label(), labels), *others)


class Texts(Sequence[str | None]):
    """Texts of any length: the bytes of all of them, and where each ends."""

    def __init__(self, content: Tensor, ends: Tensor):
        self._content = content
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[str | None]: ...
    def __getitem__(self, index: int | slice) -> str | list[str | None] | None:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"there are {len(self)} texts, and none at {index}")
        index %= len(self)
        start = int(self._ends[index - 1]) if index else 0
        return self._content[start : int(self._ends[index])].numpy().tobytes().decode() or None
