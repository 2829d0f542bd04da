"""Patch Diffusion's crops: where they lie, how they are cut, and how the network is told.

Wang et al., "Patch Diffusion: Faster and More Data-Efficient Training of Diffusion Models",
NeurIPS 2023 (arXiv 2304.12526). A network is trained on random crops of random size and told, by
two coordinate channels, where each crop lies; it then samples whole images as usual.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from patchdiffusion import rng

Size = tuple[int, int]  # height, width


def corners(key: Tensor, size: Size, canvas: Size, pitch: int = 1) -> tuple[Tensor, Tensor]:
    """Uniform top-left corners, ends included, one per key: two int64 [B]."""
    highest = [side - length * pitch + 1 for side, length in zip(canvas, size, strict=True)]
    if min(highest) < 1:
        raise ValueError(f"a crop of {size} at pitch {pitch} does not fit the canvas {canvas}")
    top = rng.integers(rng.subkeys(key, "top"), highest[0])
    left = rng.integers(rng.subkeys(key, "left"), highest[1])
    return top, left


def crop(x: Tensor, top: Tensor, left: Tensor, size: Size, pitch: int = 1) -> Tensor:
    """Cut one crop out of each image: [B, C, H, W] and corners [B] -> [B, C, *size]."""
    rows = top[:, None] + torch.arange(size[0] * pitch, device=x.device)
    cols = left[:, None] + torch.arange(size[1] * pitch, device=x.device)
    sample = torch.arange(len(x), device=x.device)
    cut = x[sample[:, None, None], :, rows[:, :, None], cols[:, None, :]]  # [B, h, w, C]
    cut = cut.movedim(-1, 1)
    return cut if pitch == 1 else F.avg_pool2d(cut, pitch)


def coordinates(top: Tensor, left: Tensor, size: Size, canvas: Size, pitch: int = 1) -> Tensor:
    """Where each pixel of a crop lies on the canvas: float32 [B, 2, *size], x first.

    The centres of the first and last pixel of each axis are exactly -1 and +1, each axis on its
    own scale; an axis of one pixel is 0. Positions outside the canvas continue the scale.
    """
    axes = []
    for start, length, side in ((left, size[1], canvas[1]), (top, size[0], canvas[0])):
        steps = torch.arange(length, device=start.device) * pitch
        place = (start[:, None] + steps).to(torch.float32) + (pitch - 1) / 2
        axes.append(2 * (place / (side - 1)) - 1 if side > 1 else torch.zeros_like(place))
    x = axes[0][:, None, :].expand(-1, size[0], -1)
    y = axes[1][:, :, None].expand(-1, -1, size[1])
    return torch.stack([x, y], dim=1)


def random_crop(x: Tensor, size: Size, *, key: Tensor) -> tuple[Tensor, Tensor]:
    """Crop each image at its own random place: crops [B, C, *size] and coordinates [B, 2, *size].

    `key` is int64 [B] from `rng.keys`: the crop of an image depends on its key alone.
    """
    canvas = (x.shape[-2], x.shape[-1])
    top, left = corners(key, size, canvas)
    return crop(x, top, left, size), coordinates(top, left, size, canvas)
