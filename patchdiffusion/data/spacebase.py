"""The contract of spaces, and the space of pixels.

A network is trained on values of about [-1, 1]. A space converts what a pack stores to these units,
samples of a network to values (those of the stored type, or decoded ones), and values to pictures.
Stored values have their channels last, [..., C]; a network has them second, [B, C, *S].
"""

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from patchdiffusion.patches import Size

PICTURES = "pictures"
"""Array of the images as such, in a pack that holds them in another form, too."""


class SpaceBase(Protocol):
    """Base of all spaces; the defaults are those of spaces in which images are stored as such."""

    random: ClassVar[bool] = False
    """True if `to_network` draws, by the key of each sample."""
    augments: ClassVar[bool] = True
    """True if stored images may be warped, see `data.augment`."""
    holds: ClassVar[tuple[str, ...]] = ()
    """Arrays of a pack beside the images."""

    @property
    def described(self) -> str:
        """Text about a space that is not obvious, else ""."""
        return ""

    @property
    def mirrors(self) -> bool:
        """True if stored images may be mirrored."""
        return True

    @property
    def varies(self) -> bool:
        """True if several variants of an image are stored, one of which is drawn."""
        return False

    def channels(self, stored: int) -> int:
        """Channels of the network, for stored images of so many channels.

        Raises `ValueError` for a number that the space does not store.
        """
        return stored

    def shape_of(self, size: Size, channels: int) -> tuple[int, ...]:
        """Shape [*S, C] of the values of a sample of a network with this size and channels."""
        return (*size, channels)

    @abstractmethod
    def to_network(
        self, x: Tensor, key: Tensor | None = None, flip: Tensor | None = None
    ) -> Tensor:
        """Convert stored values, float32 [B, C, *S], to the units of the network, maybe in place.

        In a space that is `random`, `key` int64 [B] draws; without it the result is the mean.
        `flip` bool [B] is True for samples whose grid of pixels is mirrored.
        """

    @abstractmethod
    def to_values(self, x: Tensor, device: torch.device | None = None) -> np.ndarray:
        """Convert output of a network [B, C, *S] to values [B, *S, C].

        Whatever has to be decoded is decoded on `device`; None is that of `x`.
        """

    @abstractmethod
    def to_picture(self, values: np.ndarray) -> np.ndarray:
        """Convert values [..., C] to uint8 for display, with the channels `shown`."""

    def network_of_values(self, x: Tensor) -> Tensor:
        """Output of a network, as the values that it stands for in units of `pictured`."""
        return x

    def check(self) -> None:
        """Raise `ValueError` if samples cannot be converted to values."""

    def found_in(self, folder: Path) -> None:
        """Note the folder of a pack or model that was read, with what `save_to` wrote there."""

    def save_to(self, folder: Path) -> None:
        """Write what the conversion to values needs into the folder of a pack or model."""


@dataclass(frozen=True, kw_only=True)
class Pixels(SpaceBase):
    """8-bit pixels: 0 and 255 are -1 and 1 to the network."""

    alpha: bool = False
    """True if the last of four channels is alpha; else they are bands."""

    word: ClassVar[Literal["pixels"]] = "pixels"
    dtype: ClassVar[str] = "uint8"
    limits: ClassVar[tuple[float, float] | None] = (0.0, 255.0)
    """Range to which interpolated values are clamped; None for no limits."""

    @property
    def pictured(self) -> "Pixels":
        """Space of the values of samples."""
        return self

    def to_network(
        self, x: Tensor, key: Tensor | None = None, flip: Tensor | None = None
    ) -> Tensor:
        """Convert stored values, float32 [B, C, *S], to the units of the network, in place."""
        return x.div_(127.5).sub_(1)

    def to_values(self, x: Tensor, device: torch.device | None = None) -> np.ndarray:
        """Convert output of a network [B, C, *S] to values of the stored type [B, *S, C]."""
        scaled = (x.to(torch.float32) * 127.5 + 127.5).round().clamp(0, 255)
        return scaled.to(torch.uint8).movedim(1, -1).cpu().numpy()

    def to_picture(self, values: np.ndarray) -> np.ndarray:
        """Convert stored values [..., C] to uint8 for display, with the channels `shown`."""
        return in_picture(values, alpha=self.alpha)


def shown(channels: int, *, alpha: bool) -> int:
    """Number of leading channels that a picture shows: 1, 3, or 4 with alpha."""
    return 4 if channels == 4 and alpha else 3 if channels >= 3 else 1


def in_picture(values: np.ndarray, *, alpha: bool) -> np.ndarray:
    """The channels of values [..., C] that a picture shows."""
    channels = values.shape[-1]
    count = shown(channels, alpha=alpha)
    return values if count == channels else values[..., :count]
