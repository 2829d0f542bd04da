"""BOOT: its step on Gaussians, its loss by hand, and what it never looks at."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import refuses
from oracles import MEAN, STD, Exact, Little, Two, batch, draws, gaussian, normal
from torch import Tensor

from patchdiffusion import recipes
from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.objectives.boot import BootConfig, BootLoss, Signal, SignalMap
from patchdiffusion.parameterisation import EDM, X0, EpsVP, FlowMatching
from patchdiffusion.paths import per_sample
from patchdiffusion.solvers import euler, solve

LARGEST = 80.0


def exact_y(eps: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
    """The signal of the Gaussian: x_sigma - sigma eps on the trajectory from 80 eps."""
    x = Exact()(LARGEST * eps, torch.full_like(sigma, LARGEST).double(), sigma.double())
    return (x - per_sample(sigma, x) * eps).to(eps)


EXACT: Any = exact_y


def steps_to(config: BootConfig, count: int, *, heun: bool) -> float:
    """Error of the signal at the end after so many steps of the target from the exact start."""
    loss, eps = BootLoss(config=config, teacher=gaussian()), normal(50)
    levels = config.levels.at(torch.arange(count, -1, -1), count + 1).double()
    y = torch.zeros_like(eps)
    for t, s in itertools.pairwise(levels):
        t, s = (level.expand(50) for level in (t, s))
        y = loss.target(y, eps, t, s, torch.zeros(50).bool(), Cond(), heun=heun)
    start = (Exact()(LARGEST * eps, LARGEST, levels[-1]) - levels[-1] * eps) - y
    return float(start.abs().max())


def test_its_steps_lead_to_the_end_of_the_path_in_first_and_second_order() -> None:
    config = BootConfig(sigma_min=0.02)
    for heun, order in ((False, 2), (True, 4)):
        coarse, fine = (steps_to(config, count, heun=heun) for count in (200, 400))
        assert coarse / fine == pytest.approx(order, rel=0.1), heun
    assert steps_to(config, 400, heun=True) < steps_to(config, 400, heun=False) / 20


def test_a_step_is_one_of_euler() -> None:
    eps, teacher = normal(20), gaussian()
    t, s = (torch.full((20,), level, dtype=torch.float64) for level in (3.0, 1.2))
    x = normal(20, stream="x") * 3
    loss = BootLoss(config=BootConfig(), teacher=teacher)
    y = loss.target(x - 3 * eps, eps, t, s, torch.zeros(20).bool(), Cond(), heun=False)
    expected = solve(euler, teacher, x, torch.tensor([3.0, 1.2], dtype=torch.float64))
    torch.testing.assert_close(y + 1.2 * eps, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("progress", "power"), [(0.0, 2), (1.0, 3)])
def test_the_exact_signal_has_an_error_of_the_order_of_a_step(progress: float, power: int) -> None:
    """Of the squared second (third) power of delta, before it is divided by delta squared."""
    errors = []
    for delta in (0.04, 0.02):
        config = BootConfig(delta=delta, boundary=0.0)
        loss = BootLoss(config=config, teacher=gaussian())
        out = loss(EXACT, batch(normal(400), progress=progress), draws(400))
        errors.append(float(out.per_sample.mean()) * delta**2)
    assert errors[0] / errors[1] == pytest.approx(4**power, rel=0.35)


def test_the_map_with_the_exact_signal_is_exact() -> None:
    flow_map = SignalMap(y=EXACT)
    z = LARGEST * normal(30)
    for s in (0.0, 0.5, 10.0):
        expected = Exact()(z, LARGEST, max(s, 0.002)) + (s - max(s, 0.002)) * z / LARGEST
        torch.testing.assert_close(flow_map(z, LARGEST, s), expected, rtol=0, atol=1e-9)
    assert flow_map.times(1).tolist() == [LARGEST, 0]
    with refuses("boot", 2, "--steps 1"):
        flow_map.times(2)
    with refuses("boot", 80):
        flow_map(z, 10.0, 0.0)


# ---- The loss ----


def test_no_image_is_looked_at() -> None:
    """The images are on a device without values: to read one would raise."""
    images = torch.empty(6, 1, 2, 2, device="meta")
    loss = BootLoss(config=BootConfig(), teacher=gaussian((1, 2, 2)))
    student = NetDenoiser(Little(), Signal(base=EDM()))
    out = loss(student, replace(batch(torch.zeros(6, 1, 2, 2)), images=images), draws(6))
    assert bool(out.per_sample.isfinite().all())
    with pytest.raises(Exception, match="meta"):
        _ = images + torch.zeros(1)


@pytest.mark.parametrize("progress", [0.0, 0.9])
def test_the_loss_by_hand(progress: float) -> None:
    config, teacher = BootConfig(boundary=0.3, beta=2.0), gaussian((1, 2, 2))
    network = Little()
    student = NetDenoiser(network, Signal(base=EDM()))
    cond = Cond(labels=torch.arange(16) % 2 - 1, seed=torch.arange(16))
    eps = draws(16).normal("noise", (1, 2, 2))
    out = BootLoss(config=config, teacher=teacher)(
        student, batch(torch.zeros(16, 1, 2, 2), cond, progress), draws(16)
    )
    assert [c.seed is None for c in network.calls] == [True, False]  # no dropout in the target
    assert all(c.labels is not None for c in network.calls)

    u = 0.04 + 0.96 * draws(16).stratified("sigma")
    t, s = config.levels.at(u, 2), config.levels.at(u - 0.04, 2)
    edge = draws(16).bernoulli("boundary", 0.3)
    assert 0 < int(edge.sum()) < 16
    for row in range(16):
        noise, one = eps[row : row + 1], replace(cond.take(slice(row, row + 1)), seed=None)
        if edge[row]:
            goal, weight = teacher(LARGEST * noise, LARGEST), 2.0 / 0.3
            found = student(noise, torch.tensor([LARGEST]), one)
        else:
            high, low = t[row : row + 1], s[row : row + 1]
            y = student(noise, high, one)
            kappa = 1 - low / high
            estimate = teacher(y + high * noise, high)
            if progress >= 0.5:
                end = y + kappa * (estimate - y)
                estimate = (estimate + teacher(end + low * noise, low)) / 2
            goal, weight = y + kappa * (estimate - y), 1 / (0.04**2 * 0.7)
            found = student(noise, low, one)
        expected = weight * (found - goal).square().mean()
        torch.testing.assert_close(out.per_sample[row], expected, rtol=2e-5, atol=1e-6)


def test_gradients_reach_the_student_by_the_later_level_only() -> None:
    student = NetDenoiser(Little(), Signal(base=EDM()))
    loss = BootLoss(config=BootConfig(), teacher=gaussian((1, 2, 2)))
    loss(student, batch(torch.zeros(8, 1, 2, 2)), draws(8)).per_sample.sum().backward()
    assert student.network.get_parameter("mix").grad is not None


def test_guidance_leads_away_from_no_class() -> None:
    cond = Cond(labels=torch.zeros(5, dtype=torch.int64))
    x, sigma = normal(5), torch.full((5,), 2.0).double()
    teacher: Any = Two()
    one, two, none = (
        BootLoss(config=BootConfig(guidance=w), teacher=teacher).estimate(x, sigma, cond)
        for w in (1.0, 2.5, 0.0)
    )
    torch.testing.assert_close(two, none + 2.5 * (one - none), rtol=0, atol=1e-12)
    assert not torch.equal(one, none)
    teacher.batches.clear()
    BootLoss(config=BootConfig(), teacher=teacher).estimate(x, sigma, cond)
    assert len(teacher.batches) == 1  # without guidance one evaluation


# ---- The student ----


@pytest.mark.parametrize("base", [EDM(), EDM(sigma_data=1.0), FlowMatching(), X0()])
def test_the_weights_of_the_teacher_are_right_at_pure_noise(base: Any) -> None:
    """y(eps, sigma_max) is D(sigma_max eps, sigma_max), for any sampler-independent reason."""
    network, eps = Little(), normal(6, (1, 3, 3)).float()
    student, teacher = NetDenoiser(network, Signal(base=base)), NetDenoiser(network, base)
    found, expected = student(eps, LARGEST), teacher(LARGEST * eps, LARGEST)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    scales = Signal(base=base).scales(torch.tensor([0.5]))
    assert torch.equal(scales.noise, base.scales(torch.tensor([0.5])).noise)
    inner = (per_sample(scales.inner, eps) * eps).float()
    raw = network(inner, scales.noise.expand(6), Cond())
    torch.testing.assert_close(student(eps, 0.5), scales.denoised(eps, raw))


def test_what_it_brings_and_what_it_refuses(images: Path) -> None:
    config = recipes.with_objective(tiny.config(images), "boot")
    assert config.preview.sample_steps == 1 and not config.network.jump
    denoiser = NetDenoiser(config.network.build(), EDM())
    assert isinstance(config.objective.product(denoiser), SignalMap)
    with refuses("boot", "EpsVP", "edm"):
        replace(config, precond=EpsVP())
    with refuses("guidance", 2.0):
        free = replace(tiny.NETWORK, num_classes=0)
        replace(config, network=free, objective=BootConfig(guidance=2.0))
    wrong: list[dict[str, Any]] = [
        {"delta": 0.0}, {"delta": 0.6}, {"heun": 2.0}, {"boundary": 1.0}, {"beta": -1.0},
        {"guidance": -1.0}, {"sigma_min": 90.0}, {"rho": 0.0},
    ]  # fmt: skip
    for changes in wrong:
        with pytest.raises(ValueError, match=str(next(iter(changes.values())))):
            BootConfig(**changes)


def test_moments_of_the_oracle() -> None:
    """One jump of the exact signal gives the Gaussian."""
    images = SignalMap(y=EXACT)(LARGEST * normal(20_000), LARGEST, 0.0)
    assert float(images.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(images.std()) == pytest.approx(STD, abs=0.02)
