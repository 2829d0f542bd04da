"""Spaces: meaning of the stored values of a pack, and conversion to the units of a network.

`spacebase` has the contract. Statistics are gathered while a pack is written.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.data.findings import Levels
from patchdiffusion.data.latents import Latents
from patchdiffusion.data.spacebase import Pixels, SpaceBase, in_picture, shown

__all__ = ["STD", "Latents", "Pixels", "Space", "Statistics", "Tally", "Values", "shown", "tally"]

STD = 0.5
"""Standard deviation of `Values` in the units of a network, as EDM assumes for images."""

_SHOWN = (0.1, 99.9)  # percentiles of the values that are black and white in a picture
_LOOKED_AT = 256


@dataclass(frozen=True, kw_only=True)
class Values(SpaceBase):
    """Measurements in their own units: each channel has mean 0 and deviation .5 for the network.

    Nothing is clipped. `mean + scale x` converts a value x of the network back.
    """

    word: ClassVar[Literal["values"]] = "values"
    dtype: Literal["uint16", "float32"]
    """Type of the stored values, and of samples: whole numbers from 0 to 65,535, or floats."""
    mean: tuple[float, ...]
    """Mean of each channel."""
    scale: tuple[float, ...]
    """Twice the standard deviation of each channel."""
    black: tuple[float, ...]
    """The value of each channel that is black in a picture."""
    white: tuple[float, ...]
    """The value of each channel that is white in a picture."""

    limits: ClassVar[tuple[float, float] | None] = None
    alpha: ClassVar[bool] = False

    def __post_init__(self) -> None:
        tables = (self.mean, self.scale, self.black, self.white)
        if len({len(table) for table in tables}) != 1:
            lengths = [len(table) for table in tables]
            raise ValueError(
                f"mean, scale, black and white have {lengths} entries; allowed are equal numbers"
            )
        if not np.isfinite(tables).all() or min(self.scale) <= 0:
            raise ValueError(f"scale must be positive and finite, not {self.scale}")
        if not all(low < high for low, high in zip(self.black, self.white, strict=True)):
            raise ValueError(f"black {self.black} must lie below white {self.white}")

    @property
    def pictured(self) -> "Values":
        """Space of the values of samples."""
        return self

    def to_network(
        self, x: Tensor, key: Tensor | None = None, flip: Tensor | None = None
    ) -> Tensor:
        """Convert stored values, float32 [B, C, *S], to the units of the network, in place."""
        return x.sub_(_channels(self.mean, x)).div_(_channels(self.scale, x))

    def to_values(self, x: Tensor, device: torch.device | None = None) -> np.ndarray:
        """Convert output of a network [B, C, *S] to values of the stored type [B, *S, C]."""
        x = x.to(torch.float32)
        x = x * _channels(self.scale, x) + _channels(self.mean, x)
        values = x.movedim(1, -1).cpu().numpy()
        return values if self.dtype == "float32" else np.rint(values.clip(0, 65535)).astype("u2")

    def to_picture(self, values: np.ndarray) -> np.ndarray:
        """Convert stored values [..., C] to uint8 for display, linearly from black to white."""
        black, white = np.array(self.black), np.array(self.white)
        unit = (values.astype(np.float64) - black) / (white - black)
        return in_picture(np.rint(unit.clip(0, 1) * 255).astype(np.uint8), alpha=False)


Space = Pixels | Values | Latents
"""The spaces of packs and models."""
"""The spaces of packs and models."""


def _channels(table: tuple[float, ...], x: Tensor) -> Tensor:
    """One number per channel, broadcastable to [B, C, *S]."""
    return torch.tensor(table, dtype=x.dtype, device=x.device).reshape(-1, *(1,) * (x.ndim - 2))


# ---- Statistics while a pack is written ----


@dataclass(frozen=True)
class Statistics:
    """Statistics of all images of a pack, in the units of the network."""

    space: Space
    mean: tuple[float, ...]
    """Mean of each channel."""
    std: tuple[float, ...]
    """Standard deviation of each channel."""
    sigma_data: float
    levels: Levels | None = field(default=None, kw_only=True)
    """Standard deviation of all values."""


class Tally(Protocol):
    """Accumulates statistics while images are written one after another."""

    def add(self, image: np.ndarray) -> None:
        """Count an image [*S, C]."""
        ...

    def finish(self, images: np.ndarray) -> Statistics:
        """Statistics of the counted images, which are also given as `images` [N, *S, C]."""
        ...


def tally(dtype: str, channels: int, *, alpha: bool = False) -> Tally:
    """Tally for images of a type."""
    return PixelTally(channels, alpha=alpha) if dtype == Pixels.dtype else ValueTally(channels)


class PixelTally:
    """Exact statistics, from the counts of the 256 values of each channel."""

    def __init__(self, channels: int, *, alpha: bool = False):
        self._alpha = alpha
        self._histogram = np.zeros((channels, 256), dtype=np.int64)

    def add(self, image: np.ndarray) -> None:
        """Count an image, uint8 [*S, C]."""
        for channel, counts in enumerate(self._histogram):
            counts += np.bincount(image[..., channel].reshape(-1), minlength=256)

    def finish(self, images: np.ndarray) -> Statistics:
        """Mean and standard deviation of each channel, where 0 and 255 are -1 and 1."""
        mean, std = _moments(self._histogram)
        overall = _moments(self._histogram.sum(0, keepdims=True))[1][0]
        used = np.flatnonzero(self._histogram.sum(0))
        return Statistics(
            Pixels(alpha=self._alpha),
            tuple(mean.tolist()),
            tuple(std.tolist()),
            float(overall),
            levels=Levels(int(used[0]), int(used[-1]), len(used)),
        )


def _moments(histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each row of counts [C, 256]."""
    values = np.arange(256) / 127.5 - 1
    weight = histogram / histogram.sum(1, keepdims=True)
    mean = weight @ values
    return mean, np.sqrt((weight * (values - mean[:, None]) ** 2).sum(1))


class ValueTally:
    """Mean and standard deviation of each channel, updated image by image in float64."""

    def __init__(self, channels: int):
        self._count = 0
        self._mean = np.zeros(channels)
        self._squares = np.zeros(channels)  # sum of squared distances from the mean

    def add(self, image: np.ndarray) -> None:
        """Count an image [*S, C]."""
        flat = image.reshape(-1, image.shape[-1]).astype(np.float64)
        mean = flat.mean(0)
        count, before = len(flat), self._count
        self._count += count
        step = mean - self._mean
        self._mean += step * count / self._count
        self._squares += ((flat - mean) ** 2).sum(0) + step**2 * before * count / self._count

    def finish(self, images: np.ndarray) -> Statistics:
        """Statistics in the space where each channel has mean 0 and deviation `STD`."""
        std = np.sqrt(self._squares / self._count)
        changes = std > 1e-6 * np.abs(self._mean)
        scale = np.where(changes, std / STD, 1.0)
        sample = images[np.linspace(0, len(images) - 1, min(len(images), _LOOKED_AT)).astype(int)]
        black, white = np.percentile(sample.reshape(-1, sample.shape[-1]), _SHOWN, axis=0)
        space = Values(
            dtype="uint16" if images.dtype == np.uint16 else "float32",
            mean=tuple(self._mean.tolist()),
            scale=tuple(scale.tolist()),
            black=tuple(black.tolist()),
            white=tuple(np.where(white > black, white, black + scale).tolist()),
        )
        deviation = std / scale
        overall = float(np.sqrt((deviation**2).mean()))
        return Statistics(space, (0.0,) * len(std), tuple(deviation.tolist()), overall)
