"""The laws of crop sizes and the plans made of them."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from commands import names

from patchdiffusion.noise import LogNormal, Truncated
from patchdiffusion.patches import Size
from patchdiffusion.plans import (
    ConstantPixels,
    Group,
    Patches,
    PatchPlan,
    Progressive,
    Stochastic,
    Stratified,
    equivalents,
)
from patchdiffusion.sizes import PatchLaw
from patchdiffusion.system import families

LAW = LogNormal()
JOINT = Stratified(
    fractions=(1.0, 0.5, 1.0),
    probs=(0.5, 0.25, 0.25),
    percentiles=((0.0, 1.0), (0.0, 0.6), (0.5, 1.0)),
    pitches=(1, 1, 2),
)
"""Whole images, crops at low noise, whole images at half their resolution at high noise."""
CANVASES: list[Size] = [
    (1, 1), (2, 3), (8, 8), (16, 16), (31, 64), (32, 2048), (65, 65), (96, 40), (128, 128),
    (1,), (100,), (8, 24, 24), (3, 31, 64)
]  # fmt: skip
PAPER = Stochastic.paper()


def test_the_law_of_the_paper() -> None:
    assert Stochastic() == PAPER
    law = Stochastic.paper(0.25)
    assert law.fractions == (1.0, 0.5, 0.25)
    assert law.probs == pytest.approx((0.25, 0.45, 0.3))
    assert Stochastic.paper(0.25, latent=True).probs == (0.25, 0.75)
    whole = PatchPlan((8, 8), 4, Stratified.whole())
    assert PatchPlan.paper((8, 8), 4, p=1.0).kinds() == whole.kinds()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stratified(fractions=(1.0,)), "fractions and probs .* not 1 and 3"),
        (lambda: Stratified(fractions=(), probs=()), "at least 1, not 0 and 0"),
        (lambda: Stratified(fractions=(1.0, 0.0, 0.25)), r"fractions .* not \(1.0, 0.0"),
        (lambda: Stratified(fractions=(1.5, 0.5, 0.25)), r"fractions .* not \(1.5"),
        (lambda: Stratified(probs=(0.5, 0.3, 0.3)), r"probs .* not \(0.5, 0.3, 0.3\)"),
        (lambda: Stratified(probs=(1.2, -0.1, -0.1)), r"probs .* not \(1.2"),
        (lambda: Stratified(probs=(math.nan, 0.5, 0.5)), r"probs .* not \(nan"),
        (lambda: Stratified(multiplier="two"), "unknown multiplier 'two'"),  # type: ignore[arg-type]
        (lambda: Stratified(loss_norm="sum"), "unknown loss_norm 'sum'"),  # type: ignore[arg-type]
        (lambda: Stratified(percentiles=((0.0, 1.0),)), "percentiles .* not 1"),
        (lambda: Stratified(pitches=(1, 1)), "pitches .* not 2"),
        (lambda: Stratified(percentiles=((0, 1), (0.5, 0.5), (0, 1))), "percentiles .* not"),
        (lambda: Stratified(pitches=(1, 1, 0)), r"pitches .* not \(1, 1, 0\)"),
        (lambda: PatchPlan((8, 8), 4, JOINT, 8, LAW), r"\(8, 8\) is too small for pitch 2"),
        (lambda: Stochastic.paper(1.1), "p .* not 1.1"),
        (lambda: Stochastic.paper(-0.1, latent=True), "p .* not -0.1"),
        (lambda: PatchPlan(64, 4), "canvas .* not 64"),  # type: ignore[arg-type]
        (lambda: PatchPlan((0, 64), 4), r"canvas .* not \(0, 64\)"),
        (lambda: PatchPlan((64, 64), 0), "batch and divisor .* not 0 and 1"),
        (lambda: PatchPlan((64, 64), 4, divisor=0), "batch and divisor .* not 4 and 0"),
        (lambda: PatchPlan((8, 8), 4, Progressive()).draw(seed=0, step=0), "progress"),
    ],
)
def test_impossible_values_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- Sizes ----


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("divisor", [1, 2, 8, 16])
def test_any_canvas(canvas: Size, divisor: int) -> None:
    for law in (Stratified(), Stochastic.paper(0.0), ConstantPixels(), Progressive()):
        sizes = law.sizes(canvas, divisor)
        assert len({k.size for k in sizes}) == len(sizes)
        assert [k.area for k in sizes] == sorted((k.area for k in sizes), reverse=True)
        assert sum(k.prob for k in sizes) == pytest.approx(1)
        assert sum(k.share for k in sizes) == pytest.approx(1)
        for k in sizes:
            for side, whole in zip(k.size, canvas, strict=True):
                assert side == whole or (0 < side < whole and side % divisor == 0)
            assert k.area == pytest.approx(math.prod(k.size) / math.prod(canvas))
        plan = PatchPlan(canvas, 8, law, divisor)
        assert [group.size for group in plan.groups] == [k.size for k in sizes]
        kinds = plan.kinds()
        assert sum(share for share, _ in kinds) == pytest.approx(1)
        drawn = plan.draw(seed=0, step=3, progress=0.3)
        assert drawn in [groups for _, groups in kinds]
        assert all(group.count >= 1 and isinstance(group.count, int) for group in drawn)


@pytest.mark.parametrize("side", [32, 64, 128, 512])
def test_powers_of_two_have_the_published_multipliers(side: int) -> None:
    """The published table lacks R = 32 and is wrong for 128 and 256."""
    sizes = PAPER.sizes((side, side))
    assert [k.size for k in sizes] == [(side // f, side // f) for f in (1, 2, 4)]
    assert [k.multiplier for k in sizes] == [1, 2, 4]


@pytest.mark.parametrize(
    ("multiplier", "axes", "expected"),
    [
        ("inverse_side", 1, [1, 2, 4]),
        ("inverse_side", 3, [1, 2, 4]),
        ("inverse_area", 2, [1, 4, 16]),
        ("inverse_area", 3, [1, 8, 64]),
        ("one", 2, [1, 1, 1]),
    ],
)
def test_multipliers(multiplier: str, axes: int, expected: list[int]) -> None:
    law = replace(PAPER, multiplier=multiplier)
    assert [k.multiplier for k in law.sizes((64,) * axes)] == pytest.approx(expected)


def test_odd_rectangular_and_tiny_canvases() -> None:
    assert [k.size for k in PAPER.sizes((65, 65))] == [(65, 65), (32, 32), (16, 16)]
    assert PAPER.sizes((65, 65))[1].multiplier == pytest.approx(65 / 32)
    assert [k.size for k in PAPER.sizes((32, 2048), 8)] == [(32, 2048), (16, 1024), (8, 512)]
    collapsed = PAPER.sizes((16, 16), 8)
    assert [(k.size, k.prob) for k in collapsed] == [((16, 16), 0.5), ((8, 8), 0.5)]
    (only,) = PAPER.sizes((8, 8), 8)
    assert only.size == (8, 8) and only.prob == pytest.approx(1) and only.share == 1


def test_gradient_shares() -> None:
    assert [round(100 * k.share, 1) for k in PAPER.sizes((64, 64))] == [85.1, 12.8, 2.1]
    even = replace(PAPER, loss_norm="mean").sizes((64, 64))
    assert [k.share for k in even] == pytest.approx([0.5, 0.3, 0.2])


# ---- Steps ----


def test_draw_follows_the_law() -> None:
    plan = PatchPlan.paper((64, 64), 512)
    steps = 5000
    drawn = [plan.draw(seed=1, step=step) for step in range(steps)]
    assert all(len(groups) == 1 for groups in drawn)
    for k in PAPER.sizes((64, 64)):
        tolerance = 4 * math.sqrt(k.prob * (1 - k.prob) / steps)
        chosen = [g for (g,) in drawn if g.size == k.size]
        assert abs(len(chosen) / steps - k.prob) < tolerance
        assert chosen[0].count == 512 * k.multiplier
        assert chosen[0].weight * k.prob == pytest.approx(k.share)
    assert sum(g.count for (g,) in drawn) / steps / 512 == pytest.approx(1.9, rel=0.02)
    assert sum(equivalents(g, (64, 64)) for g in drawn) / steps / 512 == pytest.approx(
        0.7, rel=0.02
    )
    assert [plan.draw(seed=1, step=s) for s in range(50)] == drawn[:50]  # any rank, any time
    assert [plan.draw(seed=2, step=s) for s in range(50)] != drawn[:50]


def test_stratified_counts_are_fixed() -> None:
    plan = PatchPlan((64, 64), 32)
    groups = plan.draw(seed=0, step=0)
    assert [(g.size, g.count) for g in groups] == [((64, 64), 16), ((32, 32), 19), ((16, 16), 26)]
    assert [g.weight for g in groups] == [k.share for k in Stratified().sizes((64, 64))]
    assert all(plan.draw(seed=s, step=s) == groups for s in range(20))
    assert equivalents(groups, (64, 64)) == 16 + 19 / 4 + 26 / 16
    assert [g.count for g in PatchPlan((64, 64), 1).draw(seed=0, step=0)] == [1, 1, 1]


def test_progressive_boundaries() -> None:
    plan = PatchPlan((64, 64), 8, Progressive())
    expected = {0.0: 16, 0.199: 16, 0.201: 32, 0.499: 32, 0.501: 64, 0.99: 64, 1.0: 64}
    for progress, side in expected.items():
        (group,) = plan.draw(seed=0, step=0, progress=progress)
        assert group.size == (side, side)
    weights = {16: 0.2, 32: 0.3, 64: 0.5}  # over the whole run the shares are those of the law
    total = 0.0
    for progress, side in ((0.1, 16), (0.3, 32), (0.7, 64)):
        total += plan.draw(seed=0, step=0, progress=progress)[0].weight * weights[side]
    assert total == pytest.approx(1)


def test_constant_pixels() -> None:
    plan = PatchPlan((64, 64), 512, ConstantPixels())
    shares, kinds = zip(*plan.kinds(), strict=True)
    assert [round(share, 3) for share in shares] == [0.714, 0.214, 0.071]
    assert all(equivalents(groups, (64, 64)) == 512 for groups in kinds)
    assert plan.cost().crops == pytest.approx(2.714, abs=5e-4)
    assert plan.cost(world=16, synced=False).step == pytest.approx(1)  # nobody waits
    assert all(plan.draw(seed=0, step=step) in kinds for step in range(100))
    crops, paper = (
        [k.prob * k.multiplier for k in law.sizes((64, 64))] for law in (ConstantPixels(), PAPER)
    )
    assert [c / sum(crops) for c in crops] == pytest.approx([c / sum(paper) for c in paper])


# ---- Noise levels and pitches ----


def test_every_group_has_the_noise_law_of_the_run() -> None:
    neutral = Stratified(percentiles=((0.0, 1.0),) * 3, pitches=(1, 1, 1))
    plain, other = (PatchPlan((64, 64), 16, law, 4, LAW) for law in (Stratified(), neutral))
    assert plain.draw(seed=0, step=3) == other.draw(seed=0, step=3)
    assert all(group.noise is LAW for group in plain.groups)


@pytest.mark.parametrize("cls", [Stratified, ConstantPixels])
def test_joint_law_of_size_and_noise(cls: type[Stratified | ConstantPixels]) -> None:
    plan = PatchPlan((64, 48), 16, families.copy_fields(cls(), JOINT), 8, LAW)
    groups = {group.name: group for group in plan.groups}
    assert next(iter(groups)) == "64x48" and len(groups) == 3
    expected = {
        "64x48": ((64, 48), 1, LAW),
        "32x24[0-0.6]": ((32, 24), 1, Truncated(law=LAW, high=0.6)),
        "32x24@2[0.5-1]": ((32, 24), 2, Truncated(law=LAW, low=0.5, scale=0.5)),
    }
    assert {name: (g.size, g.pitch, g.noise) for name, g in groups.items()} == expected
    drawn = {g for step in range(99) for g in plan.draw(seed=0, step=step)}
    assert {g.name for g in drawn} == set(groups)


def test_a_word_changes_the_mode_and_keeps_the_sizes() -> None:
    old = Progressive(loss_norm="mean", fractions=(1.0, 0.5), probs=(0.75, 0.25))
    for member in families.members(Patches):
        if not issubclass(member, PatchLaw):
            continue
        new = member().inherit(old, None)
        assert type(new) is member and families.copy_fields(old, new) == old
    assert list(families.words(Patches)) == [
        "stratified", "stochastic", "progressive", "constant-pixels", "multigrid"
    ]  # fmt: skip


def test_equivalents() -> None:
    groups = (Group((8, 8), 3, 1.0), Group((4, 2), 5, 1.0))
    assert equivalents(groups, (8, 8)) == 3 + 5 * 8 / 64


@pytest.mark.parametrize(
    ("canvas", "divisor", "fractions", "parts"),
    [
        ((64, 64), 4, (1.0, 0.5, 0.25), []),
        ((32, 32), 4, (1.0, 0.5, 0.3), ["0.3", "8x8", "4"]),
        ((28, 28), 4, (1.0, 0.5, 0.25), ["0.5", "16x16", "0.25", "8x8", "4"]),
        ((64, 64), 64, (1.0, 0.5, 0.25), ["one size", "64"]),
        ((64, 64), 64, (1.0,), []),
    ],
)
def test_sizes_that_are_rounded_are_told(
    canvas: Size, divisor: int, fractions: tuple[float, ...], parts: list[str]
) -> None:
    law = Stratified(fractions=fractions, probs=(1 / len(fractions),) * len(fractions))
    told = PatchPlan(canvas, 8, law, divisor).rounding
    assert names(told, *parts) if parts else told == ""


def test_stages_are_the_changes_of_a_progressive_plan() -> None:
    law = Progressive(fractions=(1.0, 0.5, 0.25), probs=(0.5, 0.3, 0.2))
    stages = PatchPlan((64, 64), 8, law, divisor=4).stages
    assert [kinds[0][1][0].size for _, kinds in stages] == [(16, 16), (32, 32), (64, 64)]
    assert [start for start, _ in stages] == pytest.approx([0, 0.2, 0.5], abs=1e-5)
    for still in (Stratified(), Stochastic()):
        assert len(PatchPlan((64, 64), 8, still, divisor=4).stages) == 1
