"""Tilings: where the regions of an image lie, cutting an image into them, and putting it together.

Shapes: B batch, C channels, *S sides of an image, P regions, *R their sides.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from patchdiffusion.nets.tokens import fold, unfold
from patchdiffusion.patches import Size


@dataclass(frozen=True)
class Tiling:
    """Regions of equal size that cover an image.

    Each axis has edges between the parts that the regions are used for. Where a part is smaller
    than a region, at the borders, the region is moved inwards, so that all have their full size.
    """

    size: Size
    """Sides of the image."""
    region: Size
    edges: tuple[tuple[int, ...] | None, ...]
    """Along each axis, from 0 to the length; None for equal parts of the size of a region."""

    @property
    def grid(self) -> Size:
        """Number of regions along each axis."""
        sides = zip(self.size, self.region, self.edges, strict=True)
        return tuple(a // r if edges is None else len(edges) - 1 for a, r, edges in sides)

    def cut(self, x: Tensor) -> Tensor:
        """[B, C, *S] -> [B, P, C, *R]."""
        for axis, side in enumerate(self.region):
            if (parts := self._parts(axis)) is not None:
                regions = [x.narrow(2 + axis, start, side) for start, _, _ in parts]
                x = torch.cat(regions, dim=2 + axis)
        return unfold(x, self.region).unflatten(-1, (x.shape[1], *self.region))

    def merge(self, regions: Tensor) -> Tensor:
        """[B, P, C, *R] -> [B, C, *S]."""
        x = fold(regions.flatten(2), self.grid, self.region)
        for axis, side in enumerate(self.region):
            if (parts := self._parts(axis)) is not None:
                used = [
                    x.narrow(2 + axis, i * side + first - start, last - first)
                    for i, (start, first, last) in enumerate(parts)
                ]
                x = torch.cat(used, dim=2 + axis)
        return x

    def _parts(self, axis: int) -> list[tuple[int, int, int]] | None:
        """First pixel of each region along an axis, and the ends of the part it is used for."""
        edges, most = self.edges[axis], self.size[axis] - self.region[axis]
        if edges is None:
            return None
        return [(min(a, most), a, b) for a, b in itertools.pairwise(edges)]


def tiling(size: Size, region: Size, offset: Size, patch: int) -> Tiling:
    """The tiling of an image by regions, of which the first whole one starts at an offset.

    A side with one region takes no offset. Raises `ValueError` unless offsets are multiples of the
    patch.
    """
    if len(offset) != len(size) or any(start % patch for start in offset):
        raise ValueError(
            f"offsets must be {len(size)} multiples of the patch, {patch}, not {list(offset)}"
        )
    sides = zip(size, region, offset, strict=True)
    return Tiling(size, region, tuple(_edges(*side) for side in sides))


def _edges(side: int, region: int, offset: int) -> tuple[int, ...] | None:
    offset %= region
    if side == region or (side % region == 0 and not offset):
        return None
    return tuple(sorted({0, *range(offset, side, region), side}))
