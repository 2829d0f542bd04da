"""Classifier-free guidance on distributions for which it is known exactly."""

import math
from typing import Any

import pytest
import torch
from commands import refuses
from oracles import TOY, Two, images, inputs
from torch import Tensor

from patchdiffusion.cond import Cond, Position
from patchdiffusion.denoiser import PatchDenoiser
from patchdiffusion.guidance.auto import AutoGuidance
from patchdiffusion.guidance.cfg import CFG, Unconditional
from patchdiffusion.solvers import heun, solve
from patchdiffusion.solvers.schedules import karras


def test_weight_1_is_the_denoiser_bit_for_bit_in_one_evaluation() -> None:
    x, sigma, cond = inputs()
    assert torch.equal(CFG(TOY, 1.0)(x, sigma, cond), TOY(x, sigma, cond))
    denoiser = Two()
    CFG(denoiser, 1.0)(x, 1.0, cond)
    assert denoiser.batches == [12]
    assert torch.equal(CFG(TOY, 1.0)(x, sigma), TOY(x, sigma))  # and it needs no labels


def test_weight_0_is_unconditional() -> None:
    x, sigma, cond = inputs()
    assert torch.allclose(CFG(TOY, 0.0)(x, sigma, cond), TOY(x, sigma), atol=1e-14)
    assert not torch.allclose(TOY(x, sigma, cond), TOY(x, sigma), atol=1e-3)


@pytest.mark.parametrize("weight", [0.5, 2.0, 7.5])
def test_extrapolates_from_one_joined_batch(weight: float) -> None:
    x, sigma, cond = inputs()
    null, given = TOY(x, sigma), TOY(x, sigma, cond)
    expected = null + weight * (given - null)
    assert torch.allclose(CFG(TOY, weight)(x, sigma, cond), expected, atol=1e-12)
    assert torch.allclose(CFG(TOY, weight)(x, 2.0, cond)[0], CFG(TOY, weight)(
        x[:1], torch.tensor([2.0]), cond.take(slice(0, 1)))[0])  # fmt: skip
    denoiser = Two()
    CFG(denoiser, weight)(x, 1.0, cond)
    assert denoiser.batches == [24]


@pytest.mark.parametrize(("weight", "published"), [(2.0, 0.25), (3.0, 0.125), (5.0, 0.0313)])
def test_guided_gaussian_ends_with_the_known_width(weight: float, published: float) -> None:
    """std = s_c^w s_u^(1 - w), not that of the product of experts."""
    x = 80 * torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    cond = Cond(labels=torch.zeros(2, dtype=torch.int64))
    end = solve(heun, CFG(Two(), weight), x, karras(300), cond=cond)
    start = math.sqrt(80**2 + 0.5**2) ** weight * math.sqrt(80**2 + 1) ** (1 - weight)
    std = end[:, 0] / (x[:, 0] / start)
    assert std.tolist() == pytest.approx([0.5**weight] * 2, rel=5e-3)
    assert 0.5**weight == pytest.approx(published, abs=1e-4)
    assert abs(float(std[0]) - 1 / math.sqrt(weight / 0.25 + 1 - weight)) > 0.05


def test_guidance_needs_labels_or_context() -> None:
    x, sigma, _ = inputs()
    for cond in (None, Cond(), Cond(extra=torch.ones(12, 1))):
        with refuses("guidance", 3.0, "labels"):
            CFG(TOY, 3.0)(x, sigma, cond)


@pytest.mark.parametrize("weight", [-0.5, math.inf, math.nan])
def test_impossible_weight_is_refused(weight: float) -> None:
    with refuses(weight):
        CFG(TOY, weight)


def test_everything_else_in_the_condition_is_the_same_in_both_halves() -> None:
    spy, x = Two(), torch.ones(2, 1, 3, 3)
    pos, context = torch.rand(2, 2, 3, 3, generator=torch.Generator()), torch.ones(2, 4, 5)
    CFG(spy, 2.0)(x, 1.0, Cond(labels=torch.tensor([0, 1]), pos=pos, context=context))
    assert spy.cond.pos is not None and torch.equal(spy.cond.pos, torch.cat([pos, pos]))
    assert spy.cond.labels is not None and spy.cond.labels.tolist() == [0, 1, -1, -1]
    assert spy.cond.context is not None
    assert spy.cond.context.sum((1, 2)).tolist() == [20, 20, 0, 0]


# ---- Interval ----


@pytest.mark.parametrize(
    ("sigma", "inside"), [(0.3, False), (0.31, True), (2.0, True), (2.1, False)]
)
def test_outside_of_the_interval_is_the_condition_in_one_evaluation(
    sigma: float, inside: bool
) -> None:
    x, _, cond = inputs()
    denoiser, plain = Two(), Two()(x, sigma, cond)
    found = CFG(denoiser, 3.0, interval=(0.3, 2.0))(x, sigma, cond)
    assert denoiser.batches == ([24] if inside else [12])
    assert torch.equal(found, CFG(Two(), 3.0)(x, sigma, cond) if inside else plain)
    assert not torch.equal(plain, CFG(Two(), 3.0)(x, sigma, cond))


def test_each_sample_has_its_level() -> None:
    """Levels in a tensor may lie on both sides."""
    x, sigma, cond = inputs()
    guided = CFG(TOY, 3.0, interval=(2.0, 4.0))
    together = guided(x, sigma, cond)
    inside = (sigma > 2) & (sigma <= 4)
    assert 0 < inside.sum() < 12
    for i in range(12):
        one = cond.take(slice(i, i + 1))
        alone = guided(x[i : i + 1], float(sigma[i]), one)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)
        scalar = guided(x[i : i + 1], sigma[i], one)  # a tensor without dimensions
        torch.testing.assert_close(scalar, alone, rtol=0, atol=1e-12)


def test_an_empty_interval_is_no_guidance() -> None:
    x, sigma, cond = inputs()
    for levels in (sigma, 1e-3, 5.0):
        assert torch.equal(CFG(Two(), 7.0, interval=(0.0, 0.0))(x, levels, cond),
                           Two()(x, levels, cond))  # fmt: skip


def test_the_field_jumps_at_the_edges_and_nowhere_else() -> None:
    x, _, cond = inputs()
    guided = CFG(Two(), 3.0, interval=(0.3, 2.0))
    assert guided.discontinuities == (0.3, 2.0)
    for edge in (0.3, 2.0, 0.2, 1.0, 3.0):
        step = (guided(x, edge * (1 + 1e-9), cond) - guided(x, edge, cond)).abs().max()
        assert (float(step) > 1e-3) == (edge in guided.discontinuities)
    assert CFG(Two(), 3.0, interval=(0.0, 2.0)).discontinuities == (2.0,)
    for without in (CFG(Two(), 3.0), CFG(Two(), 1.0, interval=(0.3, 2.0)),
                    CFG(Two(), 3.0, interval=(1.0, 1.0))):  # fmt: skip
        assert without.discontinuities == ()


def test_guided_gaussian_in_an_interval_ends_with_the_known_width() -> None:
    def shrink(std: float, a: float, b: float) -> float:
        return math.sqrt((std**2 + b**2) / (std**2 + a**2))

    x = 80 * torch.tensor([[1.0]], dtype=torch.float64)
    cond = Cond(labels=torch.zeros(1, dtype=torch.int64))
    end = solve(heun, CFG(Two(), 3.0, interval=(0.3, 2.0)), x, karras(1500), cond=cond)
    exact = 80 * shrink(0.5, 80, 2) * shrink(0.5, 2, 0.3) ** 3 * shrink(1, 2, 0.3) ** -2
    exact *= shrink(0.5, 0.3, 0)
    assert float(end) == pytest.approx(exact, rel=3e-3)
    assert exact == pytest.approx(0.184, abs=1e-3)  # everywhere: 0.125


# ---- Rescaling, channels ----


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_rescaling_restores_the_deviation_of_each_sample(share: float) -> None:
    x, cond = images()
    guided, given = CFG(Two(), 4.0)(x, 1.0, cond), Two()(x, 1.0, cond)
    found = CFG(Two(), 4.0, rescale=share)(x, 1.0, cond)
    for image, plain, wanted in zip(found, guided, given, strict=True):
        factor = float(wanted.std() / plain.std())
        assert factor < 0.9 or factor > 1.1
        expected = share * (plain * factor) + (1 - share) * plain
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-12)
        if share == 1:
            assert float(image.std()) == pytest.approx(float(wanted.std()), rel=1e-12)


def test_a_flat_image_is_rescaled_to_itself() -> None:
    x, cond = torch.ones(2, 1, 4, 4), Cond(labels=torch.tensor([0, 1]))
    flat = CFG(Two(), 4.0, rescale=1.0)(x, 1.0, cond)
    assert torch.equal(flat, CFG(Two(), 4.0)(x, 1.0, cond))


def test_rescaling_leaves_the_other_channels_alone() -> None:
    x, cond = images(channels=4)
    found = CFG(Two(), 4.0, rescale=1.0, channels=3)(x, 1.0, cond)
    plain = Two()(x, 1.0, cond)
    assert torch.equal(found[:, 3:], plain[:, 3:])
    widths = (t[:, :3].flatten(1).std(dim=1) for t in (found, plain))
    torch.testing.assert_close(*widths)
    assert not torch.allclose(found[:, :3], plain[:, :3])


def test_some_channels_only() -> None:
    x, cond = images(channels=4)
    found = CFG(Two(), 4.0, channels=3)(x, 1.0, cond)
    assert torch.equal(found[:, :3], CFG(Two(), 4.0)(x, 1.0, cond)[:, :3])
    assert torch.equal(found[:, 3:], Two()(x, 1.0, cond)[:, 3:])
    assert torch.equal(CFG(Two(), 4.0, channels=4)(x, 1.0, cond), CFG(Two(), 4.0)(x, 1.0, cond))
    with refuses(4, 5):
        CFG(Two(), 4.0, channels=5)(x, 1.0, cond)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": (2.0, 1.0)}, r"needs 0 <= low <= high < inf, not 2\.0, 1\.0"),
        ({"interval": (-1.0, 1.0)}, "0 <= low"),
        ({"interval": (0.0, math.inf)}, "high < inf"),
        ({"interval": (math.nan, 1.0)}, "0 <= low"),
        ({"rescale": 1.5}, r"rescale.*1\.5"),
        ({"rescale": math.nan}, "rescale"),
        ({"channels": 0}, "at least 1 channel, not 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CFG(TOY, 2.0, **options)
    with pytest.raises(ValueError, match=message):
        AutoGuidance(TOY, TOY, 2.0, **options)


# ---- What the denoiser is told ----


def test_the_joined_batch_has_a_slot_and_seeds_of_its_own() -> None:
    x, sigma, cond = inputs(3)
    step = Position(run=4, index=3, stage=1, sigmas=(1.0, 0.0), seeds=torch.tensor([7, 8, 9]))
    denoiser = Two()
    guided = CFG(denoiser, 2.0, interval=(0.5, 1.5))
    for level in (1.0, 2.0, sigma):
        guided(x, level, cond, position=step)
    inside, outside, _ = denoiser.steps
    assert inside is not None and inside.seeds is not None
    assert inside.seeds.tolist() == [7, 8, 9, 7, 8, 9] and inside.slot == ("cfg",)
    assert (inside.run, inside.index, inside.stage, inside.sigmas) == (4, 3, 1, (1.0, 0.0))
    assert outside is step
    assert (
        isinstance(denoiser.given[-1], Tensor) and denoiser.given[-1].tolist() == sigma.tolist() * 2
    )
    guided(x, 1.0, cond)
    assert denoiser.steps[-1] is None
    assert denoiser.given[-1] == 1.0  # a number stays one, so that intervals inside can tell


def test_a_second_cfg_inside_is_refused() -> None:
    inner = CFG(TOY, 2.0)
    for denoiser in (inner, PatchDenoiser(inner, (4, 4)), AutoGuidance(TOY, inner, 2.0),
                     AutoGuidance(Unconditional(inner), TOY, 2.0)):  # fmt: skip
        with refuses("CFG"):
            CFG(denoiser, 2.0)
