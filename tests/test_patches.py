"""Crops and coordinates on canvases of one, two and three axes."""

import math

import pytest
import torch
import torch.nn.functional as F
from commands import refuses
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.patches import Region, Size, coordinates, corners, crop, random_crop


def keys(count: int, step: int = 0) -> Tensor:
    return rng.keys(0, "crop", step, torch.arange(count))


def images(count: int, canvas: Size, channels: int = 2) -> Tensor:
    """Images in which every pixel is different."""
    size = (count, channels, *canvas)
    return torch.arange(math.prod(size), dtype=torch.float32).reshape(size)


CROPS: list[tuple[Size, Size]] = [
    ((11,), (50,)), ((1,), (1,)), ((7, 13), (21, 50)), ((7, 13), (64, 64)), ((5, 16), (37, 16)),
    ((1, 4), (1, 9)), ((3, 5, 7), (8, 11, 9)), ((2, 2, 2, 2), (3, 5, 4, 2))
]  # fmt: skip


@pytest.mark.parametrize("canvas", [(1,), (50,), (64, 64), (32, 2048), (65, 31), (5, 1, 9)])
def test_the_ends_of_every_axis_are_exactly_one(canvas: Size) -> None:
    pos = coordinates(torch.zeros(1, len(canvas)).long(), canvas, canvas)
    assert pos.shape == (1, len(canvas), *canvas) and pos.dtype == torch.float32
    for channel, axis in enumerate(reversed(range(len(canvas)))):  # the last axis comes first
        line = pos[0, channel].movedim(axis, 0).reshape(canvas[axis], -1)
        assert torch.equal(line, line[:, :1].expand_as(line))  # it changes along no other axis
        ends = (-1.0, 1.0) if canvas[axis] > 1 else (0.0, 0.0)
        assert (line[0, 0], line[-1, 0]) == ends and bool((line.diff(dim=0) > 0).all())


@pytest.mark.parametrize(("size", "canvas"), CROPS)
def test_crops_are_slices_that_know_where_they_are(size: Size, canvas: Size) -> None:
    x, key = images(9, canvas), keys(9)
    corner = corners(key, size, canvas)
    assert corner.shape == (9, len(size)) and corner.dtype == torch.int64
    cut, pos = random_crop(x, size, key=key)
    grid = Region.whole(canvas).pos(x)
    for i, start in enumerate(corner.tolist()):
        part = [slice(a, a + length) for a, length in zip(start, size, strict=True)]
        assert torch.equal(cut[i], x[(i, slice(None), *part)])
        assert torch.equal(pos[i], grid[(i, slice(None), *part)])
        assert torch.equal(pos[i], Region(canvas, tuple(start)).pos(cut[i : i + 1])[0])
    assert torch.equal(random_crop(x[4:7], size, key=key[4:7])[0], cut[4:7])
    whole, pos = random_crop(x, canvas, key=key)
    assert torch.equal(whole, x) and torch.equal(pos, grid)


def test_streams_of_corners_have_the_names_of_their_axes() -> None:
    """A crop of an image lies where those of the first release do, and so does that of a frame."""
    drawn = corners(keys(5), (4, 3, 5), (9, 8, 10))
    for axis, (name, count) in enumerate((("front", 6), ("top", 6), ("left", 6))):
        assert torch.equal(drawn[:, axis], rng.integers(rng.subkeys(keys(5), name), count))
    assert torch.equal(corners(keys(5), (3, 5), (8, 10)), drawn[:, 1:])
    assert torch.equal(corners(keys(5), (5,), (10,)), drawn[:, 2:])


def test_coordinates_outside_continue_the_scale() -> None:
    pos = Region((5, 5), (-2, 3)).pos(torch.zeros(1, 1, 4, 6))
    assert pos[0, 0, 0].tolist() == [0.5, 1, 1.5, 2, 2.5, 3]
    assert pos[0, 1, :, 0].tolist() == [-2, -1.5, -1, -0.5]


def test_corners_are_uniform_with_ends_included() -> None:
    count = 30000
    corner = corners(keys(count), (3, 5), (8, 10))
    table = torch.bincount(corner[:, 0] * 6 + corner[:, 1], minlength=36)
    assert table.numel() == 36  # 6 x 6 places
    chi2 = float(((table - count / 36) ** 2 / (count / 36)).sum())
    assert 10 < chi2 < 66.6  # p = 0.001 at 35 degrees of freedom; too regular is wrong too


@pytest.mark.parametrize(
    ("size", "canvas"), [((4,), (21,)), ((6, 8), (20, 33)), ((2, 3, 1), (4, 9, 2))]
)
def test_pitch_is_a_view_averaged_down(size: Size, canvas: Size) -> None:
    x, corner = images(6, canvas), corners(keys(6), size, canvas, pitch=2)
    double = tuple(2 * length for length in size)
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(size) - 1]
    cut = crop(x, corner, size, pitch=2)
    torch.testing.assert_close(cut, pool(crop(x, corner, double), 2), rtol=1e-6, atol=0)
    pos = pool(coordinates(corner, double, canvas), 2)
    assert torch.allclose(coordinates(corner, size, canvas, pitch=2), pos, atol=1e-6)


def test_impossible_places_are_refused() -> None:
    with refuses("(9, 4)", "pitch 1", "(8, 8)"):
        corners(keys(2), (9, 4), (8, 8))
    with refuses("(5, 4)", "pitch 2", "(8, 8)"):
        corners(keys(2), (5, 4), (8, 8), 2)
    with refuses("corner", 2, "(1, 2, 3)"):
        Region((8, 8), (1, 2, 3))
