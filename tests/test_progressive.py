"""Progressive distillation: its target on Gaussians, its rounds, and the teacher of each."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from commands import refuses
from oracles import Gaussian, Little, batch, draws, normal

from patchdiffusion import recipes
from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.objectives.chain import EulerMap, grid_levels
from patchdiffusion.objectives.progressive import Past, ProgressiveConfig, ProgressiveLoss
from patchdiffusion.parameterisation import EDM, EpsVP
from patchdiffusion.paths import per_sample
from patchdiffusion.train import loop


def loss_of(config: ProgressiveConfig, teacher: Any, network: Any = None) -> ProgressiveLoss:
    network = network or Little(2)
    past = Past(network)
    return ProgressiveLoss(
        config=config,
        teacher=teacher,
        average=network,
        past=past,
        student=NetDenoiser(past.network, EDM()),
    )


def test_the_levels_of_a_round_are_every_other_one_of_the_round_before() -> None:
    levels = ProgressiveConfig().levels
    fine, coarse = (grid_levels(levels, torch.arange(n + 1), n) for n in (8, 4))
    torch.testing.assert_close(fine[::2], coarse, rtol=1e-6, atol=0)
    assert coarse[0] == 0 and float(coarse[-1]) == 80


def test_one_step_by_the_target_is_two_of_the_teacher() -> None:
    """On a Gaussian, where the teacher is affine, for the whole chain of 4 steps."""
    teacher, config = Gaussian(), ProgressiveConfig(first=4)
    loss, x = loss_of(config, teacher), 80 * normal(20)

    def student(x: Any, t: Any, cond: Any = None) -> Any:
        index = int((grid_levels(config.levels, torch.arange(5), 4) - t[0].float()).abs().argmin())
        steps = (grid_levels(config.levels, torch.tensor(2 * index - i), 8) for i in range(3))
        levels: Any = tuple(level.double().expand(len(x)) for level in steps)
        return loss.target(0, x, levels, Cond())

    one: Any = EulerMap(denoiser=student, levels=config.levels)  # type: ignore
    two = EulerMap(denoiser=teacher, levels=config.levels)
    found, expected = x, x
    for t, s in zip(one.times(4), one.times(4)[1:], strict=False):
        found = one(found, t, s)
    for t, s in zip(two.times(8), two.times(8)[1:], strict=False):
        expected = two(expected, t, s)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_loss_by_hand() -> None:
    config, teacher, own = ProgressiveConfig(first=8), Gaussian(), NetDenoiser(Little(), EDM())
    x0, eps = normal(32, (1, 2, 2)).float(), draws(32).normal("noise", (1, 2, 2))
    out = loss_of(config, teacher)(own, batch(x0), draws(32))
    total = torch.zeros(32)
    levels, hits = config.levels, 0
    for index in range(1, 9):
        t, m, s = (grid_levels(levels, torch.tensor(2 * index - i), 16) for i in range(3))
        x = x0 + t * eps
        ahead = x + (m - t) / t * (x - teacher(x, t))
        end = ahead + (s - m) / m * (ahead - teacher(ahead, m))
        target = (end - s / t * x) / (1 - s / t)
        weight = max(float(1 / t**2), 1.0)
        error = weight * (own(x, t) - target).square().flatten(1).mean(1)
        match = torch.isclose(out.per_sample, error, rtol=1e-3, atol=1e-5)
        hits += int(match.sum())
        total += match
    assert bool((total >= 1).all()) and hits < 40  # each sample has the loss of one level


def test_the_rounds() -> None:
    config = ProgressiveConfig(first=16, last=2)
    assert config.rounds == 4 and config.jumps == 2
    assert [config.round(p) for p in (0.0, 0.24, 0.25, 0.5, 0.99, 1.0)] == [0, 0, 1, 2, 3, 3]
    assert ProgressiveConfig(first=4, last=4).rounds == 1
    wrong: tuple[dict[str, Any], ...] = (
        {"first": 6},
        {"last": 0},
        {"first": 2, "last": 4},
        {"first": 12, "last": 4},
    )
    for changes in wrong:
        with pytest.raises(ValueError, match="power of two"):
            ProgressiveConfig(**changes)


def test_later_rounds_learn_from_the_average_at_their_beginning() -> None:
    network = Little(2)
    loss = loss_of(ProgressiveConfig(first=4), Gaussian(), network)
    own, x = NetDenoiser(Little(), EDM()), batch(normal(4, (1, 2, 2)).float())
    weights = loss.past.network.get_parameter("mix")
    loss(own, replace(x, progress=0.1), draws(4))
    with torch.no_grad():
        network.get_parameter("mix").add_(1)
    assert not torch.equal(weights, network.get_parameter("mix")) and int(loss.past.round) == 0
    first = loss(own, replace(x, progress=0.4), draws(4)).per_sample
    assert torch.equal(weights, network.get_parameter("mix")) and int(loss.past.round) == 1
    with torch.no_grad():
        network.get_parameter("mix").add_(1)  # the average goes on, the teacher does not
    again = loss(own, replace(x, progress=0.5), draws(4)).per_sample
    assert torch.equal(first, again)
    assert not weights.requires_grad
    (index,) = {int(loss.past.round)}
    t = torch.full((4,), 2.0)
    levels = (t, t / 2, t / 4)
    found = loss.target(index, x.images, levels, Cond())
    taught = NetDenoiser(loss.past.network, EDM())
    end = EulerMap(denoiser=taught)(EulerMap(denoiser=taught)(x.images, t, t / 2), t / 2, t / 4)
    expected = (end - x.images / 4) / 0.75
    torch.testing.assert_close(found, expected.to(found))
    assert per_sample(t, x.images).shape == (4, 1, 1, 1)


def test_a_run_trains_its_network_only(images: Path, finished: Path, tmp_path: Path) -> None:
    given = ProgressiveConfig(teacher=str(finished), first=2)
    config = given.prefers(tiny.config(images))
    training = tiny.training(config, tmp_path)
    past = training.learned.get_submodule("past")
    before = {name: p.clone() for name, p in past.named_parameters()}
    assert {id(p) for p in training.stepper.parameters} == {
        id(p) for p in training.network.parameters()
    }
    loop.one_step(training)
    assert all(torch.equal(p, before[name]) for name, p in past.named_parameters())


def test_what_it_refuses(images: Path, tmp_path: Path) -> None:
    config = recipes.with_objective(tiny.config(images), "progressive")
    assert config.preview.sample_steps == 1
    with refuses("progressive", "--objective.teacher"):
        tiny.training(config, tmp_path)
    with refuses("progressive", "EpsVP"):
        replace(config, precond=EpsVP())
