"""Linear measurements y = A x of images: what is known of an image that is to be restored.

An operator is a frozen record; its transpose follows from automatic differentiation. Images
[B, C, *S] are in the units of the network, and so is what is measured as a picture.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from patchdiffusion.patches import Size, average_pool, size_name


class Operator(ABC):
    """Base of linear operators on images."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """The measurement of images [B, C, *S]."""

    def ready(self, size: Size) -> "Operator":
        """The operator on images of this size, with what it reads from files."""
        return self

    def image_size(self, measured: Size) -> Size:
        """Size of the images whose measurement has this size; `ValueError` if there are none."""
        return measured

    def from_picture(self, picture: Tensor) -> Tensor:
        """A measurement from a picture of it in [-1, 1], [B, C, *S]."""
        return picture

    def to_picture(self, y: Tensor) -> Tensor:
        """Inverse of `from_picture`."""
        return y

    def guess(self, y: Tensor) -> Tensor:
        """A simple restoration without a model, to compare with: [B, C, *S]."""
        size = self.image_size(tuple(y.shape[2:]))
        return transposed(self, y, torch.zeros(*y.shape[:2], *size, dtype=y.dtype))


def transposed(operator: Callable[[Tensor], Tensor], y: Tensor, like: Tensor) -> Tensor:
    """A^T y for a linear operator, in the shape of the images `like`; also under `no_grad`."""
    with torch.enable_grad():
        x = torch.zeros_like(like).requires_grad_()
        return torch.autograd.grad(operator(x), x, y)[0]


@dataclass(frozen=True, kw_only=True)
class Downsample(Operator):
    """Means of squares of pixels: super-resolution."""

    word: ClassVar[str] = "downsample"

    factor: int = 4
    """Side of the squares."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, not {self.factor}")

    def __call__(self, x: Tensor) -> Tensor:
        if any(side % self.factor for side in x.shape[2:]):
            raise ValueError(
                f"the factor {self.factor} does not divide images of {size_name(x.shape[2:])}"
            )
        return average_pool(x, self.factor)

    def image_size(self, measured: Size) -> Size:
        return tuple(side * self.factor for side in measured)

    def guess(self, y: Tensor) -> Tensor:
        """Bicubic interpolation."""
        return F.interpolate(y, scale_factor=self.factor, mode="bicubic", align_corners=False)


@dataclass(frozen=True, kw_only=True)
class Blur(Operator):
    """Gaussian blur with reflecting borders."""

    word: ClassVar[str] = "blur"

    std: float = 1.5
    """Standard deviation of the kernel in pixels."""

    def __post_init__(self) -> None:
        if not 0 < self.std <= 32:
            raise ValueError(f"std must lie in (0, 32], not {self.std}")

    def __call__(self, x: Tensor) -> Tensor:
        radius = min(math.ceil(3 * self.std), min(x.shape[2:]) - 1)
        at = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
        kernel = torch.exp(-0.5 * (at / self.std) ** 2)
        kernel = kernel / kernel.sum()
        planes = x.flatten(0, 1)[:, None]
        planes = F.pad(planes, (radius,) * 4, mode="reflect")
        planes = F.conv2d(F.conv2d(planes, kernel[None, None, :, None]), kernel[None, None, None])
        return planes.view_as(x)

    def guess(self, y: Tensor) -> Tensor:
        """The blurred image itself."""
        return y


@dataclass(frozen=True, kw_only=True)
class Tomography(Operator):
    """Parallel beams: sums of pixels along straight lines, divided by the side of the image.

    A picture of the measurement, the sinogram, has a row for each angle and a column for each line;
    black is 0 and white is 1 for pixels that are black at 0 and white at 1.
    """

    word: ClassVar[str] = "tomography"

    angles: int = 20
    """Number of angles, evenly spread over half a turn."""

    def __post_init__(self) -> None:
        if self.angles < 1:
            raise ValueError(f"angles must be at least 1, not {self.angles}")

    def __call__(self, x: Tensor) -> Tensor:
        side = x.shape[-1]
        if x.ndim != 4 or x.shape[2] != side:
            raise ValueError(f"tomography is of square images, not {size_name(x.shape[2:])}")
        rows = []
        for number in range(self.angles):
            grid = _turned(math.pi * number / self.angles, side).to(x).expand(len(x), -1, -1, -1)
            lines = F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)
            rows.append(lines.mean(2))
        return torch.stack(rows, 2)

    def image_size(self, measured: Size) -> Size:
        if len(measured) != 2 or measured[0] != self.angles:
            raise ValueError(
                f"a sinogram of {self.angles} angles has as many rows, not {size_name(measured)}"
            )
        return measured[1], measured[1]

    def from_picture(self, picture: Tensor) -> Tensor:
        return picture + 1 - self._reach(picture)

    def to_picture(self, y: Tensor) -> Tensor:
        return y - 1 + self._reach(y)

    def _reach(self, y: Tensor) -> Tensor:
        """Part of each line inside of the image."""
        side = y.shape[-1]
        return self(torch.ones(1, 1, side, side, dtype=y.dtype, device=y.device))

    def guess(self, y: Tensor) -> Tensor:
        """Filtered back-projection, with the ramp of the discrete Fourier transform."""
        side = y.shape[-1]
        length = 2 * side
        ramp = torch.fft.rfftfreq(length, dtype=y.dtype).abs()
        rows = torch.fft.irfft(torch.fft.rfft(y * side, length) * ramp, length)[..., :side]
        like = torch.zeros(*y.shape[:2], side, side, dtype=y.dtype)
        return transposed(self, rows, like) * side * math.pi / self.angles


@lru_cache(maxsize=512)
def _turned(angle: float, side: int) -> Tensor:
    """Sampling points of an image turned by an angle: float32 [1, side, side, 2], x first."""
    cos, sin = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]])
    return F.affine_grid(turn, [1, 1, side, side], align_corners=False)


@dataclass(frozen=True, eq=False)
class Mask(Operator):
    """Pixels that are known; others are measured as 0."""

    known: Tensor
    """bool [*S]"""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.where(self.known.to(x.device), x, 0.0)

    def guess(self, y: Tensor) -> Tensor:
        """Known pixels, and their mean elsewhere."""
        known = self.known.to(y.device)
        mean = y.flatten(2).sum(2) / known.sum().clamp(min=1)
        return torch.where(known, y, mean[(...,) + (None,) * (y.ndim - 2)])
