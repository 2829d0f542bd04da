"""Solvers on denoisers with closed forms: published errors, orders, marginals, restarts."""

import math
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.analytic import GaussianMixture
from patchdiffusion.cond import Cond, Step, Tape
from patchdiffusion.denoiser import Denoiser, expand_sigma, per_sample
from patchdiffusion.noise import karras
from patchdiffusion.solvers import SOLVERS, Churn, Noise, Solver, State, euler, heun, run, solve

TOY = GaussianMixture.toy()


def keys(count: int) -> Tensor:
    return rng.keys(0, "x", 0, torch.arange(count))


def grid(steps: int, rho: float = 7.0) -> Tensor:
    """From 10 to 0.05, without the final 0."""
    return karras(steps + 1, 0.05, 10.0, rho)[:-1]


@cache
def start() -> Tensor:
    """Exact samples of the toy mixture at sigma 10."""
    clean, _ = TOY.sample(keys(1000))
    return (clean + 10 * rng.normal(keys(1000), (2,), torch.float64))[:400]


@cache
def reference() -> Tensor:
    return solve(heun, TOY, start(), grid(320))


@cache
def error(solver: Solver, steps: int, rho: float = 7.0) -> float:
    """RMS distance to the reference."""
    end = solve(solver, TOY, start(), grid(steps, rho))
    return float((end - reference()).square().sum(-1).mean().sqrt())


def slope(solver: Solver, few: int, many: int) -> float:
    return math.log(error(solver, few) / error(solver, many)) / math.log(many / few)


class Gaussian:
    """N(mean, std^2) in every pixel, element by element; remembers the steps it was handed."""

    def __init__(self, mean: float = 0.3, std: float = 0.5):
        self.mean = mean
        self.std = std
        self.steps: list[Step | None] = []
        self.sigmas: list[float] = []

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        step: Step | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        self.steps.append(step)
        sigma = expand_sigma(sigma, x)
        self.sigmas.append(float(sigma[0]))
        share = self.std**2 / (self.std**2 + sigma**2)
        return self.mean + per_sample(share, x) * (x - self.mean)


def noise_of(key: Tensor, shape: tuple[int, ...]) -> Noise:
    return lambda i: rng.normal(rng.subkeys(key, f"churn {i}"), shape)


# ---- Accuracy ----


@pytest.mark.parametrize(
    ("nfe", "published"), [(9, 0.125), (19, 0.025), (35, 0.0065), (79, 0.0013)]
)
def test_heun_has_the_published_error(nfe: int, published: float) -> None:
    assert error(heun, (nfe + 1) // 2) == pytest.approx(published, rel=0.15)


@pytest.mark.parametrize(("nfe", "published"), [(9, 0.117), (19, 0.061)])
def test_euler_has_the_published_error(nfe: int, published: float) -> None:
    """With more steps a handful of samples that end in another mode decide: see the slope."""
    assert error(euler, nfe) == pytest.approx(published, rel=0.15)


def test_orders() -> None:
    assert 1.8 < slope(heun, 40, 80) < 2.2
    assert 1.8 < slope(heun, 20, 80) < 2.2
    few, many = (
        (solve(euler, TOY, start(), grid(n)) - reference()).norm(dim=1).median() for n in (40, 160)
    )
    assert 0.9 < math.log(float(few / many), 4) < 1.1  # RMS would show a few samples only
    for nfe in (19, 35, 79):
        assert error(heun, (nfe + 1) // 2) < error(euler, nfe)


@pytest.mark.parametrize("solver", [euler, heun])
def test_rho_7_beats_rho_1(solver: Solver) -> None:
    assert error(solver, 10, 7.0) < error(solver, 10, 1.0)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_solution_of_a_gaussian(name: str) -> None:
    """x - m shrinks by sqrt((std^2 + b^2) / (std^2 + a^2)) from level a to b."""
    x = 80 * rng.normal(keys(50), (3,), torch.float64)
    end = solve(SOLVERS[name], Gaussian(), x, karras(2000))
    exact = 0.3 + (x - 0.3) * 0.5 / math.sqrt(0.5**2 + 80**2)
    assert float((end - exact).abs().max()) < (5e-3 if name == "euler" else 2e-5)


def test_the_last_step_to_zero_is_the_denoised_image() -> None:
    x = rng.normal(keys(3), (2,), torch.float64)
    for solver in (euler, heun):
        state = run(solver(TOY, x, torch.tensor([0.7, 0.0], dtype=torch.float64)))
        assert torch.equal(state.denoised, TOY(x, 0.7))
        assert torch.allclose(state.x, state.denoised, atol=1e-14)


# ---- What the denoiser is told ----


def test_euler_hands_down_its_steps() -> None:
    denoiser, levels = Gaussian(), karras(5)
    list(euler(denoiser, torch.ones(2, 3), levels))
    assert denoiser.steps == [Step(0, i, 0, tuple(levels.tolist())) for i in range(5)]
    assert denoiser.sigmas == pytest.approx(levels[:-1].tolist())


def test_heun_hands_down_its_steps() -> None:
    denoiser, levels = Gaussian(), karras(5)
    list(heun(denoiser, torch.ones(2, 3), levels))
    places = [(i, stage) for i in range(5) for stage in (0, 1)][:-1]  # 2 n - 1 evaluations
    assert denoiser.steps == [Step(0, i, s, tuple(levels.tolist())) for i, s in places]
    assert denoiser.sigmas == pytest.approx([float(levels[i + stage]) for i, stage in places])


def test_condition_reaches_the_denoiser() -> None:
    labels = torch.tensor([0, 1, 2] * 20)
    x = 80 * rng.normal(keys(60), (2,), torch.float64)
    for solver in (euler, heun):
        end = solve(solver, TOY, x, karras(30), cond=Cond(labels=labels))
        assert torch.equal(TOY.posterior(end, 0.01).argmax(1), labels)


# ---- Restarts, batches, precision ----


@pytest.mark.parametrize("solver", [euler, heun, partial(heun, churn=Churn(amount=9.0))])
def test_restart_midway_is_bit_equal(solver: Solver) -> None:
    x, levels, noise = start()[:20], karras(9), noise_of(keys(20), (2,))
    whole: list[State] = list(solver(TOY, x, levels, noise=noise))
    assert [s.step for s in whole] == list(range(1, 10))
    for middle in (whole[0], whole[4], whole[7]):
        rest = list(solver(TOY, middle.x, levels, noise=noise, first=middle.step))
        assert [s.step for s in rest] == [s.step for s in whole[middle.step :]]
        for a, b in zip(rest, whole[middle.step :], strict=True):
            assert torch.equal(a.x, b.x) and torch.equal(a.denoised, b.denoised)


@pytest.mark.parametrize("solver", [euler, heun, partial(heun, churn=Churn(amount=9.0))])
def test_a_seed_gives_its_sample_in_any_batch(solver: Solver) -> None:
    def sample(key: Tensor) -> Tensor:
        x = 80 * rng.normal(key, (1, 5, 7))
        return solve(solver, Gaussian(), x, karras(9), noise=noise_of(key, (1, 5, 7)))

    together = sample(keys(14))
    for size in (1, 7):
        apart = torch.cat([sample(part) for part in keys(14).split(size)])
        assert torch.equal(apart, together)


def test_precision_of_the_state_is_that_of_x() -> None:
    for dtype in (torch.float32, torch.float64):
        for solver in (euler, heun):
            assert solve(solver, TOY, start()[:3].to(dtype), karras(4)).dtype == dtype


def test_solve_needs_no_gradient_and_a_step() -> None:
    x = torch.ones(1, 2, requires_grad=True)
    assert not solve(heun, TOY, x, karras(2)).requires_grad
    assert run(heun(TOY, x, karras(2))).x.requires_grad  # the solver itself leaves that open
    with pytest.raises(ValueError, match="no steps left"):
        run(euler(TOY, x, karras(2), first=2))


# ---- Churn ----


def test_churn_keeps_the_marginal() -> None:
    """Mean and covariance stay those of the mixture however much noise is replaced."""
    count = 3000
    clean, _ = TOY.sample(keys(count))
    x = clean + 10 * rng.normal(keys(count), (2,), torch.float64)
    churn = Churn(amount=40.0)
    noise: Noise = lambda i: rng.normal(  # noqa: E731
        rng.subkeys(keys(count), f"churn {i}"), (2,), torch.float64
    )
    end = solve(partial(heun, churn=churn), TOY, x, karras(40, 0.01, 10.0), noise=noise)
    mean = TOY.weights @ TOY.means
    second = sum(
        w * (torch.outer(m, m) + v * torch.eye(2))
        for w, m, v in zip(TOY.weights, TOY.means, (0.15**2, 0.25**2, 0.2**2), strict=True)
    )
    cov = second - torch.outer(mean, mean)
    assert float((end.mean(0) - mean).abs().max()) < 4 * math.sqrt(float(cov.max()) / count)
    assert float((end.T.cov() - cov).abs().max()) < 0.04
    plain = solve(heun, TOY, x, karras(40, 0.01, 10.0))
    assert float((end - plain).norm(dim=1).mean()) > 0.3  # and it did something


def test_churn_gamma() -> None:
    churn = Churn(amount=40.0, sigma_min=0.05, sigma_max=50.0)
    assert churn.gamma(1.0, 256) == 40 / 256
    assert churn.gamma(1.0, 10) == math.sqrt(2) - 1  # saturates with few steps
    assert churn.gamma(0.049, 256) == churn.gamma(50.1, 256) == 0
    assert churn.gamma(0.05, 256) == churn.gamma(50.0, 256) > 0


def test_no_churn_is_plain_heun() -> None:
    x = start()[:9]
    plain = solve(heun, TOY, x, karras(5))
    for churn in (Churn(), Churn(amount=9.0, sigma_min=90.0)):
        assert torch.equal(solve(partial(heun, churn=churn), TOY, x, karras(5)), plain)


def test_churn_needs_noise() -> None:
    with pytest.raises(ValueError, match="churn needs noise: pass noise="):
        run(heun(TOY, start()[:2], karras(3), churn=Churn(amount=1.0)))


def test_churn_evaluates_at_the_raised_level() -> None:
    denoiser, levels = Gaussian(), karras(4)
    churn = Churn(amount=1.0)
    list(heun(denoiser, torch.ones(2, 3), levels, churn=churn, noise=noise_of(keys(2), (3,))))
    assert denoiser.sigmas[0::2] == pytest.approx([1.25 * a for a in levels[:-1].tolist()])
    assert denoiser.sigmas[1::2] == pytest.approx(levels[1:-1].tolist())


@pytest.mark.parametrize(
    "values", [{"amount": -1.0}, {"scale": 0.0}, {"sigma_min": 2.0, "sigma_max": 1.0}]
)
def test_impossible_churn_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="churn needs amount >= 0, scale > 0 and sigma_min"):
        Churn(**values)


def test_every_solver_takes_every_denoiser() -> None:
    """Solvers must not look at the shape of x."""
    denoiser: Denoiser = Gaussian()
    for solver in SOLVERS.values():
        for shape in ((4,), (3, 5, 7), (2, 3, 5, 7)):
            assert solve(solver, denoiser, torch.ones(2, *shape), karras(3)).shape == (2, *shape)
