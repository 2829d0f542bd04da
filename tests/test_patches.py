"""The patch law, the plan, its cost, crops and coordinates."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.noise import LogNormal, Truncated
from patchdiffusion.patches import Region, Size, coordinates, corners, crop, random_crop
from patchdiffusion.plans import Group, Mode, PatchLaw, PatchPlan, equivalents

LAW = LogNormal()
JOINT = PatchLaw(
    fractions=(1.0, 0.5, 1.0),
    probs=(0.5, 0.25, 0.25),
    percentiles=((0.0, 1.0), (0.0, 0.6), (0.5, 1.0)),
    pitches=(1, 1, 2),
)
"""Whole images, crops at low noise, whole images at half their resolution at high noise."""
CANVASES: list[Size] = [
    (1, 1), (2, 3), (8, 8), (16, 16), (31, 64), (32, 2048), (65, 65), (96, 40), (128, 128)
]  # fmt: skip


def keys(count: int, step: int = 0) -> Tensor:
    return rng.keys(0, "crop", step, torch.arange(count))


def images(count: int, canvas: Size, channels: int = 2) -> Tensor:
    """Images in which every pixel is different."""
    size = (count, channels, *canvas)
    return torch.arange(math.prod(size), dtype=torch.float32).reshape(size)


# ---- The law ----


def test_paper_law() -> None:
    assert PatchLaw.paper() == PatchLaw(mode="stochastic")
    law = PatchLaw.paper(0.25)
    assert law.fractions == (1.0, 0.5, 0.25)
    assert law.probs == pytest.approx((0.25, 0.45, 0.3))
    assert PatchLaw.paper(0.25, latent=True).probs == (0.25, 0.75)
    assert PatchPlan.paper((8, 8), 4, p=1.0).sizes == PatchPlan((8, 8), 4, PatchLaw.whole()).sizes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PatchLaw(fractions=(1.0,)), "same length, at least 1, not 1 and 3"),
        (lambda: PatchLaw(fractions=(), probs=()), "at least 1, not 0 and 0"),
        (lambda: PatchLaw(fractions=(1.0, 0.0, 0.25)), r"must lie in \(0, 1\], not \(1.0, 0.0"),
        (lambda: PatchLaw(fractions=(1.5, 0.5, 0.25)), r"must lie in \(0, 1\]"),
        (lambda: PatchLaw(probs=(0.5, 0.3, 0.3)), r"sum to 1, not \(0.5, 0.3, 0.3\)"),
        (lambda: PatchLaw(probs=(1.2, -0.1, -0.1)), ">= 0 and sum to 1"),
        (lambda: PatchLaw(probs=(math.nan, 0.5, 0.5)), ">= 0 and sum to 1"),
        (lambda: PatchLaw(mode="random"), "unknown mode 'random', allowed: .*'stratified'"),  # type: ignore[arg-type]
        (lambda: PatchLaw(multiplier="two"), "unknown multiplier 'two'"),  # type: ignore[arg-type]
        (lambda: PatchLaw(loss_norm="sum"), "unknown loss_norm 'sum'"),  # type: ignore[arg-type]
        (
            lambda: PatchLaw(percentiles=((0.0, 1.0),)),
            "percentiles needs one entry per fraction, .*not 1",
        ),
        (lambda: PatchLaw(pitches=(1, 1)), "pitches needs one entry per fraction, or none, not 2"),
        (
            lambda: PatchLaw(percentiles=((0, 1), (0.5, 0.5), (0, 1))),
            "percentiles need 0 <= low < high <= 1",
        ),
        (lambda: PatchLaw(pitches=(1, 1, 0)), r"pitches must be at least 1, not \(1, 1, 0\)"),
        (lambda: PatchPlan((8, 8), 4, JOINT), "need the noise law of the run"),
        (lambda: PatchPlan((8, 8), 4, JOINT, 8, LAW).sizes, r"\(8, 8\) is too small for pitch 2"),
        (lambda: PatchLaw.paper(1.1), r"must lie in \[0, 1\], not 1.1"),
        (lambda: PatchLaw.paper(-0.1, latent=True), r"must lie in \[0, 1\]"),
        (lambda: PatchPlan(64, 4), "canvas .* not 64"),  # type: ignore[arg-type]
        (lambda: PatchPlan((0, 64), 4), r"canvas .* not \(0, 64\)"),
        (lambda: PatchPlan((64, 64), 0), "at least 1, not 0 and 1"),
        (lambda: PatchPlan((64, 64), 4, divisor=0), "at least 1, not 4 and 0"),
        (lambda: corners(keys(2), (9, 4), (8, 8)), r"crop of \(9, 4\) at pitch 1 does not fit"),
        (lambda: corners(keys(2), (5, 4), (8, 8), 2), "at pitch 2 does not fit the canvas"),
        (lambda: Region((8, 8), (1, 2, 3)), r"corner must have 2 numbers, .* not \(1, 2, 3\)"),
    ],
)
def test_impossible_values_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- The plan ----


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("divisor", [1, 2, 8, 16])
def test_any_canvas(canvas: Size, divisor: int) -> None:
    for mode, p in itertools.product(("stratified", "stochastic", "constant_pixels"), (0.0, 0.5)):
        plan = PatchPlan(canvas, 8, replace(PatchLaw.paper(p), mode=mode), divisor)
        assert len({k.size for k in plan.sizes}) == len(plan.sizes)
        assert [k.area for k in plan.sizes] == sorted((k.area for k in plan.sizes), reverse=True)
        assert sum(k.prob for k in plan.sizes) == pytest.approx(1)
        assert sum(k.share for k in plan.sizes) == pytest.approx(1)
        for k in plan.sizes:
            for side, whole in zip(k.size, canvas, strict=True):
                assert side == whole or (0 < side < whole and side % divisor == 0)
            assert k.area == pytest.approx(math.prod(k.size) / math.prod(canvas))
        for group in plan.draw(seed=0, step=3):
            assert group.count >= 1 and isinstance(group.count, int)
            cut, pos = random_crop(images(2, canvas), group.size, key=keys(2))
            assert cut.shape == (2, 2, *group.size) and pos.shape == (2, 2, *group.size)


@pytest.mark.parametrize("side", [32, 64, 128, 512])
def test_powers_of_two_have_the_published_multipliers(side: int) -> None:
    """The published table lacks R = 32 and is wrong for 128 and 256."""
    sizes = PatchPlan.paper((side, side), 64).sizes
    assert [k.size for k in sizes] == [(side // f, side // f) for f in (1, 2, 4)]
    assert [k.multiplier for k in sizes] == [1, 2, 4]


def test_odd_rectangular_and_tiny_canvases() -> None:
    assert [k.size for k in PatchPlan.paper((65, 65), 8).sizes] == [(65, 65), (32, 32), (16, 16)]
    assert PatchPlan.paper((65, 65), 8).sizes[1].multiplier == pytest.approx(65 / 32)
    wide = PatchPlan.paper((32, 2048), 8, divisor=8).sizes
    assert [k.size for k in wide] == [(32, 2048), (16, 1024), (8, 512)]
    collapsed = PatchPlan.paper((16, 16), 8, divisor=8).sizes
    assert [(k.size, k.prob) for k in collapsed] == [((16, 16), 0.5), ((8, 8), 0.5)]
    (only,) = PatchPlan.paper((8, 8), 8, divisor=8).sizes
    assert only.size == (8, 8) and only.prob == pytest.approx(1) and only.share == 1


def test_other_multipliers() -> None:
    for name, expected in (("inverse_area", [1, 4, 16]), ("one", [1, 1, 1])):
        law = replace(PatchLaw.paper(), multiplier=name)
        assert [k.multiplier for k in PatchPlan((64, 64), 8, law).sizes] == expected


def test_draw_follows_the_law() -> None:
    plan = PatchPlan.paper((64, 64), 512)
    steps = 5000
    drawn = [plan.draw(seed=1, step=step) for step in range(steps)]
    sizes = [groups[0].size for groups in drawn]
    assert all(len(groups) == 1 for groups in drawn)
    for k in plan.sizes:
        tolerance = 4 * math.sqrt(k.prob * (1 - k.prob) / steps)
        assert abs(sizes.count(k.size) / steps - k.prob) < tolerance
        chosen = next(g for (g,) in drawn if g.size == k.size)
        assert chosen.count == 512 * k.multiplier
        assert chosen.weight * k.prob == pytest.approx(k.share)
    assert sum(g.count for (g,) in drawn) / steps / 512 == pytest.approx(1.9, rel=0.02)
    assert sum(equivalents(g, (64, 64)) for g in drawn) / steps / 512 == pytest.approx(
        0.7, rel=0.02
    )
    assert [plan.draw(seed=1, step=s) for s in range(50)] == drawn[:50]  # any rank, any time
    assert [plan.draw(seed=2, step=s) for s in range(50)] != drawn[:50]


def test_gradient_shares() -> None:
    sizes = PatchPlan.paper((64, 64), 512).sizes
    assert [round(100 * k.share, 1) for k in sizes] == [85.1, 12.8, 2.1]
    law = replace(PatchLaw.paper(), loss_norm="mean")
    assert [k.share for k in PatchPlan((64, 64), 512, law).sizes] == pytest.approx([0.5, 0.3, 0.2])


def test_stratified_counts_are_fixed() -> None:
    plan = PatchPlan((64, 64), 32)
    groups = plan.draw(seed=0, step=0)
    assert [(g.size, g.count) for g in groups] == [((64, 64), 16), ((32, 32), 19), ((16, 16), 26)]
    assert [g.weight for g in groups] == [k.share for k in plan.sizes]
    assert all(plan.draw(seed=s, step=s) == groups for s in range(20))
    assert equivalents(groups, (64, 64)) == 16 + 19 / 4 + 26 / 16
    assert [g.count for g in PatchPlan((64, 64), 1).draw(seed=0, step=0)] == [1, 1, 1]


def test_progressive_boundaries() -> None:
    plan = PatchPlan((64, 64), 8, PatchLaw(mode="progressive"))
    expected = {0.0: 16, 0.199: 16, 0.201: 32, 0.499: 32, 0.501: 64, 0.99: 64, 1.0: 64}
    for progress, side in expected.items():
        (group,) = plan.draw(seed=0, step=0, progress=progress)
        assert group.size == (side, side)
    weights = {16: 0.2, 32: 0.3, 64: 0.5}  # over the whole run the shares are those of the law
    total = 0.0
    for progress, side in ((0.1, 16), (0.3, 32), (0.7, 64)):
        total += plan.draw(seed=0, step=0, progress=progress)[0].weight * weights[side]
    assert total == pytest.approx(1)
    with pytest.raises(ValueError, match="progress"):
        plan.draw(seed=0, step=0)


def test_constant_pixels() -> None:
    plan = PatchPlan((64, 64), 512, PatchLaw(mode="constant_pixels"))
    assert [round(k.prob, 3) for k in plan.sizes] == [0.714, 0.214, 0.071]
    assert plan.cost().crops == pytest.approx(2.714, abs=5e-4)
    assert plan.cost().step == pytest.approx(1)
    assert plan.cost(world=16, synced=False).step == pytest.approx(1)  # nobody waits
    for step in range(100):
        groups = plan.draw(seed=0, step=step)
        assert equivalents(groups, (64, 64)) == 512
    as_crops = [k.prob * k.multiplier for k in plan.sizes]
    paper = [k.prob * k.multiplier for k in PatchPlan.paper((64, 64), 512).sizes]
    assert [c / sum(as_crops) for c in as_crops] == pytest.approx([c / sum(paper) for c in paper])


def test_levels_and_pitches_that_change_nothing() -> None:
    neutral = PatchLaw(percentiles=((0.0, 1.0),) * 3, pitches=(1, 1, 1))
    plain, other = PatchPlan((64, 64), 16, divisor=4), PatchPlan((64, 64), 16, neutral, 4, LAW)
    assert plain.sizes == other.sizes
    assert plain.draw(seed=0, step=3) == other.draw(seed=0, step=3)


@pytest.mark.parametrize("mode", ["stratified", "constant_pixels"])
def test_joint_law_of_size_and_noise(mode: Mode) -> None:
    plan = PatchPlan((64, 48), 16, replace(JOINT, mode=mode), 8, LAW)
    whole, coarse, crops = plan.sizes
    assert [k.size for k in plan.sizes] == [(64, 48), (32, 24), (32, 24)]
    assert [k.area for k in plan.sizes] == [1, 0.25, 0.25]
    assert sorted([coarse.pitch, crops.pitch]) == [1, 2]
    if coarse.pitch == 1:
        coarse, crops = crops, coarse
    assert whole.noise is None
    assert crops.noise == Truncated(law=LAW, high=0.6)
    assert coarse.noise == Truncated(law=LAW, low=0.5, scale=0.5)
    assert [k.group(2).name for k in (whole, coarse, crops)] == [
        "64x48", "32x24@2[0.5-1]", "32x24[0-0.6]"
    ]  # fmt: skip
    groups = {g for step in range(99) for g in plan.draw(seed=0, step=step)}
    assert {(g.pitch, g.noise) for g in groups} == {(k.pitch, k.noise) for k in plan.sizes}
    assert not corners(keys(5), coarse.size, plan.canvas, coarse.pitch).any()  # all of the image


# ---- Crops and coordinates ----

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


def test_equivalents() -> None:
    groups = (Group((8, 8), 3, 1.0), Group((4, 2), 5, 1.0))
    assert equivalents(groups, (8, 8)) == 3 + 5 * 8 / 64
