"""Fit images of any size to the size of a pack: largest central box of its aspect ratio, scaled."""

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
    """Image in the size and type of a pack."""

    image: np.ndarray
    """[*S, C]"""
    size: Size
    """Size before fitting, without channels."""
    enlarged: bool


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

    def fitted(self, example: Example) -> Fitted:
        """Fit one image. Raises `BadImage` for one that cannot be used, and `Replan`."""
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

    def infer(self) -> tuple[Size, str]:
        """The common size up to 128, else the power of two below the median of the smaller side.

        Height and width only: further axes keep the length that is most common.
        """
        if not self.probed:
            size = (_LARGEST_INFERRED, _LARGEST_INFERRED)
            return size, "size: no image could be read to infer it"
        basis = f"judged from {len(self.probed)} images"
        first = self.probed[0]
        if len(set(self.probed)) == 1 and max(first[-2:]) <= _SAME_SIZE:
            return first, f"size {size_text(first)}: all images have it ({basis})"
        leading = [size[:-2] for size in self.probed]
        middle = median(min(size[-2:]) for size in self.probed)
        side = min(_LARGEST_INFERRED, 2 ** (int(middle).bit_length() - 1))
        size = (*max(leading, key=leading.count), side, side)
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


def frame_by_frame(
    fit: Callable[[np.ndarray], tuple[np.ndarray, bool]], key: str, image: np.ndarray, size: Size
) -> Fitted:
    """Fit every frame [H, W, C] of an image [*S, C] whose other axes have the lengths in `size`."""
    before = image.shape[:-1]
    if before[:-2] != size[:-2]:
        frames = f"{list(before[:-2])} frames; allowed are {list(size[:-2])}, as in other images"
        raise BadImage(key, frames)
    parts = [fit(frame) for frame in image.reshape(-1, *image.shape[-3:])]
    whole = np.stack([part for part, _ in parts])
    enlarged = any(larger for _, larger in parts)
    return Fitted(whole.reshape(*size[:-2], *whole.shape[1:]), before, enlarged)


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


def resized(picture: Image.Image, size: Size, box: Box) -> np.ndarray:
    """Box of a picture, scaled to `size` (H, W) by whole-number reduction and Lanczos."""
    target = (size[1], size[0])
    if picture.size != target:
        picture = picture.resize(target, Image.Resampling.LANCZOS, box, reducing_gap=3.0)
    return np.asarray(picture)
