"""Guidance by a worse model, by a classifier, thresholds, and all of it inside each other."""

import itertools
import math
from functools import partial

import pytest
import tiny
import torch
from commands import refuses
from oracles import Two, images, inputs
from torch import Tensor

from patchdiffusion import rng, sample
from patchdiffusion.analytic import GaussianMixture
from patchdiffusion.cond import Cond, Position, Tape
from patchdiffusion.denoiser import Denoiser, PatchDenoiser, discontinuities
from patchdiffusion.guidance.auto import AutoGuidance
from patchdiffusion.guidance.cfg import CFG, ClassifierFree, Unconditional
from patchdiffusion.guidance.classifier import ClassifierGuidance
from patchdiffusion.guidance.threshold import Clamp, Clamped, Thresholded
from patchdiffusion.sampling.pipeline import SamplerConfig
from patchdiffusion.solvers import Heun, Move, Step, heun, solve
from patchdiffusion.solvers.schedules import karras

TOY = GaussianMixture.toy()
STEP = Position(run=1, index=2, stage=0, sigmas=(1.0, 0.0))


def bayes(x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
    """The exact classifier of the toy mixture: ln p(x, label; sigma)."""
    every = (torch.full((len(x),), label) for label in range(3))
    return torch.stack([TOY.logp(x, sigma, Cond(labels=label)) for label in every], dim=1)


def spikes(std: float) -> GaussianMixture:
    """Two narrow modes on a line."""
    means = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    return GaussianMixture(means, torch.full((2, 1, 1), std**2, dtype=torch.float64))


# ---- A worse model ----


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0, 5.0])
def test_extrapolates_from_the_guide_through_the_main_model(weight: float) -> None:
    x, sigma, cond = inputs()
    main, guide = Two(0.5), Two(0.7)
    found = AutoGuidance(main, guide, weight)(x, sigma, cond)
    a, b = Two(0.5)(x, sigma, cond), Two(0.7)(x, sigma, cond)
    torch.testing.assert_close(found, weight * a + (1 - weight) * b, rtol=0, atol=1e-12)
    assert (main.batches, guide.batches) == ([12], [12])


def test_a_model_guided_by_itself_is_itself() -> None:
    x, sigma, cond = inputs()
    for weight in (0.0, 2.0, 7.5):
        assert torch.equal(AutoGuidance(TOY, TOY, weight)(x, sigma, cond), TOY(x, sigma, cond))


def test_weight_1_and_levels_outside_never_call_the_guide() -> None:
    x, sigma, cond = inputs()
    main, guide = Two(0.5), Two(0.7)
    assert torch.equal(AutoGuidance(main, guide, 1.0)(x, sigma, cond), main(x, sigma, cond))
    some = AutoGuidance(main, guide, 3.0, interval=(0.3, 2.0))
    assert torch.equal(some(x, 5.0, cond), main(x, 5.0, cond)) and guide.batches == []
    assert not torch.equal(some(x, 2.0, cond), main(x, 2.0, cond)) and guide.batches == [12]


def test_with_an_unconditional_guide_it_is_classifier_free() -> None:
    x, sigma, cond = inputs()
    for interval, rescale, channels in (
        (None, 0.0, None), ((2.0, 4.0), 0.0, None), (None, 0.7, None), (None, 0.0, 1),
    ):  # fmt: skip
        found, expected = (
            made(3.0, interval=interval, rescale=rescale, channels=channels)(x, sigma, cond)
            for made in (partial(AutoGuidance, TOY, Unconditional(TOY)), partial(CFG, TOY))
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert torch.equal(Unconditional(TOY)(x, sigma), TOY(x, sigma))


def test_autoguidance_sharpens_blurred_modes() -> None:
    """A model that blurs by .15, guided by one that blurs by .25, comes back to the truth."""
    key = rng.keys(0, "start", 0, torch.arange(4000))
    x = 80 * rng.normal(key, (1,), torch.float64)

    def stray(denoiser: Denoiser) -> tuple[float, float]:
        end = solve(heun, denoiser, x, karras(64))
        distance = (end.abs() - 1).abs()
        near = distance[distance < 0.5]
        return float((distance > 0.3).double().mean()), float(near.square().mean().sqrt())

    main, guide = (spikes(math.hypot(0.1, blur)) for blur in (0.15, 0.25))
    outside, width = stray(main)
    assert outside == pytest.approx(0.0988, abs=0.02) and width > 0.16
    guided, narrow = stray(AutoGuidance(main, guide, 2.5))
    assert guided == pytest.approx(0.0032, abs=0.003) and narrow == pytest.approx(0.1, abs=0.01)


# ---- A classifier ----


def test_the_exact_classifier_makes_the_conditional_denoiser() -> None:
    x, sigma, cond = inputs()
    guided = ClassifierGuidance(Unconditional(TOY), bayes, 1.0)
    expected = TOY(x, sigma, cond)
    with torch.no_grad():
        found = guided(x, sigma, cond)
    assert not found.requires_grad and not x.requires_grad
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert float((expected - TOY(x, sigma)).abs().max()) > 0.1
    torch.testing.assert_close(guided(x, 2.0, cond), TOY(x, 2.0, cond), rtol=0, atol=1e-10)


def test_the_weight_of_a_classifier_scales_its_gradient() -> None:
    """As classifier-free guidance does, if the classifier is exact."""
    x, sigma, cond = inputs()
    found = ClassifierGuidance(Unconditional(TOY), bayes, 3.0)(x, sigma, cond)
    torch.testing.assert_close(found, CFG(TOY, 3.0)(x, sigma, cond), rtol=0, atol=1e-10)


def test_no_weight_no_class_or_no_level_is_no_guidance() -> None:
    x, sigma, cond = inputs()
    assert cond.labels is not None
    assert torch.equal(ClassifierGuidance(TOY, bayes, 0.0)(x, sigma, cond), TOY(x, sigma, cond))
    assert torch.equal(ClassifierGuidance(TOY, bayes, 0.0)(x, sigma), TOY(x, sigma))  # unlabeled
    some = ClassifierGuidance(TOY, bayes, 2.0, interval=(0.3, 2.0))
    assert torch.equal(some(x, 0.3, cond), TOY(x, 0.3, cond))
    assert not torch.allclose(some(x, 2.0, cond), TOY(x, 2.0, cond), atol=1e-3)
    half = Cond(labels=torch.where(torch.arange(12) < 6, cond.labels, -1))
    found, plain = (d(x, sigma, half) for d in (ClassifierGuidance(TOY, bayes, 2.0), TOY))
    assert torch.equal(found[6:], plain[6:]) and not torch.allclose(found[:6], plain[:6])


def test_gradients_flow_through_a_classifier() -> None:
    """The Jacobian of the guided denoiser is that of the conditional one, Cov[x0 | x] / sigma^2."""
    x, _, cond = inputs()
    x.requires_grad_()
    guided = ClassifierGuidance(Unconditional(TOY), bayes, 1.0)(x, 0.7, cond)
    rows = [torch.autograd.grad(guided[:, i].sum(), x, retain_graph=True)[0] for i in range(2)]
    exact = TOY.covariance(x.detach(), 0.7, cond) / 0.7**2
    torch.testing.assert_close(torch.stack(rows, dim=1), exact, rtol=0, atol=1e-9)


def test_a_classifier_needs_labels_and_gradients() -> None:
    x, sigma, cond = inputs()
    guided = ClassifierGuidance(TOY, bayes, 1.5)
    for without in (None, Cond()):
        with refuses("guidance", 1.5, "labels"):
            guided(x, sigma, without)
    with torch.inference_mode(), refuses("no_grad", "inference_mode"):
        guided(x, sigma, cond)
    with refuses(-1.0):
        ClassifierGuidance(TOY, bayes, -1.0)


# ---- Thresholds ----


def identity(
    x: Tensor,
    sigma: Tensor | float,
    cond: Cond | None = None,
    *,
    position: Position | None = None,
    tape: Tape | None = None,
) -> Tensor:
    return x


def test_values_within_the_range_are_left_alone() -> None:
    x = images()[0].tanh()
    assert torch.equal(Clamped(identity)(x, 1.0), x)
    assert torch.equal(Thresholded(identity, 0.9)(x, 1.0), x)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_threshold(quantile: float) -> None:
    x = 3 * images()[0]
    found = Thresholded(identity, quantile)(x, 1.0)
    for image, result in zip(x, found, strict=True):
        size = image.abs().flatten().sort().values
        limit = max(1.0, float(size[math.ceil(quantile * len(size)) - 1]))
        expected = image.clip(-limit, limit) / limit
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-15)
        assert float((image.abs() <= limit).double().mean()) >= quantile
    assert float(found.abs().max()) == 1.0
    assert not torch.allclose(found, x.clamp(-1, 1))
    assert torch.equal(Clamped(identity)(x, 1.0), x.clamp(-1, 1))


@pytest.mark.parametrize("quantile", [0.0, 1.01, -1.0, math.nan])
def test_impossible_quantiles_are_refused(quantile: float) -> None:
    with refuses(quantile):
        Thresholded(TOY, quantile)


# ---- Nested ----


def test_orders_that_mean_the_same() -> None:
    x, sigma, cond = inputs()
    a, b = TOY, spikes_in_the_plane()
    left = CFG(AutoGuidance(a, b, 1.7), 2.5)(x, sigma, cond)
    right = AutoGuidance(CFG(a, 2.5), CFG(b, 2.5), 1.7)(x, sigma, cond)
    torch.testing.assert_close(left, right, rtol=0, atol=1e-11)
    left = CFG(ClassifierGuidance(a, bayes, 0.4), 2.5)(x, sigma, cond)
    right = ClassifierGuidance(CFG(a, 2.5), bayes, 0.4 * 2.5)(x, sigma, cond)
    torch.testing.assert_close(left, right, rtol=0, atol=1e-11)


def spikes_in_the_plane() -> GaussianMixture:
    means = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.5]], dtype=torch.float64)
    return GaussianMixture(means, 0.3 * torch.eye(2).double().expand(3, 2, 2))


def test_orders_that_differ() -> None:
    x, sigma, cond = inputs()
    outside = Clamped(CFG(TOY, 5.0))(x, sigma, cond)
    inside = CFG(Clamped(TOY), 5.0)(x, sigma, cond)
    assert float(outside.abs().max()) == 1.0 < float(inside.abs().max())
    given, null = TOY(x, sigma, cond).clamp(-1, 1), TOY(x, sigma).clamp(-1, 1)
    torch.testing.assert_close(inside, null + 5 * (given - null), rtol=0, atol=1e-12)


def test_coordinates_inside_or_outside() -> None:
    """A network under guidance and `PatchDenoiser`, in both orders."""
    inner = tiny.pipeline().model.denoiser
    guide = tiny.pipeline().model.denoiser
    tiny.randomize(guide, seed=1)
    x, cond = torch.full((2, 3, 6, 6), 0.3), Cond(labels=torch.tensor([0, 2]))

    def place(denoiser: Denoiser) -> PatchDenoiser:
        return PatchDenoiser(denoiser, tiny.CANVAS, (1, 2))

    a = place(Clamped(AutoGuidance(CFG(inner, 2.0), guide, 1.5)))(x, 0.8, cond)
    b = Clamped(AutoGuidance(CFG(place(inner), 2.0), place(guide), 1.5))(x, 0.8, cond)
    assert torch.equal(a, b) and not torch.equal(a, place(inner)(x, 0.8, cond).clamp(-1, 1))


def test_every_call_within_an_evaluation_has_its_slot() -> None:
    x, _, cond = inputs()
    leaves = [Two() for _ in range(4)]
    first = AutoGuidance(leaves[0], leaves[1], 2.0)
    second = AutoGuidance(Clamped(leaves[2]), leaves[3], 2.0)
    AutoGuidance(first, second, 2.0)(x, 1.0, cond, position=STEP)
    steps = [leaf.steps[0] for leaf in leaves]
    assert [step.slot for step in steps if step] == [
        *itertools.product(("main", "guide"), repeat=2)
    ]
    assert all(step and (step.run, step.index) == (1, 2) for step in steps)


def test_the_tape_records_the_main_model() -> None:
    x, _, cond = inputs()
    tape = Tape(wants=("x",))
    ClassifierGuidance(Clamped(AutoGuidance(Two(), Two(), 2.0)), bayes, 1.0)(
        x, 1.0, cond, tape=tape
    )
    assert torch.equal(tape.activations["x"], x)


def test_edges_of_all_parts() -> None:
    auto = AutoGuidance(CFG(TOY, 2.0, interval=(0.1, 2.0)), CFG(TOY, 2.0, interval=(0.2, 3.0)), 2.0)
    assert set(discontinuities(PatchDenoiser(Clamped(auto), (4, 4)))) == {0.1, 2.0, 0.2, 3.0}
    other = ClassifierGuidance(Thresholded(auto), bayes, 1.0, interval=(0.0, 4.0))
    assert set(discontinuities(Unconditional(other))) == {0.1, 2.0, 0.2, 3.0, 4.0}
    assert discontinuities(ClassifierGuidance(TOY, bayes, 0.0, interval=(1.0, 2.0))) == ()
    assert discontinuities(AutoGuidance(TOY, auto, 1.0, interval=(1.0, 2.0))) == ()
    assert discontinuities(TOY) == discontinuities(tiny.pipeline().model.denoiser) == ()


def test_the_sampling_driver_passes_on_the_edges() -> None:
    seen: list[tuple[float, ...]] = []

    class Spy(Heun):
        def move(self, step: Step, x: Tensor) -> Move:
            seen.append(discontinuities(step.denoiser))
            return super().move(step, x)

    config = SamplerConfig(
        solver=Spy(), steps=1, guidance=ClassifierFree(interval=(0.3, 2.0)), threshold=Clamp()
    )
    cond = Cond(labels=torch.tensor([0]))
    sample(Two(), seeds=[0], channels=1, canvas=(4, 4), cond=cond, config=config)
    assert seen == [(0.3, 2.0)]


@pytest.mark.slow
def test_guidance_compiles_into_one_graph() -> None:
    x, cond = images()
    guided = CFG(Two(), 3.0, interval=(0.3, 2.0), rescale=0.5, channels=2)
    guided = Thresholded(AutoGuidance(guided, Clamped(Two(0.7)), 2.0), 0.9)
    compiled = torch.compile(guided.__call__, fullgraph=True, backend="eager")
    for sigma in (1.0, 5.0, torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)):
        torch.testing.assert_close(compiled(x, sigma, cond), guided(x, sigma, cond))
