"""The sampling driver: seeds, batches, regions, classes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from commands import names, refuses
from oracles import Oracle
from torch import Tensor

from patchdiffusion import SamplerConfig, sample
from patchdiffusion.analytic import IdealDenoiser
from patchdiffusion.cond import Cond
from patchdiffusion.guidance.cfg import ClassifierFree
from patchdiffusion.patches import Size
from patchdiffusion.sampling.canvas import CanvasRegion
from patchdiffusion.sampling.driver import NotFinite, Start, noise_field
from patchdiffusion.solvers import Churn, Euler, Heun
from patchdiffusion.solvers.schedules import Karras
from patchdiffusion.system.png import to_uint8

CANVAS = tiny.CANVAS
FAST = SamplerConfig(steps=3)
CHURNED = replace(FAST, solver=Heun(churn=Churn(amount=20.0)))
FIVE = range(40, 45)


def place_of(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
    """Every pixel is its own coordinate, whatever the noise."""
    assert cond.pos is not None
    return torch.cat([cond.pos, torch.zeros_like(cond.pos[:, :1])], dim=1).to(x.dtype)


def blend_of(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
    """It depends on every pixel by itself."""
    assert cond.pos is not None
    return 0.3 * torch.tanh(x) + 0.1 * cond.pos.sum(1, keepdim=True).to(x.dtype)


place, blend = Oracle(place_of), Oracle(blend_of)


# ---- Noise ----


def test_noise_is_standard_normal() -> None:
    x = noise_field(torch.arange(50), 3, (0, 0), (24, 24)).double()
    assert x.mean().item() == pytest.approx(0.0, abs=0.01)
    assert x.var().item() == pytest.approx(1.0, abs=0.01)
    assert x.flatten(1).var(1).std().item() < 0.1
    for a, b in ((x[:, :, 1:], x[:, :, :-1]), (x[..., 1:], x[..., :-1]), (x[1:], x[:-1])):
        assert (a * b).mean().item() == pytest.approx(0.0, abs=0.01)
    assert (x[:, 0] * x[:, 1]).mean().item() == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize("corner", [(7,), (0, 0), (-3, 5), (100, -40), (2, -3, 5), (1, 2, 3, 4)])
def test_regions_of_a_seed_agree_where_they_overlap(corner: Size) -> None:
    seeds = torch.tensor([3, 2**40])
    large = noise_field(seeds, 2, tuple(c - 2 for c in corner), (7,) * len(corner))
    small = noise_field(seeds, 2, corner, (4,) * len(corner))
    assert torch.equal(large[(..., *(slice(2, 6) for _ in corner))], small)
    assert large.unique().numel() > 0.99 * large.numel()


def test_noise_depends_on_the_seed_alone() -> None:
    seeds = torch.tensor([5, 9, 5])
    x = noise_field(seeds, 1, (0, 0), (6, 6))
    assert torch.equal(x[0], x[2]) and not torch.equal(x[0], x[1])
    assert torch.equal(x[1:2], noise_field(seeds[1:2], 1, (0, 0), (6, 6)))


# ---- Batches ----


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("config", [FAST, CHURNED, replace(FAST, solver=Euler())])
def test_any_batches_are_bit_equal_with_an_oracle(batch: int, config: SamplerConfig) -> None:
    def draw(size: int) -> Tensor:
        return sample(blend, seeds=FIVE, channels=3, canvas=CANVAS, config=config, batch=size)

    assert torch.equal(draw(batch), draw(5))
    one = sample(blend, seeds=[42], channels=3, canvas=CANVAS, config=config)
    assert torch.equal(one[0], draw(batch)[2])


@pytest.mark.parametrize("config", [FAST, CHURNED, replace(FAST, guidance=ClassifierFree())])
def test_any_batches_are_close_with_a_network(config: SamplerConfig) -> None:
    pipe = tiny.pipeline()
    labels = torch.tensor([0, 1, 2, -1, 0])

    def draw(size: int) -> Tensor:
        return sample(
            pipe.model.denoiser,
            seeds=FIVE,
            channels=3,
            canvas=CANVAS,
            cond=Cond(labels=labels),
            config=config,
            batch=size,
        )

    expected = draw(5)
    for size in (1, 2):
        torch.testing.assert_close(
            draw(size), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
        )
    assert not torch.allclose(expected[0], expected[4])


def test_the_same_seed_gives_the_same_image() -> None:
    pipe = tiny.pipeline()
    before = torch.get_rng_state()
    a = pipe.sample(4, seed=10, config=FAST)
    b = pipe.sample(2, seed=12, config=FAST, classes=[2, 0])
    assert a.dtype == np.uint8 and a.shape == (4, *CANVAS, 3)
    assert (a == pipe.sample(4, seed=10, config=FAST)).all()
    assert abs(a[2:].astype(int) - b).max() <= 1
    assert not (a == pipe.sample(4, seed=11, config=FAST)).all()
    assert torch.equal(before, torch.get_rng_state())


def test_churn_changes_the_image() -> None:
    images = [
        sample(blend, seeds=[1], channels=3, canvas=CANVAS, config=c) for c in (FAST, CHURNED)
    ]
    assert not torch.allclose(images[0], images[1])


def test_progress_counts_images() -> None:
    told: list[int] = []
    sample(blend, seeds=FIVE, channels=1, canvas=(4, 4), config=FAST, batch=2,
           progress=told.append)  # fmt: skip
    assert told == [2, 2, 1]


def test_no_gradients_and_any_precision() -> None:
    def check(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        assert x.dtype == torch.float64 and not torch.is_grad_enabled()
        return blend_of(x, sigma, cond)

    out = sample(
        Oracle(check), seeds=[0], channels=3, canvas=CANVAS, config=FAST, dtype=torch.float64
    )
    assert out.dtype == torch.float32
    single = sample(blend, seeds=[0], channels=3, canvas=CANVAS, config=FAST)
    torch.testing.assert_close(out, single, rtol=0, atol=1e-3)


def test_an_ideal_denoiser_gives_back_its_images() -> None:
    known = torch.from_numpy(np.stack([tiny.picture(n, 8) for n in range(5)]))
    clean = known.movedim(-1, 1).double() / 127.5 - 1
    images = sample(IdealDenoiser(clean), seeds=range(6), channels=3, canvas=(8, 8),
                    dtype=torch.float64)  # fmt: skip
    for image in to_uint8(images):
        assert min(abs(image.astype(int) - k.astype(int)).max() for k in known.numpy()) == 0


# ---- Conditions and starts ----


@pytest.mark.parametrize("batch", [2, 64])
def test_any_condition_is_handed_down_in_parts(batch: int) -> None:
    """A pooled embedding here; each image has its own row of it."""

    def told(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        assert cond.extra is not None and cond.pos is not None
        return cond.extra[:, :, None, None].to(x).expand_as(x)

    extra = torch.linspace(-1, 1, 5)[:, None]
    images = sample(Oracle(told), seeds=FIVE, channels=1, canvas=(2, 3), cond=Cond(extra=extra),
                    config=FAST, batch=batch)  # fmt: skip
    torch.testing.assert_close(images, extra[:, :, None, None].expand(5, 1, 2, 3))


def test_a_start_is_where_the_solver_begins() -> None:
    seen: list[tuple[float, Tensor]] = []

    def watched(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        seen.append((float(sigma[0]), x))
        return blend_of(x, sigma, cond)

    def begun(start: Start, batch: int = 64) -> Tensor:
        seen.clear()
        return sample(Oracle(watched), seeds=FIVE, channels=3, canvas=CANVAS, config=FAST,
                      start=start, batch=batch)  # fmt: skip

    x = torch.linspace(-1, 1, 5 * 3 * 8 * 12).reshape(5, 3, *CANVAS)
    noised = begun(Start(x, 0.7))
    noise = noise_field(torch.tensor(list(FIVE)), 3, (0, 0), CANVAS)
    assert seen[0][0] == pytest.approx(0.7)
    torch.testing.assert_close(seen[0][1], x + 0.7 * noise)
    assert torch.equal(begun(Start(x + 0.7 * noise, 0.7, fresh=False)), noised)
    assert torch.equal(begun(Start(x, 0.7), batch=2), noised)


def test_a_start_that_does_not_fit() -> None:
    x = torch.zeros(2, 3, *CANVAS)

    def draw(count: int, config: SamplerConfig) -> Tensor:
        return sample(blend, seeds=range(count), channels=3, canvas=CANVAS, config=config,
                      start=Start(x, 0.7))  # fmt: skip

    with refuses(3, 2):
        draw(3, FAST)
    with refuses("sigma_max", 5, 0.7):
        draw(2, replace(FAST, sigma_max=5.0))


# ---- Regions ----


def region(size: tuple[int, int] | None, corner: tuple[int, int] | None) -> SamplerConfig:
    return replace(FAST, canvas=CanvasRegion(size=size, corner=corner))


def shown(size: tuple[int, int] | None, corner: tuple[int, int] | None) -> Tensor:
    return sample(place, seeds=[0], channels=3, canvas=CANVAS, config=region(size, corner))[0, :2]


def test_the_whole_canvas_has_its_corners_at_one() -> None:
    whole = shown(None, None)
    assert whole.shape == (2, *CANVAS)
    assert whole[:, 0, 0].tolist() == [-1.0, -1.0]
    assert whole[:, -1, -1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("size", "corner"), [((4, 4), (0, 0)), ((3, 5), (5, 7)), ((1, 1), (2, 3))])
def test_a_region_is_that_part_of_the_canvas(
    size: tuple[int, int], corner: tuple[int, int]
) -> None:
    top, left = corner
    expected = shown(None, None)[:, top : top + size[0], left : left + size[1]]
    torch.testing.assert_close(shown(size, corner), expected, rtol=0, atol=1e-6)


def test_a_larger_canvas_lies_around_the_trained_one() -> None:
    large = shown((16, 20), None)
    torch.testing.assert_close(large[:, 4:12, 4:16], shown(None, None), rtol=0, atol=1e-6)
    assert large[1, 0, 0].item() == pytest.approx(-1 - 4 * 2 / 7, rel=1e-5)
    assert large[0, 0, -1].item() == pytest.approx(1 + 4 * 2 / 11, rel=1e-5)


def test_a_smaller_region_is_in_the_middle() -> None:
    torch.testing.assert_close(shown((4, 6), None), shown((4, 6), (2, 3)), rtol=0, atol=0)


def test_overlapping_regions_of_a_pixelwise_denoiser_agree() -> None:
    """The noise belongs to the place, so a region is a cut-out of the larger image."""
    config = region((20, 20), (-6, -4))
    a = sample(blend, seeds=FIVE, channels=3, canvas=CANVAS, config=config)
    b = sample(blend, seeds=FIVE, channels=3, canvas=CANVAS, config=FAST)
    torch.testing.assert_close(a[:, :, 6:14, 4:16], b, rtol=0, atol=1e-6)


def test_regions_of_a_model() -> None:
    pipe = tiny.pipeline()
    assert pipe.sample(1, config=region((5, 7), (1, 1))).shape == (1, 5, 7, 3)
    assert pipe.sample(1, config=region((20, 16), None)).shape == (1, 20, 16, 3)


def test_every_trajectory_has_a_number_and_its_seeds() -> None:
    denoiser = Oracle(lambda x, sigma, cond: torch.zeros_like(x))
    config = SamplerConfig(solver=Euler(), steps=2)
    sample(denoiser, seeds=[5, 6, 7], channels=1, canvas=(4, 4), config=config, batch=2)
    seen = [step for step in denoiser.steps if step]
    runs = [step.run for step in seen]
    assert runs[0] == runs[1] != runs[2] == runs[3]
    assert [s.seeds.tolist() for s in seen if s.seeds is not None] == [[5, 6], [5, 6], [7], [7]]


# ---- Images that are not finite ----


def test_images_that_are_not_finite_are_an_error_with_step_and_settings() -> None:
    def burst(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        return torch.full_like(x, float("nan")) if float(sigma.max()) < 5 else 0 * x

    config = SamplerConfig(solver=Euler(), steps=4, schedule=Karras(rho=3.0))
    levels = config.sigmas()
    first = next(i for i, sigma in enumerate(levels.tolist()) if sigma < 5) + 1
    with pytest.raises(NotFinite) as caught:
        sample(Oracle(burst), seeds=FIVE, channels=3, canvas=CANVAS, config=config, batch=2)
    assert names(str(caught.value), f"step {first} of 4", "schedule.rho", "7.0 -> 3.0", "steps")
    assert caught.value.code == 21 and len(caught.value.images) == 2


@pytest.mark.parametrize("config", [FAST, CHURNED])
def test_one_image_that_is_not_finite_is_enough(config: SamplerConfig) -> None:
    def one(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        denoised = 0 * x
        denoised[-1, 0, 0, 0] = float("inf")
        return denoised

    with pytest.raises(NotFinite, match="step 1 of 3"):
        sample(Oracle(one), seeds=FIVE, channels=3, canvas=CANVAS, config=config)


def test_impossible_numbers_of_a_sampler_are_refused() -> None:
    for value in (math.inf, math.nan):
        with refuses("weight", value):
            SamplerConfig(guidance=ClassifierFree(weight=value))
        with refuses("amount"):
            Churn(amount=value)
        with refuses("sigma_max", value):
            SamplerConfig(sigma_max=value)
    for rho in (1e30, 1e-3):
        with refuses("rho", "different"):
            SamplerConfig(schedule=Karras(rho=rho))
    with refuses("sigma_max", "2^63", "1e+30"):
        SamplerConfig(sigma_max=1e30)
