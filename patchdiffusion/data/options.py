"""The settings of a run's data, the options of `prepare`, and what it infers if not given."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

import numpy as np

from patchdiffusion.data.augment import Augmentation
from patchdiffusion.data.decode import MAX_SIDE, MIN_SIDE, background_colour, fit, is_grey, to_uint8
from patchdiffusion.data.example import BadImage, Source
from patchdiffusion.data.files import FileSource
from patchdiffusion.data.space import Pixels

_POLICY = 1  # raise it when the same files would give other pixels; packs are then made anew
_PROBED = 256
_SAME_SIZE = 128
_LARGEST_INFERRED = 64
_MAX_WORKERS = 16


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from and how they are prepared."""

    path: str = "glyphs"
    """Folder, zip, array or pack of images, or "glyphs", the built-in set."""
    resolution: int | tuple[int, int] | None = None
    """Side, or height and width, in pixels; None chooses from the images."""
    channels: Literal[1, 3, 4] | None = None
    """1 grey, 3 colour, 4 with alpha; None chooses from the images."""
    flip: bool = False
    """Mirror images left to right at random, before they are cropped."""
    augment: Augmentation = field(default_factory=Augmentation)
    """Changes that the network is told of; needs --network.augment-dim 9."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Checked options of `prepare`."""

    resolution: tuple[int, int] | None
    channels: int | None
    background: tuple[int, int, int]
    holdout: float
    max_bad: float

    def identity(self) -> dict[str, Any]:
        """What the content of a pack depends on, as JSON gives it back."""
        return {
            "resolution": None if self.resolution is None else list(self.resolution),
            "channels": self.channels,
            "background": list(self.background),
            "holdout": self.holdout,
            "policy": _POLICY,
        }


@dataclass(frozen=True)
class Plan:
    """Shape of a pack, and why."""

    size: tuple[int, int]
    """Height, width."""
    channels: int
    refuse_colour: bool
    """Grey was inferred from some of the images, so one in colour changes the plan."""
    notes: tuple[str, ...]
    dtype: str = Pixels.dtype
    """Type of the stored values."""

    def shape(self) -> tuple[int, int, int]:
        """H, W, C."""
        return (*self.size, self.channels)


def check_options(
    resolution: int | tuple[int, int] | None,
    channels: int | None,
    background: str | tuple[int, int, int],
    holdout: float,
    max_bad: float | None,
) -> Options:
    """Raises `ValueError` that names the option, its value and what is allowed."""
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    if size is not None:
        size = tuple(int(side) for side in size)
        if len(size) != 2 or not all(MIN_SIDE <= side <= MAX_SIDE for side in size):
            allowed = f"one side or (height, width), each from {MIN_SIDE} to {MAX_SIDE}"
            raise ValueError(f"resolution is {resolution}; allowed is {allowed}")
    if channels is not None and not 1 <= channels < MIN_SIDE:
        allowed = f"1 (grey), 3 (colour), 4 (with alpha); others below {MIN_SIDE} for arrays"
        raise ValueError(f"channels is {channels}; allowed are {allowed}")
    if not 0 <= holdout <= 0.5:
        raise ValueError(f"holdout is {holdout}; allowed is 0 to 0.5")
    limit = 0.1 if max_bad is None else max_bad
    if not 0 <= limit <= 1:
        raise ValueError(f"max_bad is {max_bad}; allowed is 0 to 1")
    return Options(
        resolution=size,
        channels=channels,
        background=background_colour(background),
        holdout=float(holdout),
        max_bad=limit,
    )


def count_workers(workers: int | None, source: Source) -> int:
    """Threads to decode with; sources of other people may not be safe for more than one."""
    if workers is None:
        return min(os.cpu_count() or 1, _MAX_WORKERS) if isinstance(source, FileSource) else 1
    if workers < 1:
        raise ValueError(f"workers is {workers}; allowed is 1 or more")
    return workers


def make_plan(source: Source, options: Options) -> Plan:
    """Look at up to 256 images, evenly spaced, for whatever the options leave open."""
    size, channels = options.resolution, options.channels
    if size is not None and channels is not None:
        return Plan(size, channels, False, ())
    sizes: list[tuple[int, int]] = []
    grey = True
    planes = 1
    for image in _probed(source):
        if size is not None and sizes and not grey:
            break
        sizes.append(image.shape[:2])
        planes = image.shape[2]
        if grey and channels is None and planes in (3, 4):
            small = (min(image.shape[0], 64), min(image.shape[1], 64))
            grey = is_grey(fit(image, small, 3, options.background)[0])
    notes: list[str] = []
    if size is None:
        size, why = _infer_size(sizes)
        notes.append(why)
    if channels is not None:
        return Plan(size, channels, False, tuple(notes))
    if planes not in (1, 3, 4):
        return Plan(size, planes, False, tuple(notes))
    return Plan(size, 1 if grey else 3, grey, tuple(notes))


def common_size(source: Source) -> tuple[int, int] | None:
    """Height and width of the images, by up to 256 of them, or None if they differ."""
    sizes = {image.shape[:2] for image in _probed(source)}
    return sizes.pop() if len(sizes) == 1 else None


def _probed(source: Source) -> Iterator[np.ndarray]:
    count = len(source)
    indices = range(count) if count <= _PROBED else np.linspace(0, count - 1, _PROBED).astype(int)
    for index in indices:
        try:
            example = source[int(index)]
            image = usable(example.key, to_uint8(example))
        except BadImage:
            continue
        yield image


def usable(key: str, image: np.ndarray) -> np.ndarray:
    """The image itself; raises `BadImage` if it is too small."""
    if min(image.shape[:2]) < MIN_SIDE:
        size = f"{image.shape[1]}x{image.shape[0]}"
        raise BadImage(key, f"too small: {size} pixels, each side must have at least {MIN_SIDE}")
    return image


def _infer_size(sizes: list[tuple[int, int]]) -> tuple[tuple[int, int], str]:
    if not sizes:
        return (_LARGEST_INFERRED, _LARGEST_INFERRED), "size: no image could be read to infer it"
    seen = f"judged from {len(sizes)} images"
    if len(set(sizes)) == 1 and max(sizes[0]) <= _SAME_SIZE:
        height, width = sizes[0]
        return sizes[0], f"size {width}x{height}: all images have it ({seen})"
    middle = median(min(size) for size in sizes)
    side = min(_LARGEST_INFERRED, 2 ** (int(middle).bit_length() - 1))
    why = f"the power of two up to the median smaller side {middle:g}, at most {_LARGEST_INFERRED}"
    return (side, side), f"size {side}x{side}: {why} ({seen})"
