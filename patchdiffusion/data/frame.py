"""Fit images of any size to the size of a pack: cropped, padded, stretched or cut, and scaled."""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from patchdiffusion.data.example import BadImage, Example
from patchdiffusion.system.text import counted

MIN_SIDE = 8
MAX_SIDE = 4096

_SAME_SIZE = 128
_LARGEST_INFERRED = 64
_MOST_WINDOWS = 1000
_LOOKED_AT = 2**14  # values of an image, for its levels

Size = tuple[int, ...]
Box = tuple[float, float, float, float]
Fit = Literal["crop", "pad", "stretch", "windows"]


@dataclass(frozen=True, eq=False)
class Fitted:
    """Image in the size and type of a pack."""

    image: np.ndarray
    """[*S, C]"""
    size: Size
    """Size before fitting, without channels."""
    enlarged: bool
    lost: float = 0.0
    """Fraction of its area that was cut off."""
    raw: "Raw | None" = None
    """Statistics of its values before conversion to pixels, if that changed them."""
    clipped: bool = False
    """True if values outside of the range were clipped."""
    composed: bool = False
    """True if transparent pixels were composed over a background."""


class Plan(Protocol):
    """Shape and type of the images of a pack, and the conversion of an image to them."""

    @property
    def size(self) -> Size:
        """Height and width, after other axes if there are any."""
        ...

    @property
    def channels(self) -> int:
        """Number of channels of every image."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Reasons for this plan, for the report."""
        ...

    @property
    def dtype(self) -> str:
        """Type of the stored values."""
        ...

    @property
    def alpha(self) -> bool:
        """True if the last of four channels is alpha."""
        ...

    @property
    def frame(self) -> "Frame":
        """Size, and the way in which images of another shape are fitted to it."""
        ...

    def fitted(self, example: Example, window: "Frame | None" = None) -> Fitted:
        """Fit one image, or the window of it that one of `frame.windows` takes.

        Raises `BadImage` for one that cannot be used, and `Replan`.
        """
        ...


class Replan(Exception):
    """Raised if the probed images were not representative: all must be prepared by another plan."""

    def __init__(self, plan: Plan):
        super().__init__(plan)
        self.plan = plan


@dataclass
class Sizes:
    """Sizes of the probed images, and the size that is inferred from them."""

    probed: list[Size] = field(default_factory=list)

    def with_frames(self, size: Size) -> Size:
        """Height and width, after the most common lengths of further axes."""
        leading = [probed[:-2] for probed in self.probed]
        return (*max(leading, key=leading.count, default=()), *size)

    def infer(self) -> tuple[Size, str]:
        """The common size up to 128, else the power of two below the median of the smaller side.

        Height and width only: further axes keep the length that is most common.
        """
        if not self.probed:
            size = (_LARGEST_INFERRED, _LARGEST_INFERRED)
            return size, "size: no image could be read to infer it"
        basis = f"judged from {counted(len(self.probed), 'image')}"
        first = self.probed[0]
        if len(set(self.probed)) == 1 and max(first[-2:]) <= _SAME_SIZE:
            return first, f"size {size_text(first)}: all images have it ({basis})"
        middle = median(min(size[-2:]) for size in self.probed)
        side = min(_LARGEST_INFERRED, 2 ** (int(middle).bit_length() - 1))
        size = self.with_frames((side, side))
        rule = f"the power of two up to the median smaller side {middle:g}"
        why = f"{rule}, at most {_LARGEST_INFERRED}"
        return size, f"size {size_text(size)}: {why} ({basis})"


def size_text(size: Iterable[int]) -> str:
    """Size as text, width first, such as 64x32."""
    return "x".join(str(side) for side in reversed(tuple(size)))


def usable(key: str, image: np.ndarray) -> np.ndarray:
    """The image [*S, C] itself; raises `BadImage` if its sides are too short."""
    if min(image.shape[-3:-1]) < MIN_SIDE:
        size = size_text(image.shape[:-1])
        raise BadImage(key, f"too small: {size} pixels, each side must have at least {MIN_SIDE}")
    return image


def with_channels(example: Example) -> np.ndarray:
    """Image of an example with an axis of channels; raises `BadImage` for fewer than two axes."""
    image = example.image
    if image.ndim < 2:
        raise BadImage(example.key, f"shape {image.shape}; allowed are [H, W] and [H, W, C]")
    return image[:, :, None] if image.ndim == 2 else image


@dataclass(frozen=True)
class Frame:
    """Size of a pack, and the way in which images of another shape are fitted to it."""

    size: Size
    """Height and width, after other axes if there are any."""
    fit: Fit = "crop"
    window: int = 0
    """Number of the part that is taken, if `fit` is "windows"."""

    def windows(self, key: str, width: int, height: int) -> "tuple[Frame, ...]":
        """Frames that together take all of an image; more than one only if `fit` is "windows".

        Raises `BadImage` for a strip that would be cut into more than 1,000.
        """
        if self.fit != "windows":
            return (self,)
        count = len(_window_boxes(width, height, self.size[-2:]))
        if count > _MOST_WINDOWS:
            shape = f"{width}x{height} pixels would be cut into {count:,} windows"
            raise BadImage(key, f"{shape}; allowed are {_MOST_WINDOWS:,}")
        return tuple(replace(self, window=number) for number in range(count))

    def box(self, width: int, height: int) -> Box:
        """Part of an image that is kept: left, upper, right, lower."""
        size = self.size[-2:]
        if self.fit == "windows":
            return _window_boxes(width, height, size)[self.window]
        return central_box(width, height, size) if self.fit == "crop" else (0, 0, width, height)

    def cut(self, image: np.ndarray) -> tuple[np.ndarray, Box]:
        """The pixels [H, W, C] that are scaled, and the box of them that is kept.

        Of a window only its own, as if it were a picture: filters see nothing beyond its border.
        """
        height, width = image.shape[:2]
        left, upper, right, lower = box = self.box(width, height)
        if self.fit != "windows" or self.lost(width, height):
            return image, box
        x, y = int(left), int(upper)
        part = image[y : math.ceil(lower), x : math.ceil(right)]
        return part, (left - x, upper - y, right - x, lower - y)

    def inner(self, width: int, height: int) -> Size:
        """Height and width of the scaled part; the rest of the frame is padding."""
        size = self.size[-2:]
        if self.fit != "pad":
            return size
        scale = min(size[0] / height, size[1] / width)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def lost(self, width: int, height: int) -> float:
        """Fraction of the area of an image that is cut off."""
        if self.fit == "windows" and len(_window_boxes(width, height, self.size[-2:])) > 1:
            return 0.0
        left, upper, right, lower = self.box(width, height)
        return 1 - (right - left) * (lower - upper) / (width * height)

    def enlarges(self, width: int, height: int) -> float:
        """Factor by which an image is enlarged, below 1 if it is reduced."""
        left, upper, right, lower = self.box(width, height)
        inner = self.inner(width, height)
        return max(inner[0] / (lower - upper), inner[1] / (right - left))

    def paste(self, part: np.ndarray, fill: np.ndarray) -> np.ndarray:
        """The part [h, w, C] in the middle of the frame, on padding of this color [C]."""
        size = self.size[-2:]
        if part.shape[:2] == size:
            return part
        whole = np.empty((*size, part.shape[2]), part.dtype)
        whole[...] = fill
        top, left = (size[0] - part.shape[0]) // 2, (size[1] - part.shape[1]) // 2
        whole[top : top + part.shape[0], left : left + part.shape[1]] = part
        return whole


@dataclass(frozen=True)
class Raw:
    """Statistics of the values of an image before conversion to pixels."""

    low: float
    high: float
    most: float
    """99.5th percentile."""
    levels: int
    """Number of distinct values in a sample."""
    whole: bool
    """True if they are whole numbers."""

    @classmethod
    def of(cls, image: np.ndarray) -> "Raw":
        """Statistics of an image; `levels` from a sample of large ones."""
        flat = image.reshape(-1)
        some = flat[:: max(1, flat.size // _LOOKED_AT)]
        levels = len(np.unique(some))
        most = float(np.percentile(some, 99.5))
        whole = image.dtype.kind != "f"
        return cls(float(flat.min()), float(flat.max()), most, levels, whole)


def frame_by_frame(
    fit: Callable[[np.ndarray], np.ndarray], key: str, image: np.ndarray, frame: Frame
) -> Fitted:
    """Fit every frame [H, W, C] of an image [*S, C] whose other axes have the lengths in `size`."""
    before, size = image.shape[:-1], frame.size
    if before[:-2] != size[:-2]:
        frames = f"{list(before[:-2])} frames; allowed are {list(size[:-2])}, as in other images"
        raise BadImage(key, frames)
    whole = np.stack([fit(part) for part in image.reshape(-1, *image.shape[-3:])])
    height, width = before[-2:]
    enlarged = frame.enlarges(width, height) > 1
    whole = whole.reshape(*size[:-2], *whole.shape[1:])
    return Fitted(whole, before, enlarged, lost=frame.lost(width, height))


def central_box(width: int, height: int, size: Size) -> Box:
    """Largest central box with the aspect ratio of `size` (H, W): left, upper, right, lower."""
    if width * size[0] > height * size[1]:
        inner, outer = height * size[1] / size[0], height
    else:
        inner, outer = width, width * size[0] / size[1]
    left, upper = (width - inner) / 2, (height - outer) / 2
    if inner == size[1]:  # a crop without a change of scale stays on the pixel grid
        left, upper = left // 1, upper // 1
    return left, upper, left + inner, upper + outer


@functools.lru_cache(maxsize=64)  # asked for by every window of an image
def _window_boxes(width: int, height: int, size: Size) -> tuple[Box, ...]:
    """The fewest boxes of the aspect of `size` (H, W) that cover an image, evenly spaced.

    One, the central box, leaves out less than half a pixel of the scaled image.
    """
    box = central_box(width, height, size)
    is_wide = width * size[0] > height * size[1]
    long, inner = (width, box[2] - box[0]) if is_wide else (height, box[3] - box[1])
    count = math.ceil(long / inner - 1e-9)
    if count == 1 or (long - inner) / inner * size[is_wide] < 0.5:
        return (box,)
    starts = [number * (long - inner) / (count - 1) for number in range(count)]
    if inner == int(inner):  # stays on the pixel grid
        starts = [math.floor(start + 0.5) for start in starts]
    spans = [(start, min(start + inner, long)) for start in starts]
    if is_wide:
        return tuple((left, box[1], right, box[3]) for left, right in spans)
    return tuple((box[0], upper, box[2], lower) for upper, lower in spans)


def resized(picture: Image.Image, size: Size, box: Box) -> np.ndarray:
    """Box of a picture, scaled to `size` (H, W) by whole-number reduction and Lanczos."""
    target = (size[1], size[0])
    if picture.size != target:
        picture = picture.resize(target, Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    return np.asarray(picture)
