"""Consistency trajectory models on Gaussians."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import refuses
from oracles import Exact, Little, batch, draws, gaussian, normal
from torch import Tensor

from patchdiffusion import recipes
from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.losses import DenoisingLoss
from patchdiffusion.noise import LogNormal
from patchdiffusion.objectives.ctm import CTMConfig, TrajectoryLoss, TrajectoryMap
from patchdiffusion.objectives.discrete import Levels
from patchdiffusion.parameterisation import EDM, V
from patchdiffusion.paths import per_sample
from patchdiffusion.solvers.schedules import karras
from patchdiffusion.weighting import EDMWeight


def exact_g(x: Tensor, sigma: Tensor, cond: Cond | None = None, **_: object) -> Tensor:
    """g(x, t, s) of the exact map, (Psi - (s / t) x) / (1 - s / t); E[x0 | x] at span 0."""
    span = torch.zeros_like(sigma) if cond is None or cond.jump is None else cond.jump
    keep = per_sample(1 - span, x)
    jumped = (Exact()(x, sigma, sigma * (1 - span)) - keep * x) / (1 - keep)
    return torch.where(per_sample(span, x) == 0, gaussian()(x, sigma), jumped)


EXACT: Any = exact_g


def test_with_the_exact_g_it_is_the_exact_map() -> None:
    x, t = 3 * normal(6), torch.tensor([0.1, 0.5, 1.0, 3.0, 20.0, 80.0], dtype=torch.float64)
    flow_map = TrajectoryMap(g=EXACT)
    for share in (0.0, 0.3, 0.9):
        found = flow_map(x, t, share * t)
        torch.testing.assert_close(found, Exact()(x, t, share * t), rtol=0, atol=1e-12)
    assert torch.equal(flow_map(x, t, t), x)


def test_short_jumps_are_denoising() -> None:
    """g(x, t, s) -> E[x0 | x] linearly as s -> t."""
    x, sigma = normal(50), torch.ones(50, dtype=torch.float64)
    errors = []
    for gap in (1e-1, 1e-3, 1e-5):
        told = Cond(jump=torch.full((50,), gap, dtype=torch.float64))
        errors.append(float((exact_g(x, sigma, told) - gaussian()(x, sigma)).abs().max()))
    assert errors[0] < 0.1 and errors[1] / errors[0] == pytest.approx(0.01, rel=0.2)
    assert errors[2] / errors[1] == pytest.approx(0.01, rel=0.2)


def test_jumps_end_at_zero() -> None:
    times = TrajectoryMap(g=EXACT).times(3)
    assert times[-1] == 0 and torch.equal(times[:-1], karras(4)[:3])


def test_a_network_is_told_the_relative_length() -> None:
    network = Little()
    flow_map = TrajectoryMap(g=NetDenoiser(network, EDM()))
    flow_map(normal(2, (1, 3, 3)).float(), 4.0, 1.0, Cond(labels=torch.tensor([1, 2])))
    (cond,) = network.calls
    assert cond.jump is not None and cond.jump.tolist() == [0.75, 0.75]
    assert cond.labels is not None and cond.labels.tolist() == [1, 2]


# ---- The loss ----


def network(seed: int, trained: bool) -> NetDenoiser:
    return NetDenoiser(Little(seed).requires_grad_(trained), EDM())


def test_places_are_in_order() -> None:
    loss = TrajectoryLoss(config=CTMConfig(levels=9, steps=3), target=gaussian())
    t, u, s = loss.times(draws(5000))
    assert bool((t > u).all()) and bool((u >= s).all()) and bool((t - u <= 3).all())
    assert set(t.tolist()) == set(range(1, 9)) and set(s.tolist()) == set(range(8))
    assert set((t - u).tolist()) == {1, 2, 3}


def test_the_exact_g_has_no_trajectory_error() -> None:
    loss = TrajectoryLoss(
        config=CTMConfig(levels=161, steps=2, denoising=0.0), target=EXACT, teacher=gaussian()
    )
    out = loss(EXACT, batch(normal(64)), draws(64))
    wrong = loss(gaussian(), batch(normal(64)), draws(64))  # jumps as if it were Euler's rule
    assert float(out.per_sample.mean()) < 1e-6 < 1e-3 < float(wrong.per_sample.mean())


def test_the_loss_by_hand() -> None:
    own, target = network(0, True), network(1, False)
    x0, eps = normal(8, (1, 2, 2)).float(), draws(8).normal("noise", (1, 2, 2))
    cond = Cond(labels=torch.arange(8) % 2 - 1)
    loss = TrajectoryLoss(config=CTMConfig(levels=12), target=target, teacher=gaussian((1, 2, 2)))
    out = loss(own, batch(x0, cond), draws(8))

    t, u, s = (Levels().at(place, 12) for place in loss.times(draws(8)))
    wide = [per_sample(level, x0) for level in (t, u, s)]
    x = x0 + wide[0] * eps
    slope = (x - gaussian((1, 2, 2))(x, t)) / wide[0]
    ahead = x + (wide[1] - wide[0]) * slope
    second = (ahead - gaussian((1, 2, 2))(ahead, u)) / wide[1]
    solved = x + (wide[1] - wide[0]) * (slope + second) / 2

    def jump(g: NetDenoiser, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        told = Cond(labels=cond.labels, jump=1 - b / a)
        return per_sample(b / a, x) * x + per_sample(1 - b / a, x) * g(x, a, told)

    zero = torch.zeros_like(s)
    goal = jump(target, jump(target, solved, u, s), s, zero)
    square = (jump(target, jump(own, x, t, s), s, zero) - goal).square().flatten(1).mean(1)
    denoising = DenoisingLoss(EDMWeight())(own, batch(x0, cond), draws(8)).per_sample
    torch.testing.assert_close(out.per_sample, square + denoising, rtol=1e-5, atol=1e-6)
    (found,) = torch.autograd.grad(out.per_sample.sum(), [own.network.get_parameter("mix")])
    (expected,) = torch.autograd.grad(
        (square + denoising).sum(), [own.network.get_parameter("mix")]
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_gradients_pass_through_the_target_into_the_first_jump() -> None:
    own, target = network(0, True), network(1, False)
    loss = TrajectoryLoss(config=CTMConfig(denoising=0.0, levels=12), target=target)
    loss(own, batch(normal(8, (1, 2, 2)).float()), draws(8)).per_sample.sum().backward()
    gradient = own.network.get_parameter("mix").grad
    assert gradient is not None and gradient.any()
    assert target.network.get_parameter("mix").grad is None


def test_without_a_teacher_the_target_solves() -> None:
    target, x0 = network(1, False), normal(8, (1, 2, 2)).float()
    losses = (
        TrajectoryLoss(config=CTMConfig(), target=target, teacher=given) for given in (None, target)
    )
    a, b = (loss(network(0, True), batch(x0), draws(8)).per_sample for loss in losses)
    assert torch.equal(a, b)


def test_impossible_settings() -> None:
    changes: list[dict[str, Any]] = [{"levels": 1}, {"steps": 0}, {"denoising": -1.0}]
    for change in changes:
        with refuses("levels", "steps", "denoising"):
            CTMConfig(**change)


# ---- As an objective of a run ----


def test_it_brings_its_network_and_is_a_map_between_any_levels(images: Path) -> None:
    config = recipes.with_objective(tiny.config(images), "ctm")
    assert config.network.jump and config.noise == LogNormal()
    assert config.preview.sample_steps == 2
    denoiser = NetDenoiser(config.network.build(), EDM())
    product = CTMConfig(sigma_max=50.0).product(denoiser)
    assert isinstance(product, TrajectoryMap) and float(product.times(2)[0]) == pytest.approx(50)
    with refuses("ctm", "--network.jump"):
        replace(config, network=tiny.NETWORK)
    with refuses("ctm", "EDM", "V"):
        replace(config, precond=V())


def test_its_target_is_the_average_and_its_teacher_a_denoiser(
    images: Path, finished: Path, tmp_path: Path
) -> None:
    config = recipes.with_objective(tiny.config(images), "ctm")
    training = tiny.training(
        replace(config, objective=CTMConfig(teacher=str(finished), levels=5)), tmp_path
    )
    loss = training.objective
    assert isinstance(loss, TrajectoryLoss) and loss.config.levels == 5
    assert isinstance(loss.target, NetDenoiser)
    assert loss.target.network is training.ema.network()
    assert isinstance(loss.teacher, NetDenoiser) and loss.teacher.precond == EDM()
