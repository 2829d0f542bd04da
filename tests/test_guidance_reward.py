"""Guidance by rewards and measurements, on Gaussians where what it aims at is known exactly."""

import math
from functools import cache, partial

import pytest
import tiny
import torch
from commands import refuses
from oracles import Oracle
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.analytic import GaussianMixture, LowRankMixture
from patchdiffusion.cond import Cond, Position, Tape
from patchdiffusion.denoiser import Denoiser, NetDenoiser, PatchDenoiser, discontinuities
from patchdiffusion.guidance.cfg import CFG
from patchdiffusion.guidance.classifier import ClassifierGuidance
from patchdiffusion.guidance.reward import GradientGuidance, Measurement, Tilt, gradient
from patchdiffusion.guidance.threshold import Thresholded
from patchdiffusion.nets import unet
from patchdiffusion.nets.unet import SongUNet
from patchdiffusion.parameterisation import EDM
from patchdiffusion.solvers import crossings, heun, solve
from patchdiffusion.solvers.schedules import karras

TOY = GaussianMixture.toy()
MEAN = torch.tensor([0.2, -0.4], dtype=torch.float64)
COV = torch.tensor([[1, 0.6], [0.6, 0.5]], dtype=torch.float64)
GAUSSIAN = GaussianMixture(MEAN[None], COV[None])
CENTERED = GaussianMixture(torch.zeros(1, 2), COV[None])
H = torch.tensor([1, 0.5], dtype=torch.float64)
WEIGHT = torch.tensor([0.5, -0.3, 0.2, 0.4, -0.1, 0.3, 0.6, -0.2], dtype=torch.float64)


def keys(count: int) -> Tensor:
    return rng.keys(0, "x", 0, torch.arange(count))


def noisy(dim: int, count: int = 30) -> tuple[Tensor, Tensor]:
    """x [B, dim] at levels from 0.01 to 80."""
    sigma = 10 ** torch.linspace(-2, 1.9, count, dtype=torch.float64)
    return rng.normal(keys(count), (dim,), torch.float64) * (1 + sigma[:, None]), sigma


@cache
def plane() -> tuple[LowRankMixture, Tensor]:
    """Data on a plane in 8 dimensions, and its covariance."""
    random = rng.normal(rng.keys(1, "plane", 0, torch.arange(8)), (2,), torch.float64)
    basis = torch.linalg.qr(random).Q
    variance = torch.tensor([0.6, 0.3], dtype=torch.float64)
    return LowRankMixture(basis[None], variance[None]), (basis * variance) @ basis.mT


def linear(x: Tensor) -> Tensor:
    return x @ WEIGHT[: x.shape[1]]


def samples(denoiser: Denoiser, dim: int, count: int, steps: int) -> Tensor:
    x = 80 * rng.normal(keys(count), (dim,), torch.float64)
    return solve(heun, denoiser, x, karras(steps))


# ---- Tilt ----


@pytest.mark.parametrize("scale", [0.5, 2.0, -3.0])
def test_tilt_of_a_gaussian_is_the_gaussian_with_a_moved_mean(scale: float) -> None:
    """p(x0) exp(scale <g, x0>) = N(m + scale C g, C), at every noise level."""
    x, sigma = noisy(2)
    moved = GaussianMixture((MEAN + scale * COV @ WEIGHT[:2])[None], COV[None])
    with torch.no_grad():
        guided = GradientGuidance(GAUSSIAN, Tilt(linear), scale)(x, sigma)
    assert torch.allclose(guided, moved(x, sigma), rtol=0, atol=1e-12)
    assert not guided.requires_grad and not x.requires_grad


def test_tilt_stays_on_the_support_and_the_raw_gradient_does_not() -> None:
    """8 dimensions, data on a plane: the reward is scale g^T C g, and covariances stay."""
    law, cov = plane()
    x, sigma = noisy(8)
    off = torch.eye(8).double() - law.bases[0] @ law.bases[0].mT
    tilt = GradientGuidance(law, Tilt(linear), 2.0)
    raw = GradientGuidance(law, Tilt(linear), 2.0, jacobian=False)
    assert float(((tilt(x, sigma) - law(x, sigma)) @ off).abs().max()) < 1e-10
    change = raw(x, sigma) - law(x, sigma)
    assert torch.allclose(change, 2 * sigma[:, None] ** 2 * WEIGHT, rtol=1e-9)
    assert float((change @ off).abs().max()) > 1
    exact = float(2 * WEIGHT @ cov @ WEIGHT)
    end = samples(tilt, 8, 4000, 30)
    error = math.sqrt(exact / 2 / 4000)  # of the mean reward
    assert float(linear(end).mean()) == pytest.approx(exact, abs=4 * error + 0.01 * exact)
    assert float((end.T.cov() - cov).abs().max()) < 0.03
    assert float(linear(samples(raw, 8, 100, 30)).mean()) > 50 * exact


def test_clipping_tames_the_raw_gradient() -> None:
    law, cov = plane()
    raw = GradientGuidance(law, Tilt(linear), 2.0, jacobian=False, clip=0.1)
    assert float(linear(samples(raw, 8, 100, 30)).mean()) < 10 * float(2 * WEIGHT @ cov @ WEIGHT)


# ---- Measurements ----


def conditional(rows: Tensor, value: Tensor, noise: float) -> GaussianMixture:
    """N(MEAN, COV) given value = rows x0 + noise, by the covariance of both together."""
    joint = torch.block_diag(COV, noise**2 * torch.eye(len(rows)).double())
    see = torch.cat([rows, torch.eye(len(rows)).double()], dim=1)
    cross, total = joint @ see.mT, see @ joint @ see.mT
    both = torch.cat([MEAN, torch.zeros(len(rows))])
    mean = both + cross @ torch.linalg.inv(total) @ (value - see @ both)
    cov = joint - cross @ torch.linalg.inv(total) @ cross.mT
    return GaussianMixture(mean[None, :2], cov[None, :2, :2])


@pytest.mark.parametrize("rows", [[[1, 0.5]], [[1, 0.5], [-0.3, 2]]], ids=["one", "two"])
def test_measurement_of_a_gaussian_is_the_conditional_gaussian(rows: list[list[float]]) -> None:
    matrix = torch.tensor(rows, dtype=torch.float64)
    value = torch.tensor([2.0, -1.0][: len(rows)], dtype=torch.float64)
    guide = Measurement(measure=lambda x: x @ matrix.mT, value=value, noise=0.3)
    x, sigma = noisy(2)
    exact = conditional(matrix, value, 0.3)(x, sigma)
    guided = GradientGuidance(GAUSSIAN, guide)(x, sigma)
    assert torch.allclose(guided, exact, rtol=0, atol=1e-10)


def test_samples_of_a_measurement_and_of_dps() -> None:
    """Closed form and published values; DPS, which drops the covariance, must differ."""
    guide = Measurement(measure=lambda x: x @ H, value=2.0, noise=0.3)
    gain = COV @ H / (0.3**2 + H @ COV @ H)
    mean, cov = 2 * gain, COV - gain[:, None] * (H @ COV)
    assert mean.tolist() == pytest.approx([1.4325, 0.9366], abs=1e-4)
    count = 20_000
    end = samples(GradientGuidance(CENTERED, guide), 2, count, 60)
    error = (cov.diag() / count).sqrt()
    assert bool(((end.mean(0) - mean).abs() < 4 * error + 0.005 * mean).all())
    assert end.T.cov().flatten().tolist() == pytest.approx(cov.flatten().tolist(), abs=0.003)
    biased = samples(GradientGuidance(CENTERED, Tilt(guide.logp)), 2, count, 60)
    assert biased.mean(0).tolist() == pytest.approx([1.590, 1.080], abs=0.01)
    assert biased.var(0).tolist() == pytest.approx([0.023, 0.078], abs=0.003)
    assert bool(((biased.mean(0) - mean).abs() > 20 * error).all())


def test_dps_is_the_gradient_of_the_likelihood_of_the_estimate() -> None:
    x, sigma = noisy(2)
    guide = Measurement(measure=lambda x: x @ H, value=2.0, noise=0.3)
    guided = GradientGuidance(TOY, Tilt(guide.logp), 0.7)(x, sigma)
    x = x.requires_grad_()
    loss = (2 - TOY(x, sigma) @ H).square().sum() / (2 * 0.3**2)
    (slope,) = torch.autograd.grad(loss, x)
    expected = TOY(x, sigma) - 0.7 * sigma[:, None] ** 2 * slope
    assert torch.allclose(guided, expected, rtol=1e-10)


def test_a_target_for_a_curved_reward_is_linearised_at_the_estimate() -> None:
    """D + C g (a - r) / (noise^2 + g^T C g), with the covariance of the oracle."""
    x, sigma = noisy(2)
    goal = torch.linspace(0.5, 1.5, 30, dtype=torch.float64)  # another one for each image
    guide = Measurement(measure=lambda x: x.square().sum(1), value=goal, noise=0.1)
    denoised, cov = TOY(x, sigma), TOY.covariance(x, sigma)
    slope = torch.einsum("bij,bj->bi", cov, 2 * denoised)
    spread = 0.1**2 + (2 * denoised * slope).sum(1)
    change = slope * ((goal - denoised.square().sum(1)) / spread)[:, None]
    guided = GradientGuidance(TOY, guide)(x, sigma)
    assert torch.allclose(guided, denoised + change, rtol=0, atol=1e-9)
    aimed = samples(GradientGuidance(TOY, guide), 2, 30, 60)
    assert float((aimed.square().sum(1) - goal).abs().mean()) < 0.15
    assert float((samples(TOY, 2, 30, 60).square().sum(1) - goal).abs().mean()) > 0.3


def test_values_of_another_shape_are_refused() -> None:
    x, sigma = noisy(2)
    for n in (30, 4):
        guide = Measurement(measure=lambda x: x @ H[:, None], value=torch.ones(n), noise=0.3)
        with refuses(f"[{n}]", "[30, 1]"):
            GradientGuidance(TOY, guide)(x, sigma)
    with refuses(0.0):
        Measurement(measure=linear, value=1.0, noise=0.0)


# ---- The denoiser around them ----


def test_neutral_settings_are_the_denoiser_bit_for_bit() -> None:
    x, sigma = noisy(2)
    kept: list[bool] = []

    def watched(x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        kept.append(torch.is_grad_enabled() and x.requires_grad)
        return TOY(x, sigma, cond)

    spy = Oracle(watched)
    step, tapes = Position(run=0, index=3, stage=1, sigmas=(1.0, 0.0)), [Tape() for _ in range(4)]
    with torch.no_grad():
        whole = GradientGuidance(spy, Tilt(linear), 0.0)
        low = GradientGuidance(spy, Tilt(linear), below=0.01)
        for guidance, tape in ((whole, tapes[0]), (low, tapes[1])):
            assert torch.equal(guidance(x, sigma, position=step, tape=tape), TOY(x, sigma))
        assert kept == [False] * 2
        GradientGuidance(spy, Tilt(linear))(x, 1.0, position=step, tape=tapes[2])
        GradientGuidance(spy, Tilt(linear), jacobian=False)(x, 1.0, position=step, tape=tapes[3])
        assert kept[2:] == [True, False]
        assert spy.steps == [step] * 4 and spy.tapes == tapes


def test_only_levels_below_are_guided() -> None:
    x, sigma = noisy(2)
    plain, guided = TOY(x, sigma), GradientGuidance(TOY, Tilt(linear))(x, sigma)
    some = GradientGuidance(TOY, Tilt(linear), below=1.0)(x, sigma)
    assert torch.equal(some, torch.where(sigma[:, None] < 1, guided, plain))
    assert not torch.equal(some, guided) and not torch.equal(some, plain)


def test_a_solver_forgets_where_guidance_begins() -> None:
    """Also if a level is `below` itself, which is not guided yet."""
    levels = torch.tensor([4.0, 2.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    for below, first in ((2.0, 2), (1.5, 2), (1.0, 3)):
        guided = GradientGuidance(TOY, Tilt(linear), below=below)
        assert crossings(levels, discontinuities(guided)) == {first}
    assert discontinuities(GradientGuidance(TOY, Tilt(linear), 0.0, below=1.0)) == ()
    assert discontinuities(GradientGuidance(TOY, Tilt(linear))) == ()


def test_clip_bounds_the_change_of_each_image() -> None:
    x, sigma = noisy(2)
    plain = TOY(x, sigma)
    change = GradientGuidance(TOY, Tilt(linear), 30.0)(x, sigma) - plain
    clipped = GradientGuidance(TOY, Tilt(linear), 30.0, clip=0.5)(x, sigma) - plain
    allowed = 0.5 * (x - plain).norm(dim=1)
    short = change.norm(dim=1) <= allowed
    assert 3 < int(short.sum()) < 27
    assert torch.allclose(clipped[short], change[short], rtol=1e-9)
    assert torch.allclose(clipped.norm(dim=1)[~short], allowed[~short], rtol=1e-9)
    assert torch.allclose(
        torch.nn.functional.cosine_similarity(clipped, change), torch.ones(30).double(), rtol=1e-7
    )


def test_nested_guidance_is_guidance_by_the_sum() -> None:
    """Exact for linear rewards of a Gaussian, and needs second derivatives elsewhere."""
    x, sigma = noisy(2)
    inner = GradientGuidance(GAUSSIAN, Tilt(lambda x: x @ H), 2.0)
    both = GradientGuidance(GAUSSIAN, Tilt(lambda x: 2 * x @ H + linear(x)))
    with torch.no_grad():
        nested = GradientGuidance(inner, Tilt(linear))(x, sigma)
        assert torch.allclose(nested, both(x, sigma), rtol=0, atol=1e-12)
    curved = Tilt(lambda x: x.square().sum(1))
    target = Measurement(measure=lambda x: x.pow(2), value=1.0, noise=0.5)
    for guide in (curved, target):
        guided = partial(GradientGuidance(TOY, guide, 0.3), sigma=0.8)
        torch.autograd.gradcheck(guided, x[:4].clone().requires_grad_())


def test_guides_a_network_with_coordinates_labels_and_low_precision() -> None:
    model = tiny.pipeline().model
    x = rng.normal(keys(4), (3, *tiny.CANVAS))
    cond = Cond(labels=torch.arange(4) % 2)

    def ink(x: Tensor) -> Tensor:
        return x.mean((1, 2, 3))

    def guided(denoiser: Denoiser) -> Denoiser:
        return GradientGuidance(denoiser, Tilt(ink), 300.0)

    patches = PatchDenoiser(model.denoiser, tiny.CANVAS)
    with torch.no_grad():
        plain = patches(x, 2.0, cond)
        images = guided(patches)(x, 2.0, cond)
        assert images.dtype == torch.float32
        # To first order the reward changes by scale sigma^2 |J^T grad r|^2 > 0.
        assert bool((ink(images) > ink(plain)).all())
        outside = PatchDenoiser(guided(model.denoiser), tiny.CANVAS)(x, 2.0, cond)
        assert torch.equal(images, outside)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not torch.equal(patches(x, 2.0, cond), plain)
            assert torch.equal(guided(patches)(x, 2.0, cond), images)
        free = guided(CFG(patches, 2.0))(x, 2.0, cond)
        assert bool((ink(free) > ink(CFG(patches, 2.0)(x, 2.0, cond))).all())
    assert all(p.grad is None for p in model.network.parameters())


def test_nests_around_a_network_with_attention() -> None:
    """Whose fused attention has no second derivative."""
    network = SongUNet(unet.tiny(16, base=8, channels=1, num_classes=3, mult=(1,), attention=(0,)))
    tiny.randomize(network)
    denoiser, cond = NetDenoiser(network, EDM()), Cond(labels=torch.tensor([0, 2]))
    x = rng.normal(rng.keys(0, "x", 0, torch.arange(2)), (1, 8, 8))
    inner = GradientGuidance(denoiser, Tilt(lambda x: x.mean(dim=(1, 2, 3))))
    square = Tilt(lambda x: x.square().mean(dim=(1, 2, 3)))
    nested = GradientGuidance(Thresholded(inner, 0.9), square)(x, 1.0, cond)
    assert nested.isfinite().all() and not torch.allclose(nested, inner(x, 1.0, cond))

    def classifier(x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
        return network(x, sigma, Cond()).flatten(1)[:, :3]

    outer = GradientGuidance(ClassifierGuidance(denoiser, classifier, 1.0), square)
    assert outer(x, 1.0, cond).isfinite().all()


def test_a_measurement_may_be_of_another_precision() -> None:
    def measure(dtype: torch.dtype) -> GradientGuidance:
        return GradientGuidance(
            TOY, Measurement(measure=lambda x: x[:, 0].to(dtype), value=0.5, noise=0.1)
        )

    x, sigma = noisy(2)
    found = measure(torch.float64)(x.float(), sigma.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, measure(torch.float32)(x.float(), sigma.float()))


def test_gradient_of_a_reward() -> None:
    x, _ = noisy(2)
    with torch.no_grad():
        slope = gradient(lambda x: (x**3).sum(1), x)
    assert torch.allclose(slope, 3 * x**2) and not slope.requires_grad


def test_what_cannot_work_is_refused() -> None:
    x, sigma = noisy(2)
    for reward, message in (
        (lambda x: x, r"one number per image, \[30\], not \[30, 2\]"),
        (lambda x: x.sum(), r"one number per image, \[30\], not \[\]"),
        (lambda x: (x > 0).double().sum(1), "no gradient; use steering"),
    ):
        with pytest.raises(ValueError, match=message):
            GradientGuidance(TOY, Tilt(reward))(x, sigma)
    with torch.inference_mode(), refuses("inference_mode"):
        GradientGuidance(TOY, Tilt(linear))(x, sigma)
    with refuses(math.nan):
        GradientGuidance(TOY, Tilt(linear), math.nan)
    for below, clip in ((0.0, 1.0), (1.0, -1.0)):
        with refuses("positive"):
            GradientGuidance(TOY, Tilt(linear), below=below, clip=clip)
