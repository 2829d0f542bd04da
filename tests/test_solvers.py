"""What every solver keeps to: its evaluations, restarts, batches, precision, churn, resets."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from commands import refuses
from oracles import ALL, DETERMINISTIC, SOLVERS, TOY, TWO_STAGES, Gaussian, keys, noise_of, noisy
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.cond import Call, Cond, Position
from patchdiffusion.denoiser import Wrapper, ask
from patchdiffusion.solvers import (
    DDIM,
    Ancestral,
    Churn,
    EulerMaruyama,
    Heun,
    Integrator,
    Method,
    SDEDPMpp1,
    SDEDPMpp2M,
    State,
    crossings,
    dpmpp_2m,
    euler,
    heun,
    run,
    solve,
    unipc,
)
from patchdiffusion.solvers.schedules import karras

every_solver = pytest.mark.parametrize("name", list(ALL))


# ---- Euler and Heun, written out ----


def plain_euler(x: Tensor, levels: list[float]) -> Tensor:
    for a, b in pairwise(levels):
        denoised = TOY(x, a)
        x = denoised + (b / a) * (x - denoised)
    return x


def plain_heun(x: Tensor, levels: list[float], gamma: float, seeds: Tensor) -> Tensor:
    noise = noise_of(seeds, (2,))
    for i, (a, b) in enumerate(pairwise(levels)):
        if gamma:
            x = x + math.sqrt((a * (1 + gamma)) ** 2 - a**2) * noise(i)
            a = a * (1 + gamma)
        slope = (x - TOY(x, a)) / a
        x_next = x + (b - a) * slope
        if b > 0:
            x_next = x + (b - a) * (slope + (x_next - TOY(x_next, b)) / b) / 2
        x = x_next
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_euler_and_heun_bit_for_bit(dtype: torch.dtype) -> None:
    x, sigmas = noisy(50).to(dtype) * 8, karras(11)
    levels = sigmas.tolist()
    assert torch.equal(solve(euler, TOY, x, sigmas), plain_euler(x, levels))
    assert torch.equal(solve(heun, TOY, x, sigmas), plain_heun(x, levels, 0.0, keys(50)))
    churned = solve(ALL["churned heun"], TOY, x, sigmas, noise=noise_of(keys(50), (2,)))
    assert torch.equal(churned, plain_heun(x, levels, math.sqrt(2) - 1, keys(50)))


# ---- Evaluations ----


@every_solver
def test_evaluations_and_the_steps_handed_down(name: str) -> None:
    """2n - 1 of two stages, 5n - 4 of repeated steps, else n; the step to 0 takes one."""
    denoiser, levels = Gaussian(), karras(5)
    list(ALL[name](denoiser, torch.ones(2, 3), levels, noise=noise_of(keys(2), (3,))))
    solver = SOLVERS[name.removeprefix("churned ").removesuffix(" 0.5")]
    two = name.removeprefix("churned ") in TWO_STAGES
    stages = range(5 if name == "repaint" else 2 if two else 1)
    assert solver.stages == (2 if two else 1)
    places = [(i, stage) for i in range(5) for stage in stages][: 4 * len(stages) + 1]
    assert solver.evaluations(5) == len(places)
    run = denoiser.steps[0].run if denoiser.steps[0] else -1
    assert denoiser.steps == [Position(run, i, s, tuple(levels.tolist())) for i, s in places]
    if not name.startswith("churned"):
        assert denoiser.sigmas[:: len(stages)] == pytest.approx(levels[:-1].tolist())


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("heun", lambda a, b: b),
        ("midpoint", lambda a, b: (a + b) / 2),
        ("ralston", lambda a, b: a + 2 / 3 * (b - a)),
        ("dpmpp_2s", lambda a, b: math.sqrt(a * b)),
    ],
)
def test_level_of_the_second_stage(name: str, place: Callable[[float, float], float]) -> None:
    denoiser, levels = Gaussian(), karras(5)
    list(SOLVERS[name](denoiser, torch.ones(2, 3), levels))
    expected = [place(a, b) for a, b in pairwise(levels[:-1].tolist())]
    assert denoiser.sigmas[1::2] == pytest.approx(expected)


@every_solver
def test_the_last_step_to_zero_is_the_denoised_image(name: str) -> None:
    noise, last = noise_of(keys(3), (2,)), torch.tensor([0.7, 0.0], dtype=torch.float64)
    for sigmas in (last, karras(6, 0.1, 0.7)):
        state = run(ALL[name](TOY, noisy(3), sigmas, noise=noise))
        assert torch.allclose(state.x, state.denoised, rtol=0, atol=1e-14)
    if not name.startswith("churned"):
        assert torch.equal(run(ALL[name](TOY, noisy(3), last)).denoised, TOY(noisy(3), 0.7))


@every_solver
def test_condition_reaches_the_denoiser(name: str) -> None:
    labels = torch.tensor([0, 1, 2] * 20)
    x = 80 * rng.normal(keys(60), (2,), torch.float64)
    noise = noise_of(keys(60), (2,))
    end = solve(ALL[name], TOY, x, karras(30), cond=Cond(labels=labels), noise=noise)
    assert torch.equal(TOY.posterior(end, 0.01).argmax(1), labels)


# ---- Restarts, batches, precision ----


@every_solver
@pytest.mark.parametrize("resets", [(), (3, 6)])
def test_restart_midway_is_bit_equal(name: str, resets: tuple[int, ...]) -> None:
    solver, x, levels, noise = ALL[name], noisy(20), karras(9), noise_of(keys(20), (2,))
    whole: list[State] = list(solver(TOY, x, levels, noise=noise, resets=resets))
    assert [s.step for s in whole] == list(range(1, 10))
    for s in (whole[n] for n in (0, 1, 2, 4, 7)):
        again = solver(
            TOY, s.x, levels, noise=noise, first=s.step, history=s.history, resets=resets
        )
        for a, b in zip(again, whole[s.step :], strict=True):
            assert (
                a.step == b.step and torch.equal(a.x, b.x) and torch.equal(a.denoised, b.denoised)
            )


@pytest.mark.parametrize(
    "name", ["dpmpp_2m", "dpmpp_3m", "dpmpp_3m_published", "unipc", "ab2", "sde_dpmpp_2m"]
)
def test_history_is_what_a_multistep_solver_needs(name: str) -> None:
    x, levels, noise = noisy(20), karras(9), noise_of(keys(20), (2,))
    whole = list(SOLVERS[name](TOY, x, levels, noise=noise))
    forgetful = SOLVERS[name](TOY, whole[3].x, levels, noise=noise, first=4)
    assert not torch.allclose(run(forgetful).x, whole[-1].x, rtol=0, atol=1e-6)


@every_solver
def test_a_seed_gives_its_sample_in_any_batch(name: str) -> None:
    def sample(key: Tensor) -> Tensor:
        x, noise = 80 * rng.normal(key, (1, 5, 7)), noise_of(key, (1, 5, 7))
        return solve(ALL[name], Gaussian(), x, karras(9), noise=noise)

    together = sample(keys(14))
    for size in (1, 7):
        assert torch.equal(torch.cat([sample(part) for part in keys(14).split(size)]), together)


@every_solver
def test_precision_is_that_of_x(name: str) -> None:
    x, noise = 8 * noisy(100), noise_of(keys(100), (2,), torch.float64)
    double = solve(ALL[name], TOY, x, karras(20), noise=noise)
    single = solve(ALL[name], TOY, x.float(), karras(20), noise=lambda i: noise(i).float())
    assert (double.dtype, single.dtype) == (torch.float64, torch.float32)
    assert float((double - single).abs().median()) < 1e-5


@every_solver
def test_any_shape(name: str) -> None:
    """Solvers must not look at the shape of x."""
    for shape in ((4,), (3, 5, 7), (2, 3, 5, 7)):
        noise = noise_of(keys(2), shape)
        end = solve(ALL[name], Gaussian(), torch.ones(2, *shape), karras(3), noise=noise)
        assert end.shape == (2, *shape)


def test_solve_needs_no_gradient_and_a_step() -> None:
    x = torch.ones(1, 2, requires_grad=True)
    assert not solve(heun, TOY, x, karras(2)).requires_grad
    assert run(heun(TOY, x, karras(2))).x.requires_grad  # the solver itself leaves that open
    with refuses("steps"):
        run(euler(TOY, x, karras(2), first=2))


# ---- Noise and options ----


@every_solver
def test_noise_is_needed_or_unused(name: str) -> None:
    if name in DETERMINISTIC or name == "ddim":
        solve(ALL[name], TOY, noisy(2), karras(3))
        return
    with refuses("noise="):
        solve(ALL[name], TOY, noisy(2), karras(3))


@pytest.mark.parametrize(
    ("solver", "eta"),
    [
        (DDIM, 1.1),
        (Ancestral, -0.1),
        (SDEDPMpp1, -1.0),
        (SDEDPMpp2M, math.nan),
        (EulerMaruyama, 101.0),
    ],
)
def test_an_impossible_eta_is_refused(solver: Callable[..., Method], eta: float) -> None:
    with refuses("eta"):
        solver(eta=eta)


def test_churn_gamma() -> None:
    churn = Churn(amount=40.0, sigma_min=0.05, sigma_max=50.0)
    assert churn.gamma(1.0, 256) == 40 / 256
    assert churn.gamma(1.0, 10) == math.sqrt(2) - 1  # saturates with few steps
    assert churn.gamma(0.049, 256) == churn.gamma(50.1, 256) == 0
    assert churn.gamma(0.05, 256) == churn.gamma(50.0, 256) > 0


@pytest.mark.parametrize("name", ["heun", "midpoint", "ralston"])
def test_no_churn_is_the_plain_solver(name: str) -> None:
    plain = solve(SOLVERS[name], TOY, noisy(9), karras(5))
    for churn in (Churn(), Churn(amount=9.0, sigma_min=90.0)):
        solver = replace(SOLVERS[name], churn=churn)
        assert torch.equal(solve(solver, TOY, noisy(9), karras(5)), plain)


def test_scale_of_the_churned_noise() -> None:
    """One step to 0 returns D at the raised level, of a denoiser that returns its input."""
    x, z = noisy(5), noise_of(keys(5), (2,), torch.float64)
    solver = Heun(churn=Churn(amount=0.25, scale=1.5))
    last = torch.tensor([2.0, 0.0], dtype=torch.float64)
    end = solve(solver, lambda x, *_, **__: x, x, last, noise=z)
    assert torch.allclose(end, x + math.sqrt(2.5**2 - 2**2) * 1.5 * z(0), rtol=0, atol=1e-13)


def test_churn_evaluates_at_the_raised_level() -> None:
    denoiser, levels = Gaussian(), karras(4)
    churn = Churn(amount=1.0)
    list(Heun(churn=churn)(denoiser, torch.ones(2, 3), levels, noise=noise_of(keys(2), (3,))))
    assert denoiser.sigmas[0::2] == pytest.approx([1.25 * a for a in levels[:-1].tolist()])
    assert denoiser.sigmas[1::2] == pytest.approx(levels[1:-1].tolist())


@pytest.mark.parametrize(
    "values", [{"amount": -1.0}, {"scale": 0.0}, {"sigma_min": 2.0, "sigma_max": 1.0}]
)
def test_impossible_churn_is_refused(values: dict[str, float]) -> None:
    with refuses("churn", "amount", "scale", "sigma_min"):
        Churn(**values)


def test_every_trajectory_has_a_number_of_its_own() -> None:
    denoiser = Gaussian()
    for _ in range(2):
        solve(euler, denoiser, torch.ones(2, 3), karras(2))
    a, b, c, d = (position.run for position in denoiser.steps if position)
    assert a == b != c == d


# ---- Resets ----


def test_crossings_of_a_guidance_interval() -> None:
    """Inside is low < sigma <= high: a step is told where it begins on another side."""
    sigmas = torch.tensor([9.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.0])
    inside = [1.0 < s <= 5.0 for s in sigmas.tolist()]
    changes = {i for i in range(1, 6) if inside[i] != inside[i - 1]}
    assert crossings(sigmas, (1.0, 5.0)) == changes == {1, 4}
    assert crossings(sigmas, (1.5, 1.7, 40.0)) == {4}
    assert crossings(sigmas, (0.0, 0.2)) == {6}  # the step to 0 ends there, and none begins
    assert crossings(sigmas, ()) == frozenset()


class Jump(Wrapper):
    """One Gaussian above a level and another below: a guidance interval with its edge there."""

    told = False

    @property
    def edges(self) -> tuple[float, ...]:
        return (1.0,) if self.told else ()

    def denoise(self, x: Tensor, sigma: Tensor | float, cond: Cond | None, call: Call) -> Tensor:
        above, below = self.inner
        return ask(above if float(sigma) > 1.0 else below, x, sigma, cond, call)


@pytest.mark.parametrize("solver", [dpmpp_2m, unipc])
def test_after_a_reset_a_solver_starts_anew(solver: Integrator) -> None:
    """As if the rest were a run of its own: nothing is extrapolated across the edge."""
    sigmas, x = karras(12), 80 * rng.normal(keys(20), (2,), torch.float64)
    (edge,) = resets = crossings(sigmas, [1.0])
    jump, told = (Jump(Gaussian(-2.0, 0.1), Gaussian()) for _ in range(2))
    whole = list(solver(jump, x, sigmas, resets=resets))
    anew = run(solver(Gaussian(), whole[edge - 1].x, sigmas, first=edge)).x
    assert torch.equal(whole[-1].x, anew)
    told.told = True  # what guided denoisers say of themselves
    assert torch.equal(run(solver(told, x, sigmas)).x, anew)
    exact = 0.3 + (whole[edge - 1].x - 0.3) * 0.5 / math.sqrt(0.25 + float(sigmas[edge]) ** 2)
    mixed = run(solver(jump, x, sigmas)).x
    assert float((anew - exact).abs().max()) < 0.5 * float((mixed - exact).abs().max())
