"""Tilings: every pixel has one owner, and all regions are parts of the image, at full size."""

import itertools
import math

import pytest
import torch

from patchdiffusion.nets.tiling import Tiling


@pytest.mark.parametrize("side", range(2, 20))
def test_every_pixel_comes_from_one_region_which_holds_it(side: int) -> None:
    image = torch.arange(side * 4.0).reshape(1, 1, side, 4)
    for region, other in itertools.product(range(1, side + 1), (2, 3)):
        where = Tiling((side, 4), (region, other))
        regions = where.cut(image)
        assert regions.shape == (1, math.prod(where.grid), 1, region, other)
        assert torch.equal(where.merge(regions), image)
        rows = regions[0, :: where.grid[1], 0, :, 0] // 4
        assert (rows.diff(dim=1) == 1).all()
        numbers = torch.arange(len(rows) * 1.0).repeat_interleave(where.grid[1])
        owner = where.merge(numbers[None, :, None, None, None].expand_as(regions))[0, 0, :, 0]
        assert torch.equal(owner, (torch.arange(side) // region).float())
