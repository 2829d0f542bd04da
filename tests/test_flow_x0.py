"""Prediction of the image on the straight path (JiT), and the toy that it was made for."""

import math

import pytest
import torch
import torch.nn.functional as F
from commands import refuses
from oracles import batch, draws
from torch import Tensor, nn

from patchdiffusion import rng
from patchdiffusion.analytic import LowRankMixture
from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.losses import DenoisingLoss, denoising_error
from patchdiffusion.noise import LogitNormal
from patchdiffusion.parameterisation import EpsVP, FlowMatching, FlowX0, Parameterisation
from patchdiffusion.weighting import FlowWeight

TIMES = torch.tensor([0.001, 0.02, 0.039, 0.041, 0.06, 0.3, 0.9, 0.999], dtype=torch.float64)


class Constant(nn.Module):
    """A network that predicts the same everywhere."""

    def __init__(self, out: Tensor):
        super().__init__()
        self.out = out

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, **_: object) -> Tensor:
        return self.out.expand_as(x)


@pytest.mark.parametrize("least", [0.0, 0.04, 0.5])
def test_the_velocity_of_sampling_has_a_bounded_denominator(least: float) -> None:
    """(z - D) / t is (z - F) / max(t, least), and D is the prediction itself above `least`."""
    raw = rng.normal(rng.keys(0, "F", 0, torch.arange(1)), (3, 4), torch.float64)
    z = rng.normal(rng.keys(0, "z", 0, torch.arange(8)), (3, 4), torch.float64)
    t = TIMES[:, None, None]
    denoiser = NetDenoiser(Constant(raw), FlowX0(least_time=least))
    denoised = denoiser(z / (1 - t), TIMES / (1 - TIMES))
    expected = (z - raw) / t.clamp(min=least)
    assert torch.allclose((z - denoised) / t, expected, rtol=1e-9, atol=1e-9)


def test_the_loss_is_that_of_the_velocity_with_its_own_bound() -> None:
    """|F - x0|^2 / max(t, .05)^2, where the denoised image is the prediction."""
    sigma = (TIMES / (1 - TIMES))[TIMES > 0.04]
    x0, noise = (rng.normal(draws(5).keys(name), (2, 3), torch.float64) for name in ("x0", "n"))
    denoiser = NetDenoiser(Constant(torch.tensor(0.5, dtype=torch.float64)), FlowX0())
    found = FlowX0().default_weighting()(sigma) * denoising_error(
        denoiser, x0, noise, sigma, Cond()
    )
    time = (sigma / (1 + sigma)).clamp(min=0.05)
    expected = ((0.5 - x0).flatten(1) / time[:, None]).square().mean(1)
    assert torch.allclose(found, expected, rtol=1e-12)


def test_a_bound_of_zero_is_the_weight_of_the_velocity() -> None:
    sigma = TIMES / (1 - TIMES)
    assert torch.equal(FlowWeight(least_time=0.0)(sigma), FlowWeight()(sigma))
    bounded = FlowWeight(least_time=0.05)(sigma)
    assert torch.allclose(bounded, FlowWeight()(sigma).clamp(max=400.0), rtol=1e-12)


def test_the_published_law_prefers_noise() -> None:
    """The logit of the data's share of z ~ N(-.8, .8): that of the noise has the other sign."""
    law = FlowX0().default_noise()
    assert law == LogitNormal(mean=0.8, std=0.8)
    half = law.icdf(torch.tensor([0.5], dtype=torch.float64))
    assert float(half.log()) == pytest.approx(0.8)


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_impossible_bounds_are_refused(value: float) -> None:
    for kind in (FlowX0, FlowWeight):
        with refuses("least_time", value):
            kind(least_time=value)


# ---- Data of two dimensions in a space of many (arXiv 2511.13720, figure 4) ----

SPACE, HIDDEN, STEPS = 256, 64, 300


class Narrow(nn.Module):
    """An MLP with fewer hidden units than the space has dimensions: noise does not fit through."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList(
                nn.Linear(cin, cout)
                for cin, cout in ((SPACE + 2, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, SPACE))
            )

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, **_: object) -> Tensor:
        turn = noise[:, None] / 1000 * math.pi / 2
        h = torch.cat([x * SPACE**0.5 / 8, turn.sin(), turn.cos()], 1)
        for layer in self.layers[:-1]:
            h = F.relu(layer(h))
        return self.layers[-1](h)


def ring() -> LowRankMixture:
    """Eight Gaussians on a circle, in a plane of the space."""
    key = rng.keys(0, "plane", 0, torch.arange(SPACE))
    plane = torch.linalg.qr(rng.normal(key, (2,), torch.float64)).Q
    angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
    means = torch.stack([angles.cos(), angles.sin()], 1) @ plane.T
    return LowRankMixture(
        plane.expand(8, SPACE, 2), torch.full((8, 2), 0.01, dtype=torch.float64), means=means
    )


def error(precond: Parameterisation) -> float:
    """Mean squared error of the trained denoiser at flow times from .2 to .9, per data variance."""
    data, law = ring(), LogitNormal(mean=0.8, std=0.8)
    denoiser = NetDenoiser(Narrow(), precond)
    loss = DenoisingLoss(FlowWeight(least_time=0.05))
    optim = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    for step in range(STEPS):
        given = draws(128, step)
        x0 = data.sample(given.keys("data"))[0].float()
        optim.zero_grad()
        loss(denoiser, batch(x0, noise=law), given).per_sample.mean().backward()
        optim.step()
    key = rng.keys(0, "test", 0, torch.arange(1024))
    x0 = data.sample(key)[0]
    times = torch.linspace(0.2, 0.9, 1024, dtype=torch.float64)
    sigma = times / (1 - times)
    x = x0 + sigma[:, None] * rng.normal(key, (SPACE,), torch.float64)
    with torch.no_grad():
        off = denoiser(x, sigma) - data(x, sigma)
    return float(off.square().sum(1).mean())


def test_only_the_image_is_learned_through_a_narrow_network() -> None:
    """The exact denoiser is recovered by predictions of x0, not by those of eps or velocity."""
    found = {type(precond): error(precond) for precond in (FlowX0(), FlowMatching(), EpsVP())}
    assert found[FlowX0] < 0.1
    assert found[FlowMatching] > 10 * found[FlowX0] and found[EpsVP] > 10 * found[FlowX0]
