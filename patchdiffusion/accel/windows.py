"""Places of the windows of a canvas, and their coordinates."""

import math
from typing import Literal

import torch
from torch import Tensor

from patchdiffusion.patches import Size, coordinates, pixel_indices

Coordinates = Literal["window", "pitch", "clamp", "periodic", "whole"]


def starts(side: int, window: int, stride: int) -> Tensor:
    """Evenly spaced starts of windows that cover an axis, at most `stride` apart: int64 [T]."""
    count = math.ceil((side - window) / stride) + 1
    return torch.arange(count) * (side - window) // max(count - 1, 1)


def shifted_starts(side: int, window: int, stride: int, offset: Tensor) -> Tensor:
    """Starts of windows `stride` apart from offsets in [0, stride): int64 [B] -> [B, T].

    The first ones may lie before the axis and the last ones reach over its end, or lie behind it.
    """
    if side == window:
        return torch.zeros_like(offset)[:, None]
    count = math.ceil((side - window) / stride) + 2
    first = offset[:, None] - stride
    return first + torch.arange(count, device=offset.device) * stride


def window_coordinates(
    kind: Coordinates, corner: Tensor, window: Size, canvas: Size, size: Size
) -> Tensor:
    """Coordinates of windows with these corners [B, n]: float32 [B, n, *window].

    `canvas` is the size of training, and `size` that of the image. window: as if each were a whole
    image; pitch: that of training, beyond [-1, 1]; clamp: the same, within; periodic: the canvas of
    training repeated; whole: [-1, 1] over the image.
    """
    if kind == "window":
        return coordinates(torch.zeros_like(corner), window, window)
    if kind == "whole":
        return coordinates(corner, window, size)
    if kind == "periodic":
        table = coordinates(torch.zeros_like(corner[:1]), canvas, canvas)[0]  # [n, *canvas]
        index = (i % side for i, side in zip(pixel_indices(corner, window), canvas, strict=True))
        return table[(slice(None), *index)].movedim(0, 1)
    pos = coordinates(corner, window, canvas)
    return pos.clamp(-1, 1) if kind == "clamp" else pos
