"""Maps that control a network: what a picture shows of edges, colors or shapes, and no more.

They are computed once for all images of a data set, and in sampling of the picture of a user.
Shapes: B batch, H and W sides.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from patchdiffusion.nets.layers import pad_to_multiple
from patchdiffusion.nets.picture import resized

COLORS = 3
"""Channels of a map in a condition; one of a single channel is repeated."""


@dataclass(frozen=True, kw_only=True)
class ControlMap(ABC):
    """Base of maps: frozen records that are functions of pictures."""

    colors: ClassVar[int] = 1
    """Channels of the map, 1 or 3."""
    instruction: ClassVar[str] = ""
    """Text that tells a branch of several maps which one it is; empty is WORD to image."""
    column: ClassVar[str] = ""
    """Column of the data that has the map, which then is not computed of the pictures."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Map in [0, 1] of pictures in [0, 1]: float32 [B, 1 or 3, H, W] -> [B, colors, H, W]."""


def _positive(name: str, value: float, most: float) -> None:
    if not 0 < value <= most:
        raise ValueError(f"{name} must lie in (0, {most:g}], not {value:g}")


def gray(x: Tensor) -> Tensor:
    """Mean of the channels: [B, 1, H, W]."""
    return x.mean(1, keepdim=True)


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Convolution with a Gaussian of deviation sigma, in pixels; borders are repeated."""
    reach = max(1, round(3 * sigma))
    at = torch.arange(-reach, reach + 1, dtype=torch.float32, device=x.device)
    taps = (-0.5 * (at / sigma) ** 2).exp()
    taps = (taps / taps.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), "replicate"), taps, groups=x.shape[1])
    return F.conv2d(F.pad(x, (0, 0, reach, reach), "replicate"), taps.mT, groups=x.shape[1])


@dataclass(frozen=True, kw_only=True)
class Edges(ControlMap):
    """Edges: the length of the gradient of the blurred picture."""

    instruction: ClassVar[str] = "edge map to image"

    sigma: float = 0.5
    """Deviation of the blur, in pixels: larger ones leave out fine texture."""
    gain: float = 1.0
    """Factor of the lengths; at 1 a step from black to white is 1."""

    def __post_init__(self) -> None:
        _positive("sigma", self.sigma, 64)
        _positive("gain", self.gain, 1000)

    def __call__(self, x: Tensor) -> Tensor:
        x = F.pad(blurred(gray(x), self.sigma), (1, 1, 1, 1), "replicate")
        smooth = torch.tensor([0.25, 0.5, 0.25], device=x.device)
        step = torch.tensor([-1.0, 0.0, 1.0], device=x.device)
        across = smooth[:, None] * step  # Sobel
        kernel = torch.stack([across, across.T])[:, None]
        return (self.gain * F.conv2d(x, kernel).norm(dim=1, keepdim=True)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Sketch(ControlMap):
    """Lines: what is darker than its surroundings, as a pencil would draw it."""

    instruction: ClassVar[str] = "sketch to image"

    sigma: float = 0.8
    """Width of the lines, in pixels."""
    gain: float = 4.0
    """Factor of the difference in brightness."""

    def __post_init__(self) -> None:
        _positive("sigma", self.sigma, 64)
        _positive("gain", self.gain, 1000)

    def __call__(self, x: Tensor) -> Tensor:
        x = gray(x)
        darker = blurred(x, 2 * self.sigma) - blurred(x, self.sigma)
        return (self.gain * darker).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Blur(ControlMap):
    """The picture without its details."""

    colors: ClassVar[int] = COLORS
    instruction: ClassVar[str] = "blurred image to image"

    sigma: float = 3.0
    """Deviation of the blur, in pixels."""

    def __post_init__(self) -> None:
        _positive("sigma", self.sigma, 256)

    def __call__(self, x: Tensor) -> Tensor:
        return blurred(x, self.sigma).expand(-1, COLORS, -1, -1).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Color(ControlMap):
    """Colors: the mean of each cell of a grid."""

    colors: ClassVar[int] = COLORS
    instruction: ClassVar[str] = "color palette to image"

    cell: int = 8
    """Side of a cell, in pixels."""

    def __post_init__(self) -> None:
        _positive("cell", self.cell, 4096)

    def __call__(self, x: Tensor) -> Tensor:
        sides = tuple(x.shape[2:])
        padded = pad_to_multiple(x, (self.cell, self.cell))
        size = tuple(padded.shape[2:])
        means = resized(padded, tuple(side // self.cell for side in size))
        means = resized(means, size)[:, :, : sides[0], : sides[1]]
        return means.expand(-1, COLORS, -1, -1)


@dataclass(frozen=True, kw_only=True)
class Mask(ControlMap):
    """Shape: 1 on one side of a threshold of brightness (Otsu's), and 0 along most of the border.

    The threshold is the one with the largest variance between the two sides, of 255.
    """

    instruction: ClassVar[str] = "mask to image"

    def __call__(self, x: Tensor) -> Tensor:
        x = gray(x)
        inside = x > otsu(x.flatten(1))[:, None, None, None]
        sides = (inside[:, 0, 0], inside[:, 0, -1], inside[:, 0, :, 0], inside[:, 0, :, -1])
        border = torch.cat(sides, dim=1)
        outside = border.float().mean(1) > 0.5
        return (inside ^ outside[:, None, None, None]).float()


def otsu(values: Tensor) -> Tensor:
    """Threshold of values in [0, 1] with the largest variance between both sides: [B, n] -> [B]."""
    bins = (values * 255).round().clamp(0, 255).long()
    counts = torch.zeros(len(values), 256, dtype=torch.float64, device=values.device)
    counts = counts.scatter_add(1, bins, torch.ones_like(bins, dtype=torch.float64))
    share = counts.cumsum(1) / values.shape[1]
    moment = (counts * torch.arange(256, device=values.device)).cumsum(1) / values.shape[1]
    total = moment[:, -1:]
    between = (total * share - moment) ** 2 / (share * (1 - share)).clamp(min=1e-12)
    return (between[:, :-1].argmax(1) + 0.5).float() / 255


@dataclass(frozen=True, kw_only=True)
class Depth(ControlMap):
    """Depth, of a file beside each image: cat.depth.png beside cat.png."""

    instruction: ClassVar[str] = "depth map to image"
    column: ClassVar[str] = "depth"

    def __call__(self, x: Tensor) -> Tensor:
        return gray(x).clamp(0, 1)


ControlMaps = Edges | Blur | Color | Sketch | Mask | Depth
"""The maps of `--adapter.condition`; a new one is a record here or in a file of its own."""


def in_color(x: Tensor) -> Tensor:
    """Maps of three channels, of one that is repeated: [B, 1 or 3, *S] -> [B, 3, *S]."""
    return x.expand(-1, COLORS, *x.shape[2:]) if x.shape[1] == 1 else x
