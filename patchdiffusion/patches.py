"""Random crops of Patch Diffusion, and the coordinate channels of their position.

Wang et al., "Patch Diffusion: Faster and More Data-Efficient Training of Diffusion Models",
NeurIPS 2023 (arXiv 2304.12526). A network is trained on random crops of random size, conditioned
on their position by one coordinate channel for each axis; it then samples whole images as usual.

Shapes: B batch, C channels, n axes: 1 of sequences, 2 of images (height, width), 3 of video
(frames, height, width); *size are n lengths.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchdiffusion import rng

Size = tuple[int, ...]
"""Length of each axis: (height, width) of images."""

_STREAMS = ("left", "top", "front")  # of the random corners, from the last axis to the first


def size_name(size: Size) -> str:
    """The text of a size, such as 24x32."""
    return "x".join(map(str, size))


def corners(key: Tensor, size: Size, canvas: Size, pitch: int = 1) -> Tensor:
    """Uniform first corners of crops, both ends included, one per key: int64 [B, n].

    Raises `ValueError` if the crop does not fit.
    """
    counts = [side - length * pitch + 1 for side, length in zip(canvas, size, strict=True)]
    if min(counts) < 1:
        raise ValueError(f"a crop of {size} at pitch {pitch} does not fit the canvas {canvas}")
    drawn = [
        rng.integers(rng.subkeys(key, _stream(len(canvas) - 1 - axis)), count)
        for axis, count in enumerate(counts)
    ]
    return torch.stack(drawn, dim=1)


def _stream(from_last: int) -> str:
    return _STREAMS[from_last] if from_last < len(_STREAMS) else f"axis {from_last}"


def pixel_indices(corner: Tensor, size: Size, pitch: int = 1) -> tuple[Tensor, ...]:
    """Indices along each axis of the pixels of crops with corners [B, n].

    The indices of axis i are int64 [B, 1, ..., size[i] * pitch, ..., 1], to be broadcast.
    """
    return tuple(
        _along(corner[:, axis, None] + torch.arange(length * pitch, device=corner.device), axis, n)
        for n in (len(size),)
        for axis, length in enumerate(size)
    )


def _along(values: Tensor, axis: int, n: int) -> Tensor:
    """[B, length] -> [B, 1, ..., length, ..., 1] with `length` at one of n axes."""
    return values.view(len(values), *(-1 if i == axis else 1 for i in range(n)))


def crop(x: Tensor, corner: Tensor, size: Size, pitch: int = 1) -> Tensor:
    """Cut one crop out of each image: [B, C, *canvas] and corners [B, n] -> [B, C, *size]."""
    sample = torch.arange(len(x), device=x.device).view(-1, *(1 for _ in size))
    cut = x[(sample, slice(None), *pixel_indices(corner, size, pitch))]  # [B, *size, C]
    return average_pool(cut.movedim(-1, 1), pitch)


def average_pool(x: Tensor, pitch: int) -> Tensor:
    """Means of blocks of `pitch` pixels along each axis: [B, C, *S] -> [B, C, *(S / pitch)]."""
    if pitch == 1:
        return x
    if x.dim() == 4:
        return F.avg_pool2d(x, pitch)
    for axis in range(2, x.dim()):
        x = x.unflatten(axis, (-1, pitch)).mean(axis + 1)
    return x


def coordinates(corner: Tensor, size: Size, canvas: Size, pitch: int = 1) -> Tensor:
    """Coordinates of the pixels of crops on the canvas: corners [B, n] -> float32 [B, n, *size].

    The last axis comes first: x, then y. The centers of the first and last pixel of each axis are
    exactly -1 and +1, each axis on its own scale; an axis of one pixel is 0. Positions outside the
    canvas continue the scale.
    """
    channels = []
    for axis in reversed(range(len(canvas))):
        side, steps = canvas[axis], torch.arange(size[axis], device=corner.device) * pitch
        pixel = (corner[:, axis, None] + steps).to(torch.float32) + (pitch - 1) / 2
        scaled = 2 * (pixel / (side - 1)) - 1 if side > 1 else torch.zeros_like(pixel)
        channels.append(_along(scaled, axis, len(canvas)).expand(-1, *size))
    return torch.stack(channels, dim=1)


def random_crop(x: Tensor, size: Size, *, key: Tensor) -> tuple[Tensor, Tensor]:
    """Crop each image at a random position: crops [B, C, *size], coordinates [B, n, *size].

    `key` is int64 [B] from `rng.keys`: the crop of an image depends on its key alone.
    """
    canvas = tuple(x.shape[2:])
    corner = corners(key, size, canvas)
    return crop(x, corner, size), coordinates(corner, size, canvas)


@dataclass(frozen=True)
class Region:
    """Position of the images of a batch on the canvas of the network.

    Raises `ValueError` if the corner has not as many axes as the canvas.
    """

    canvas: Size
    """Size the network was trained on."""
    corner: tuple[int, ...]
    """First pixel along each axis; below 0 and beyond the canvas it extrapolates."""

    def __post_init__(self) -> None:
        if len(self.corner) != len(self.canvas):
            raise ValueError(
                f"corner must have {len(self.canvas)} numbers, one for each axis of the canvas "
                f"{self.canvas}, not {self.corner}"
            )

    @classmethod
    def whole(cls, canvas: Size) -> "Region":
        """The region that starts at the first pixel of the canvas."""
        return cls(canvas, (0,) * len(canvas))

    def pos(self, x: Tensor) -> Tensor:
        """Coordinates of images x [B, C, *S] in this region: float32 [B, n, *S]."""
        corner = [torch.full((len(x),), start, device=x.device) for start in self.corner]
        return coordinates(torch.stack(corner, dim=1), tuple(x.shape[2:]), self.canvas)
