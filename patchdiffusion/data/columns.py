"""Columns: data of images beside their pixels (labels, captions, maps), from files to batches.

A column defines the value that a pack stores for an image, the field of `Cond` that it fills in a
batch (if none, the batch has it in `Batch.columns` under its name), and how it is cropped. A new
kind is a class with `value` and `take`, and a member of the union `Column`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, overload

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.data.example import BadImage, Example
from patchdiffusion.data.frame import Frame, frame_by_frame
from patchdiffusion.data.values import fit, to_values
from patchdiffusion.nets.layers import pad_to_multiple
from patchdiffusion.patches import average_pool

Stored = np.ndarray | bytes
"""Value of one image: an array of one type and shape for all images, or bytes of any length."""


@dataclass(frozen=True)
class Crops:
    """Indices of the images of a batch, and of the pixels of their crops."""

    index: Tensor
    """int64 [B]"""
    grid: tuple[Tensor, ...]
    """Pixel indices along each axis, broadcastable; mirrored for mirrored images."""
    pitch: int
    """Image pixels averaged into one pixel of the crop, along each axis."""

    def whole(self, stored: Tensor) -> Tensor:
        """Values of whole images: [N, ...] -> [B, ...]."""
        return stored[self.index]

    def pixels(self, stored: Tensor) -> Tensor:
        """Pixels of the crops: [N, *S, C] -> [B, *size, C]."""
        each = (-1, *(1 for _ in self.grid))
        return stored[(self.index.view(each), *self.grid)]


@dataclass(frozen=True, kw_only=True)
class ColumnBase(ABC):
    """Base of all columns."""

    name: str
    """Name of the array in a pack, and of the entry of `Batch.columns`."""
    fills: str | None = None
    """Field of the condition that the column fills, such as extra or context; None fills none."""
    spatial: ClassVar[bool] = False
    """True for values of pixels, which `take` crops."""

    @property
    def missing(self) -> Stored | None:
        """Stored value of an image without one; None refuses such images."""
        return None

    @abstractmethod
    def value(self, example: Example, frame: Frame) -> Stored | None:
        """Stored value of an image that is fitted to the frame, or None if it has no value."""

    def take(self, stored: Tensor, crops: Crops) -> Tensor:
        """Values of a batch, in the stored type and on the device of `stored`."""
        return crops.whole(stored)

    def seen(self, taken: Tensor, pitch: int) -> Tensor:
        """Values of a batch on the network's device, as the network sees them."""
        return taken

    def reduced(self, values: Tensor, factor: int) -> Tensor:
        """Values of images [N, ...] for latents, each of which is `factor` pixels wide and high."""
        return values


@dataclass(frozen=True, kw_only=True)
class Label(ColumnBase):
    """Class label of an image; optional."""

    name: str = "labels"
    fills: str | None = "labels"

    @property
    def missing(self) -> Stored | None:
        """-1: no label."""
        return np.array(-1, dtype=np.int32)

    def value(self, example: Example, frame: Frame) -> Stored | None:
        """Index of the class, int32."""
        return None if example.label is None else np.array(example.label, dtype=np.int32)


@dataclass(frozen=True, kw_only=True)
class Caption(ColumnBase):
    """Text about an image, of any length; a batch holds the index of the image instead.

    `Pack.captions[index]` is the text.
    """

    name: str = "captions"

    @property
    def missing(self) -> Stored | None:
        """Empty: no caption."""
        return b""

    def value(self, example: Example, frame: Frame) -> Stored | None:
        """Caption in UTF-8."""
        return example.caption.encode() if example.caption else None

    def take(self, stored: Tensor, crops: Crops) -> Tensor:
        """Indices of the images, as texts are not tensors."""
        return crops.index


@dataclass(frozen=True, kw_only=True)
class Vector(ColumnBase):
    """Vector that describes a whole image, such as a pose or the features of an encoder."""

    name: str = "vector"
    """Array of the .npz file, or entry of `Example.columns`."""

    def value(self, example: Example, frame: Frame) -> Stored | None:
        """The vector as float32; raises `BadImage` unless all values are finite numbers."""
        vector = example.columns.get(self.name)
        if vector is None:
            return None
        if vector.dtype.kind not in "biuf" or not np.isfinite(vector).all():
            reason = f"{self.name} ({vector.dtype}) holds values that are not finite numbers"
            raise BadImage(example.key, reason)
        return vector.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Map(ColumnBase):
    """Values of every pixel, such as depth or a mask: cropped and mirrored with the image."""

    name: str = "map"
    """Array of the .npz file, or entry of `Example.columns`: [*S] or [*S, C], as the image."""
    fills: str | None = "image"
    spatial: ClassVar[bool] = True

    def value(self, example: Example, frame: Frame) -> Stored | None:
        """The map as float32, brought into the frame as the image is."""
        values = example.columns.get(self.name)
        if values is None:
            return None
        shape = example.image.shape if example.image.ndim == 2 else example.image.shape[:-1]
        values = values[..., None] if values.ndim == len(shape) else values
        if values.shape[:-1] != shape:
            sizes = f"{list(values.shape[:-1])}, but its image has {list(shape)}"
            raise BadImage(example.key, f"{self.name} has the size {sizes}")
        values = to_values(Example(values, None, example.key)).astype(np.float32)
        return frame_by_frame(lambda x: fit(x, frame), example.key, values, frame).image

    def take(self, stored: Tensor, crops: Crops) -> Tensor:
        """The part of the map under each crop."""
        return crops.pixels(stored)

    def seen(self, taken: Tensor, pitch: int) -> Tensor:
        """Averaged over `pitch` pixels, channels second: [B, *S, C] -> [B, C, *S]."""
        return average_pool(taken.movedim(-1, 1), pitch)

    def reduced(self, values: Tensor, factor: int) -> Tensor:
        """Means over the pixels of each latent: [N, H, W, C] -> [N, h, w, C]."""
        x = pad_to_multiple(values.movedim(-1, 1), (factor,) * (values.ndim - 2))
        return average_pool(x, factor).movedim(1, -1).contiguous()


@dataclass(frozen=True, kw_only=True)
class Depth(Map):
    """Depth of every pixel, of cat.depth.png beside cat.png."""

    name: str = "depth"
    fills: str | None = None


Column = Label | Caption | Vector | Map | Depth
AUTOMATIC: tuple[ColumnBase, ...] = (Label(), Caption())
"""Columns that a pack always stores if images have them."""


def all_columns(more: Iterable[ColumnBase]) -> tuple[ColumnBase, ...]:
    """`AUTOMATIC` and further columns; raises `ValueError` for an invalid name or field."""
    by_name: dict[str, ColumnBase] = {column.name: column for column in AUTOMATIC}
    conditions = [f.name for f in fields(Cond)]
    for column in more:
        if column in AUTOMATIC:
            continue
        if not re.fullmatch("[a-z][a-z0-9_]*", column.name) or column.name in ("images", *by_name):
            allowed = f"a-z, 0-9 and _, and none of {', '.join(('images', *by_name))}"
            raise ValueError(f"columns: the name is {column.name!r}; allowed are {allowed}")
        if column.fills not in (None, *conditions):
            allowed = f"allowed are {', '.join(conditions)}"
            raise ValueError(f"columns: {column.name} fills {column.fills!r}; {allowed}")
        by_name[column.name] = column
    return tuple(by_name.values())


# ---- In use ----


@dataclass(frozen=True, eq=False)
class Filled:
    """A column with its values for all images."""

    column: ColumnBase
    values: Tensor
    """[N, ...]"""

    def to(self, device: torch.device) -> "Filled":
        """Copy of the column on another device."""
        return Filled(self.column, self.values.to(device))


def used(columns: Iterable[Filled], reads: Collection[str]) -> tuple[Filled, ...]:
    """Columns that fill one of the fields `reads` of `Cond`, and columns that fill none."""
    return tuple(c for c in columns if c.column.fills is None or c.column.fills in reads)


def with_labels(columns: Iterable[Filled], labels: Tensor | None) -> tuple[Filled, ...]:
    """Columns with the labels replaced, or removed if `labels` is None."""
    others = tuple(c for c in columns if c.column.name != Label().name)
    return others if labels is None else (Filled(Label(), labels), *others)


def relabeled(columns: Iterable[Filled], labels: Tensor | None) -> tuple[Filled, ...]:
    """Columns with other labels, if there are labels among them."""
    name = Label().name
    return tuple(
        c if labels is None or c.column.name != name else Filled(c.column, labels) for c in columns
    )


class Texts(Sequence[str | None]):
    """Sequence of texts, stored as the bytes of all of them and the end of each."""

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
            raise IndexError(f"index is {index}; allowed are {-len(self)} to {len(self) - 1}")
        index %= len(self)
        start = int(self._ends[index - 1]) if index else 0
        return self._content[start : int(self._ends[index])].numpy().tobytes().decode() or None
