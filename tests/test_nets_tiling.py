"""Tilings: every pixel has one owner, and regions of full size lie where they are asked for."""

import itertools
import math

import pytest
import torch

from patchdiffusion.nets.tiling import tiling


@pytest.mark.parametrize("side", range(2, 20, 2))
def test_every_pixel_comes_from_one_region_which_holds_it(side: int) -> None:
    image = torch.arange(side * 4.0).reshape(1, 1, side, 4)
    for region, offset in itertools.product(range(2, side + 1, 2), range(-6, 2 * side, 2)):
        where = tiling((side, 4), (region, 2), (offset, 2), 2)
        regions = where.cut(image)
        assert regions.shape == (1, math.prod(where.grid), 1, region, 2)
        assert torch.equal(where.merge(regions), image)
        rows = regions[0, :: where.grid[1], 0, :, 0] // 4
        assert (rows.diff(dim=1) == 1).all()  # a part of the image, at full size
        first = offset % region
        if side > region and first + region <= side:
            assert first in rows[:, 0]
            numbers = torch.arange(len(rows) * 1.0).repeat_interleave(where.grid[1])
            owner = where.merge(numbers[None, :, None, None, None].expand_as(regions))
            assert len(owner[0, 0, first : first + region, 0].unique()) == 1
