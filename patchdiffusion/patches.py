"""Random crops of Patch Diffusion, and the coordinate channels of their position.

Wang et al., "Patch Diffusion: Faster and More Data-Efficient Training of Diffusion Models",
NeurIPS 2023 (arXiv 2304.12526). A network is trained on random crops of random size, conditioned
on their position by one coordinate channel for each axis; it then samples whole images as usual.

Shapes: B batch, C channels, n axes: 1 of sequences, 2 of images (height, width), 3 of video
(frames, height, width); *size are n lengths.
"""

from dataclasses import dataclass
from typing import Protocol

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
    side = values.shape[1]  # not -1, which no rows leave open
    return values.view(len(values), *(side if i == axis else 1 for i in range(n)))


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


class Cut(Protocol):
    """An object with the size and pitch of crops, such as a `Group` of a plan."""

    @property
    def size(self) -> Size:
        """Height and width of a crop."""
        ...

    @property
    def pitch(self) -> int:
        """Pixels of the image, along each axis, that are averaged to one of the crop."""
        ...


def random_crop(
    x: Tensor,
    size: Size | int | Cut,
    *,
    key: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Crop each image at a random position: crops [B, C, *size], coordinates [B, n, *size].

    `size` is a length for each axis, the side of a square, or a group of a plan. The places come
    from a generator, or from keys of `rng.keys`, int64 [B]: the crop of an image then depends on
    its key alone. Raises `ValueError` for what does not fit.
    """
    pitch = 1
    if not isinstance(size, tuple | list | int):
        size, pitch = size.size, size.pitch
    size = (size, size) if isinstance(size, int) else tuple(size)
    if x.ndim != 2 + len(size):
        axes = ", ".join(f"axis {i}" for i in range(len(size))) if len(size) != 2 else "H, W"
        raise ValueError(
            f"images to be cropped to {size_name(size)} must be [B, C, {axes}], "
            f"not {list(x.shape)}; one image is images[None]"
        )
    canvas = tuple(x.shape[2:])
    corner = corners(_place_keys(x, key, generator), size, canvas, pitch)
    return crop(x, corner, size, pitch), coordinates(corner, size, canvas, pitch)


def _place_keys(x: Tensor, key: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """One key for each image."""
    if (key is None) == (generator is None):
        raise ValueError(
            "random_crop needs generator=torch.Generator(), or key=rng.keys(...), and not both"
        )
    if generator is not None:
        drawn = torch.randint(2**62, (len(x),), generator=generator, device=generator.device)
        return drawn.to(x.device)
    assert key is not None
    if key.shape != (len(x),) or key.dtype != torch.int64:
        raise ValueError(
            f"{len(x)} images need {len(x)} keys, int64 [{len(x)}], "
            f"not {key.dtype} {list(key.shape)}".replace("torch.", "")
        )
    return key


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
