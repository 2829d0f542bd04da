"""Feynman-Kac steering and best-of-n against what they sample in the limit."""

import itertools
import math
from collections.abc import Collection, Iterator

import pytest
import torch
from commands import refuses
from oracles import TOY, keys
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.guidance.steering import Steering, best_of
from patchdiffusion.solvers import History, Noise, State, ancestral, heun, run, sde_dpmpp_2m, solve
from patchdiffusion.solvers.schedules import karras

COVS = torch.tensor([0.15, 0.25, 0.2], dtype=torch.float64)


def noise_of(count: int) -> Noise:
    return lambda i: rng.normal(rng.subkeys(keys(count), f"step {i}"), (2,), torch.float64)


def first_coordinate(x: Tensor) -> Tensor:
    return x[:, 0]


def tilted_masses(scale: float) -> Tensor:
    """Weights of the mixture p(x) exp(scale x_1)."""
    logit = TOY.weights.log() + scale * TOY.means[:, 0] + (scale * COVS) ** 2 / 2
    return logit.softmax(0)


def test_tilted_masses() -> None:
    assert tilted_masses(1.0).tolist() == pytest.approx([0.171, 0.519, 0.310], abs=6e-4)


def masses(x: Tensor, groups: int) -> Tensor:
    """Share of each component in each group: [groups, 3]."""
    return TOY.posterior(x, 1e-3).reshape(groups, -1, 3).mean(1)


@pytest.mark.parametrize(("scale", "least"), [(1.0, 0.5), (3.0, 0.5), (1.0, 0.0), (1.0, 1.0)])
def test_masses_of_the_tilted_mixture(scale: float, least: float) -> None:
    """Resampled when poor, only at the end (importance sampling), and after every step."""
    exact = tilted_masses(scale)
    groups, n = 20, 256
    x = 80 * rng.normal(keys(groups * n), (2,), torch.float64)
    sigmas, noise = karras(60), noise_of(groups * n)
    steering = Steering(
        solver=ancestral, reward=first_coordinate, scale=scale, particles=n, least=least
    )
    found = masses(solve(steering, TOY, x, sigmas, noise=noise), groups)
    error = found.std(0) / math.sqrt(groups)
    assert bool((found.std(0) < 0.08).all())
    assert bool(((found.mean(0) - exact).abs() < 4 * error + 0.01).all())
    prior = masses(solve(ancestral, TOY, x, sigmas, noise=noise), groups).mean(0)
    assert prior.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.02)


def test_scale_0_is_the_solver_bit_for_bit() -> None:
    x, sigmas, noise = 80 * noise_of(64)(-1), karras(8), noise_of(64)
    plain = list(ancestral(TOY, x, sigmas, noise=noise))
    steering = Steering(solver=ancestral, reward=first_coordinate, scale=0.0, particles=16)
    steered = list(steering(TOY, x, sigmas, noise=noise))
    assert [state.step for state in steered] == list(range(1, 9))
    for a, b in zip(plain, steered, strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.denoised, b.denoised)


def test_particles_take_their_history_along() -> None:
    """One that is copied goes on as it would have gone on."""
    x, sigmas, noise = 80 * noise_of(32)(-1), karras(12), noise_of(32)
    steering = Steering(
        solver=sde_dpmpp_2m, reward=first_coordinate, scale=3.0, particles=32, least=1.0
    )
    states = list(steering(TOY, x, sigmas, noise=noise))
    for before, after in itertools.pairwise(states[:-1]):
        past = {"first": before.step, "history": before.history}
        free = next(sde_dpmpp_2m(TOY, before.x, sigmas, noise=noise, **past))
        assert len(after.history) == 1 and len(before.history) == 1
        came_from = torch.cdist(after.x, free.x).argmin(1)
        assert torch.equal(after.x, free.x[came_from])
        assert torch.equal(after.history[0], free.denoised[came_from])


def test_groups_do_not_see_each_other() -> None:
    sigmas = karras(20)
    steering = Steering(solver=ancestral, reward=first_coordinate, scale=5.0, particles=32)
    x = 80 * noise_of(64)(-1)
    both = run(steering(TOY, x, sigmas, noise=noise_of(64))).x
    alone = run(steering(TOY, x[:32], sigmas, noise=noise_of(32))).x
    assert torch.equal(both[:32], alone)
    assert not torch.equal(both[:32].sort(0).values, both[32:].sort(0).values)


def jump(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    cond: Cond | None = None,
    noise: Noise | None = None,
    first: int = 0,
    history: History = (),
    resets: Collection[int] = (),
) -> Iterator[State]:
    """Moves nothing: particle and estimate are x."""
    for i in range(first, len(sigmas) - 1):
        yield State(x, x, i + 1)


def test_copies_are_the_weights_rounded_up_or_down() -> None:
    x = rng.normal(keys(50), (1,), torch.float64)
    weight = 50 * first_coordinate(x).softmax(0)
    ends = []
    for seed in range(5):
        steering = Steering(
            solver=jump, reward=first_coordinate, scale=1.0, particles=50, seed=seed
        )
        end = run(steering(TOY, x, karras(1), noise=noise_of(50))).x
        copies = (end == x.T).sum(0)
        assert bool(((copies - weight).abs() < 1).all()) and int(copies.sum()) == 50
        ends.append(end)
    assert len(torch.stack(ends).unique(dim=0)) > 1  # which way is a matter of the seed


def test_resampling_waits_until_the_weights_are_uneven() -> None:
    """Rewards that do not change count once, however often they are seen."""
    x = torch.tensor([[0.0], [0.0], [0.0], [2.0]], dtype=torch.float64)
    weight = x[:, 0].softmax(0)
    size = 1 / float(weight.square().sum()) / 4
    for least, resampled in ((size + 0.01, True), (size - 0.01, False)):
        steering = Steering(
            solver=jump, reward=first_coordinate, scale=1.0, particles=4, least=least, seed=1
        )
        states = list(steering(TOY, x, karras(3), noise=noise_of(4)))
        assert torch.equal(states[0].x, x) is not resampled
        assert torch.equal(states[0].x, states[1].x)
        assert int((states[2].x == 2).sum()) in (2, 3)  # 4 weight[3] = 2.84


def test_a_restart_goes_on_with_the_chosen_particles() -> None:
    """Equal ends of x, the estimate, and what the solver is handed next."""
    x = rng.normal(keys(8), (2,), torch.float64)
    steering = Steering(solver=jump, reward=first_coordinate, scale=20.0, particles=8, least=1.0)
    states = list(steering(TOY, x, karras(4), noise=noise_of(8)))
    assert torch.equal(states[0].x, states[0].denoised)
    assert len(states[0].x.unique(dim=0)) < 8
    best = x[x[:, 0].argmax()]
    assert torch.equal(states[-1].x[-1], best)


def test_what_cannot_work_is_refused() -> None:
    x, sigmas, noise = 80 * noise_of(6)(-1), karras(2), noise_of(6)
    steering = Steering(solver=ancestral, reward=first_coordinate, scale=1.0, particles=3)
    with refuses("noise"):
        next(steering(TOY, x, sigmas))
    with refuses(5, 3):
        next(steering(TOY, x[:5], sigmas, noise=noise))
    same, mixed = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 2])
    next(steering(TOY, x, sigmas, noise=noise, cond=Cond(labels=same)))
    with refuses(3, "condition"):
        next(steering(TOY, x, sigmas, noise=noise, cond=Cond(labels=mixed)))
    wild = Steering(solver=ancestral, reward=lambda x: x[:, 0] / 0, scale=1.0, particles=3)
    with refuses("reward", "step 1"):
        next(wild(TOY, x, sigmas, noise=noise))
    wide = Steering(solver=ancestral, reward=lambda x: x, scale=1.0, particles=3)
    with refuses("[6]", "[6, 2]"):
        next(wide(TOY, x, sigmas, noise=noise))
    for n, least in ((0, 0.5), (3, 1.5)):
        with refuses("particles", "least"):
            Steering(solver=heun, reward=first_coordinate, scale=1.0, particles=n, least=least)


def test_best_of_n() -> None:
    """The largest of four standard normals is 1.0294 on average."""
    x = rng.normal(keys(40_000), (2,), torch.float64)
    best = best_of(x, first_coordinate, 4)
    assert best.shape == (10_000, 2)
    assert torch.equal(best[7], x[28:32][x[28:32, 0].argmax()])
    assert float(best[:, 0].mean()) == pytest.approx(1.0294, abs=4 * 0.70 / 100)
    assert torch.equal(best_of(x, first_coordinate, 1), x)
    with refuses(10, 4):
        best_of(x[:10], first_coordinate, 4)
