"""Configuration of the data of a run, and checked options of `prepare`."""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from patchdiffusion.data.augment import Augmentation
from patchdiffusion.data.columns import Column, ColumnBase, all_columns
from patchdiffusion.data.example import Source, has_fetch
from patchdiffusion.data.files import FileSource
from patchdiffusion.data.frame import MAX_SIDE, MIN_SIDE, Fit
from patchdiffusion.data.labels import LabelSource
from patchdiffusion.data.pixels import background_color
from patchdiffusion.system.checks import positive
from patchdiffusion.system.serialize import encode

_POLICY = 3  # raise it when the same files would give other pixels; packs are then prepared again
_MAX_WORKERS = 16

SpaceName = Literal["auto", "pixels", "values"]
StatisticsOf = Literal["channel", "position"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training images: source, preparation, augmentation and columns."""

    path: str = "glyphs"
    """Folder, zip, array or pack of images, or a built-in set: glyphs, or moving-glyphs (clips)."""
    resolution: int | tuple[int, int] | None = None
    """Side, or height and width, in pixels; None infers it from the images."""
    channels: Literal[1, 3, 4] | None = None
    """1 (gray), 3 (color) or 4 (with alpha, or four bands); None infers it from the images."""
    labels: LabelSource = "auto"
    """Class labels; auto: from a table beside the images, else from folders unless their names
    look like dates or parts; folders: from any folders; off: none."""
    fields: tuple[str, ...] = ()
    """Columns of tables (parquet, Arrow) whose names do not tell: image=NAME label=NAME
    caption=NAME."""
    space: SpaceName = "auto"
    """pixels: 8 bits; values: 16 bits and floats in their own units, never clipped; auto: values
    if most images are floats or wide integers and some of them do not fit into pixels."""
    range: tuple[float, float] | None = None
    """Values that become black and white pixels, such as 0 4095 for 12-bit scans; others are
    clipped and counted. None is the range stated by the files, else that of their type."""
    fit: Fit = "crop"
    """Images of another aspect ratio; crop: take the center; pad: pad with background; stretch;
    windows: several images of each that together cover it, for panoramas and tall pages."""
    max_enlarge: float = 4.0
    """Refuse a resolution that enlarges most images more than this many times."""
    flip: bool = False
    """Mirror images horizontally with probability 1/2, before cropping."""
    augment: Augmentation = field(default_factory=Augmentation)
    """Augmentation that the network is conditioned on; needs --network.augment-dim 9."""
    columns: tuple[Column, ...] = ()
    """Further data of images. Label and caption are always included."""
    autoencoder: str | None = None
    """Autoencoder in whose latents the model is trained: a run or model, a folder of diffusers, or
    a name on the hub. None trains on pixels."""
    variants: int = 1
    """Variants of each image that are encoded: itself, and zoomed random crops of it."""
    statistics: StatisticsOf = "channel"
    """Latents that are standardized together: those of a channel, or those at a position."""

    def __post_init__(self) -> None:
        check_enlarge(self.max_enlarge)
        self.encoding(mirrored=False)

    def encoding(self, *, mirrored: bool) -> "EncodeOptions":
        """Options of the latents of an autoencoder."""
        return EncodeOptions(mirrored=mirrored, variants=self.variants, statistics=self.statistics)


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """Options of latents beside the autoencoder."""

    mirrored: bool = False
    """Encode the mirrored images, too."""
    variants: int = 1
    """Variants of each image: itself, and random crops of half of its area or more, zoomed."""
    statistics: StatisticsOf = "channel"
    """Latents that share a mean and a deviation: those of a channel, or those at a position."""

    def __post_init__(self) -> None:
        positive(self, "variants")
        if self.statistics not in get_args(StatisticsOf):
            allowed = ", ".join(get_args(StatisticsOf))
            raise ValueError(f"statistics is {self.statistics!r}; allowed are {allowed}")

    @property
    def versions(self) -> int:
        """Number of encodings of each image."""
        return self.variants * (1 + self.mirrored)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Checked options of `prepare`."""

    resolution: tuple[int, int] | None
    channels: int | None
    space: SpaceName
    columns: tuple[ColumnBase, ...]
    """All columns, including automatic ones that no image may have."""
    background: tuple[int, int, int]
    holdout: float
    max_bad: float
    range: tuple[float, float] | None = None
    fit: Fit = "crop"
    max_enlarge: float = 4.0

    def identity(self) -> dict[str, Any]:
        """Options that the content of a pack depends on, as JSON decodes them."""
        return {
            "resolution": None if self.resolution is None else list(self.resolution),
            "channels": self.channels,
            "space": self.space,
            "columns": encode(self.columns),
            "background": list(self.background),
            "holdout": self.holdout,
            "policy": _POLICY,
            "range": None if self.range is None else list(self.range),
            "fit": self.fit,
        }


def check_options(
    resolution: int | tuple[int, int] | None,
    channels: int | None,
    space: SpaceName,
    columns: Iterable[ColumnBase],
    background: str | tuple[int, int, int],
    holdout: float,
    max_bad: float | None,
    range: tuple[float, float] | None = None,
    fit: Fit = "crop",
    max_enlarge: float = 4.0,
) -> Options:
    """Check the options of `prepare`; raises `ValueError` for a value that is not allowed."""
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    if size is not None:
        size = tuple(int(side) for side in size)
        if len(size) != 2 or not all(MIN_SIDE <= side <= MAX_SIDE for side in size):
            allowed = f"one side or (height, width), each from {MIN_SIDE} to {MAX_SIDE}"
            raise ValueError(f"resolution is {resolution}; allowed is {allowed}")
    if channels is not None and not 1 <= channels < MIN_SIDE:
        allowed = f"1 (gray), 3 (color), 4 (with alpha); others below {MIN_SIDE} for arrays"
        raise ValueError(f"channels is {channels}; allowed are {allowed}")
    if space not in get_args(SpaceName):
        raise ValueError(f"space is {space!r}; allowed are {', '.join(get_args(SpaceName))}")
    if not 0 <= holdout <= 0.5:
        raise ValueError(f"holdout is {holdout}; allowed is 0 to 0.5")
    limit = 0.1 if max_bad is None else max_bad
    if not 0 <= limit <= 1:
        raise ValueError(f"max_bad is {max_bad}; allowed is 0 to 1")
    if range is not None and (not all(map(math.isfinite, range)) or range[0] == range[1]):
        raise ValueError(f"range is {range}; allowed are two different numbers, black and white")
    if range is not None and space == "values":
        raise ValueError(f"range is {range}, for pixels; space values keeps all values: use one")
    if fit not in get_args(Fit):
        raise ValueError(f"fit is {fit!r}; allowed are {', '.join(get_args(Fit))}")
    check_enlarge(max_enlarge)
    return Options(
        resolution=size,
        channels=channels,
        space=space,
        columns=all_columns(columns),
        background=background_color(background),
        holdout=float(holdout),
        max_bad=limit,
        range=None if range is None else (float(range[0]), float(range[1])),
        fit=fit,
        max_enlarge=max_enlarge,
    )


def check_enlarge(value: float) -> None:
    """Raise `ValueError` unless images may be enlarged by at most this factor."""
    if not 1 <= value < math.inf:
        raise ValueError(f"max_enlarge is {value}; allowed is 1 or more, and finite")


def count_workers(workers: int | None, source: Source) -> int:
    """Number of decoding threads; by default 1 for sources that may not be thread-safe."""
    if workers is None:
        is_safe = isinstance(source, FileSource) or has_fetch(source)
        return min(os.cpu_count() or 1, _MAX_WORKERS) if is_safe else 1
    if workers < 1:
        raise ValueError(f"workers is {workers}; allowed is 1 or more")
    return workers
