"""The settings of a run's data, and the options of `prepare`."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from patchdiffusion.data.augment import Augmentation
from patchdiffusion.data.columns import Column, ColumnBase, all_columns
from patchdiffusion.data.example import Source
from patchdiffusion.data.files import FileSource
from patchdiffusion.data.frame import MAX_SIDE, MIN_SIDE
from patchdiffusion.data.pixels import background_colour
from patchdiffusion.system.serialize import encode

_POLICY = 1  # raise it when the same files would give other pixels; packs are then made anew
_MAX_WORKERS = 16

SpaceName = Literal["auto", "pixels", "values"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from and how they are prepared."""

    path: str = "glyphs"
    """Folder, zip, array or pack of images, or a built-in set: glyphs, or moving-glyphs (clips)."""
    resolution: int | tuple[int, int] | None = None
    """Side, or height and width, in pixels; None chooses from the images."""
    channels: Literal[1, 3, 4] | None = None
    """1 grey, 3 colour, 4 with alpha; None chooses from the images."""
    space: SpaceName = "auto"
    """pixels: 8 bits; values: 16 bits and floats in their own units, never clipped; auto: pixels
    unless most images are floats or long integers of which some do not fit into them."""
    flip: bool = False
    """Mirror images left to right at random, before they are cropped."""
    augment: Augmentation = field(default_factory=Augmentation)
    """Changes that the network is told of; needs --network.augment-dim 9."""
    columns: tuple[Column, ...] = ()
    """What belongs to an image beside its label and caption, which need not be named."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Checked options of `prepare`."""

    resolution: tuple[int, int] | None
    channels: int | None
    space: SpaceName
    columns: tuple[ColumnBase, ...]
    """All of them, also those that no image may have."""
    background: tuple[int, int, int]
    holdout: float
    max_bad: float

    def identity(self) -> dict[str, Any]:
        """What the content of a pack depends on, as JSON gives it back."""
        return {
            "resolution": None if self.resolution is None else list(self.resolution),
            "channels": self.channels,
            "space": self.space,
            "columns": encode(self.columns),
            "background": list(self.background),
            "holdout": self.holdout,
            "policy": _POLICY,
        }


def check_options(
    resolution: int | tuple[int, int] | None,
    channels: int | None,
    space: SpaceName,
    columns: Iterable[ColumnBase],
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
    if space not in get_args(SpaceName):
        raise ValueError(f"space is {space!r}; allowed are {', '.join(get_args(SpaceName))}")
    if not 0 <= holdout <= 0.5:
        raise ValueError(f"holdout is {holdout}; allowed is 0 to 0.5")
    limit = 0.1 if max_bad is None else max_bad
    if not 0 <= limit <= 1:
        raise ValueError(f"max_bad is {max_bad}; allowed is 0 to 1")
    return Options(
        resolution=size,
        channels=channels,
        space=space,
        columns=all_columns(columns),
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
