"""How images of any size come to the size of a pack: the largest central part of its aspect."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

import numpy as np
from PIL import Image

from patchdiffusion.data.example import BadImage, Example

MIN_SIDE = 8
MAX_SIDE = 4096

_SAME_SIZE = 128
_LARGEST_INFERRED = 64

Size = tuple[int, ...]
Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Fitted:
    """An image in the size and type of a pack."""

    image: np.ndarray
    """[*S, C]"""
    size: Size
    """What it had before, without channels."""
    enlarged: bool


class Plan(Protocol):
    """Shape and type of the images of a pack, and how an image comes to have them."""

    @property
    def size(self) -> Size:
        """Height and width, after other axes if there are any."""
        ...

    @property
    def channels(self) -> int:
        """Of every image."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Why it is this plan, for the report."""
        ...

    @property
    def dtype(self) -> str:
        """Type of the stored values."""
        ...

    def fitted(self, example: Example) -> Fitted:
        """One image. Raises `BadImage` for one that cannot be used, and `Replan`."""
        ...


class Replan(Exception):
    """The images that were looked at have misled: all must be prepared by another plan."""

    def __init__(self, plan: Plan):
        super().__init__(plan)
        self.plan = plan


@dataclass
class Sizes:
    """Sizes of the images that are looked at, and the one that is inferred from them."""

    found: list[Size] = field(default_factory=list)

    def infer(self) -> tuple[Size, str]:
        """The common size up to 128, else the power of two below the median of the smaller side.

        Height and width only: further axes keep the length that is most common.
        """
        if not self.found:
            size = (_LARGEST_INFERRED, _LARGEST_INFERRED)
            return size, "size: no image could be read to infer it"
        seen = f"judged from {len(self.found)} images"
        first = self.found[0]
        if len(set(self.found)) == 1 and max(first[-2:]) <= _SAME_SIZE:
            return first, f"size {size_text(first)}: all images have it ({seen})"
        leading = [size[:-2] for size in self.found]
        middle = median(min(size[-2:]) for size in self.found)
        side = min(_LARGEST_INFERRED, 2 ** (int(middle).bit_length() - 1))
        size = (*max(leading, key=leading.count), side, side)
        rule = f"the power of two up to the median smaller side {middle:g}"
        why = f"{rule}, at most {_LARGEST_INFERRED}"
        return size, f"size {size_text(size)}: {why} ({seen})"


def size_text(size: Iterable[int]) -> str:
    """A size as people write it, width first."""
    return "x".join(str(side) for side in reversed(tuple(size)))


def usable(key: str, image: np.ndarray) -> np.ndarray:
    """The image [*S, C] itself; raises `BadImage` if its sides are too short."""
    if min(image.shape[-3:-1]) < MIN_SIDE:
        size = size_text(image.shape[:-1])
        raise BadImage(key, f"too small: {size} pixels, each side must have at least {MIN_SIDE}")
    return image


def with_channels(example: Example) -> np.ndarray:
    """Its image with an axis of channels; raises `BadImage` for a shape that is no image."""
    image = example.image
    if image.ndim < 2:
        raise BadImage(example.key, f"shape {image.shape}; allowed are [H, W] and [H, W, C]")
    return image[:, :, None] if image.ndim == 2 else image


def frame_by_frame(
    fit: Callable[[np.ndarray], tuple[np.ndarray, bool]], key: str, image: np.ndarray, size: Size
) -> Fitted:
    """Fit every frame [H, W, C] of an image [*S, C], whose other axes must have their length."""
    before = image.shape[:-1]
    if before[:-2] != size[:-2]:
        frames = f"{list(before[:-2])} frames; allowed are {list(size[:-2])}, as others have"
        raise BadImage(key, frames)
    parts = [fit(frame) for frame in image.reshape(-1, *image.shape[-3:])]
    whole = np.stack([part for part, _ in parts])
    enlarged = any(larger for _, larger in parts)
    return Fitted(whole.reshape(*size[:-2], *whole.shape[1:]), before, enlarged)


def central_box(width: int, height: int, size: Size) -> Box:
    """The largest central box of the aspect of `size` (H, W): left, upper, right, lower."""
    if width * size[0] > height * size[1]:
        inner, outer = height * size[1] / size[0], height
    else:
        inner, outer = width, width * size[0] / size[1]
    left, upper = (width - inner) / 2, (height - outer) / 2
    if inner == size[1]:  # a crop without a change of scale stays on the pixel grid
        left, upper = left // 1, upper // 1
    return left, upper, left + inner, upper + outer


def resized(picture: Image.Image, size: Size, box: Box) -> np.ndarray:
    """The box of a picture, brought to a size (H, W) by whole-number reduction and Lanczos."""
    target = (size[1], size[0])
    if picture.size != target:
        picture = picture.resize(target, Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    return np.asarray(picture)
