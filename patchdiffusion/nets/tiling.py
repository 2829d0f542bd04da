"""Tilings: where the regions of an image lie, cutting an image into them, and putting it together.

Shapes: B batch, C channels, *S sides of an image, P regions, *R their sides.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchdiffusion.nets.tokens import fold, unfold
from patchdiffusion.patches import Size


@dataclass(frozen=True)
class Tiling:
    """Regions of equal size that cover an image.

    In an image that is no multiple of the region, the last one along an axis is moved inwards, so
    that all have their full size; of it, only the part is used that no other region covers.
    """

    size: Size
    """Sides of the image, not smaller than those of a region."""
    region: Size

    @property
    def grid(self) -> Size:
        """Number of regions along each axis."""
        return tuple(-(-side // r) for side, r in zip(self.size, self.region, strict=True))

    def cut(self, x: Tensor) -> Tensor:
        """[B, C, *S] -> [B, P, C, *R]."""
        for axis, (side, r) in enumerate(zip(self.size, self.region, strict=True), start=2):
            if rest := side % r:
                x = torch.cat([x.narrow(axis, 0, side - rest), x.narrow(axis, side - r, r)], axis)
        return unfold(x, self.region).unflatten(-1, (x.shape[1], *self.region))

    def merge(self, regions: Tensor) -> Tensor:
        """[B, P, C, *R] -> [B, C, *S]."""
        x = fold(regions.flatten(2), self.grid, self.region)
        for axis, (side, r) in enumerate(zip(self.size, self.region, strict=True), start=2):
            if rest := side % r:
                end = x.shape[axis] - rest
                x = torch.cat([x.narrow(axis, 0, side - rest), x.narrow(axis, end, rest)], axis)
        return x
