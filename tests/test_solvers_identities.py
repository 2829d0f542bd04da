"""Solvers against each other, against second implementations, and where they must be exact."""

import math

import pytest
import torch
from oracles import SOLVERS, TOY, Oracle, grid, keys, noise_of, noisy
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.solvers import (
    DDIM,
    EulerMaruyama,
    Integrator,
    SDEDPMpp1,
    SDEDPMpp2M,
    State,
    ancestral,
    dpmpp_2m,
    dpmpp_3m,
    euler,
    solve,
    unipc,
)
from patchdiffusion.solvers.schedules import karras


def ends(solver: Integrator, sigmas: Tensor) -> Tensor:
    noise = noise_of(keys(100), (2,), torch.float64)
    return solve(solver, TOY, noisy(100), sigmas, noise=noise)


def same(one: Integrator, other: Integrator, tolerance: float = 1e-13) -> None:
    """To the last digits, which chaos between modes amplifies a little."""
    for sigmas in (karras(9, 0.01, 10.0), grid(12)):
        assert torch.allclose(ends(one, sigmas), ends(other, sigmas), rtol=0, atol=tolerance)


# ---- The same solver under several names ----


@pytest.mark.parametrize(
    "other",
    [
        DDIM(eta=0.0),
        SDEDPMpp1(eta=0.0),
        EulerMaruyama(eta=0.0),  # straight lines of the flow stay straight
    ],
)
def test_without_noise_first_order_is_euler(other: Integrator) -> None:
    same(euler, other, 1e-12)


def test_all_the_noise_is_ancestral() -> None:
    same(ancestral, DDIM(eta=1.0))
    same(ancestral, SDEDPMpp1(eta=1.0))


def test_without_noise_the_second_order_is_2m() -> None:
    same(dpmpp_2m, SDEDPMpp2M(eta=0.0))


def test_ancestral_has_the_posterior_of_ddpm() -> None:
    """q(x_b | x_a, x0) with x0 = D: mean and variance of Bayes' rule for two Gaussians."""
    a, b, x = 3.0, 1.2, noisy(50)
    z = noise_of(keys(50), (2,), torch.float64)(0)
    precision = 1 / b**2 + 1 / (a**2 - b**2)
    mean = (TOY(x, a) / b**2 + x / (a**2 - b**2)) / precision
    sigmas = torch.tensor([a, b], dtype=torch.float64)
    end = solve(ancestral, TOY, x, sigmas, noise=lambda i: z)
    assert torch.allclose(end, mean + z / math.sqrt(precision), rtol=0, atol=1e-13)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_sde_dpmpp_as_written(eta: float) -> None:
    """The formulas of both orders in h, one step after another."""
    a, b, c = 3.0, 1.9, 1.2
    h1, h = math.log(a / b), math.log(b / c)
    z = noise_of(keys(50), (2,), torch.float64)

    def step(x: Tensor, image: Tensor, h: float, end: float, i: int) -> Tensor:
        kept = math.exp(-h * (1 + eta))
        fresh = end * math.sqrt(1 - math.exp(-2 * eta * h))
        return kept * x + (1 - kept) * image + fresh * z(i)

    first = TOY(noisy(50), a)
    middle = step(noisy(50), first, h1, b, 0)
    second = TOY(middle, b)
    sigmas = torch.tensor([a, b, c], dtype=torch.float64)
    for solver, image in (
        (SDEDPMpp1(eta=eta), second),
        (SDEDPMpp2M(eta=eta), second + (second - first) / (2 * h1 / h)),
    ):
        end = solve(solver, TOY, noisy(50), sigmas, noise=z)
        assert torch.allclose(end, step(middle, image, h, c, 1), rtol=0, atol=1e-13)


def test_ddim_between() -> None:
    a, b, eta, x = 3.0, 1.2, 0.4, noisy(50)
    z = noise_of(keys(50), (2,), torch.float64)(0)
    up = eta * b * math.sqrt(1 - b**2 / a**2)
    image = TOY(x, a)
    expected = image + math.sqrt(b**2 - up**2) * (x - image) / a + up * z
    sigmas = torch.tensor([a, b], dtype=torch.float64)
    end = solve(DDIM(eta=eta), TOY, x, sigmas, noise=lambda i: z)
    assert torch.allclose(end, expected, rtol=0, atol=1e-13)


# ---- UniPC as its paper has it: predict, evaluate, correct ----


def written_out_unipc(x: Tensor, levels: list[float], corrector: bool) -> Tensor:
    images = [TOY(x, levels[0])]
    for i in range(len(levels) - 1):
        a, b = levels[i], levels[i + 1]
        if b == 0:
            return images[-1]
        h, now = math.log(a / b), images[-1]
        grown = math.expm1(-h)
        base = (b / a) * x + (1 - b / a) * now
        rows, slopes = [], []
        predicted = base
        if i > 0:
            rows = [-math.log(levels[i - 1] / a) / h]
            slopes = [(images[-2] - now) / rows[0]]
            predicted = base - grown * 0.5 * slopes[0]
        if not corrector:
            x = predicted
            images.append(TOY(x, b))
            continue
        images.append(TOY(predicted, b))
        if i == len(levels) - 2:
            return predicted  # its evaluation would be one more than n
        rows, slopes = [*rows, 1.0], [*slopes, images[-1] - now]
        p1 = grown / -h - 1
        p2 = p1 / -h - 0.5
        if i == 0:
            rho = torch.tensor([0.5], dtype=torch.float64)
        else:
            matrix = torch.tensor([[1.0, 1.0], rows], dtype=torch.float64)
            right = torch.tensor([p1 / grown, 2 * p2 / grown], dtype=torch.float64)
            rho = torch.linalg.solve(matrix, right)
        x = base - grown * sum(float(r) * s for r, s in zip(rho, slopes, strict=True))
    return x


@pytest.mark.parametrize("sigmas", [karras(9, 0.01, 10.0), grid(12)])
def test_unipc_as_written(sigmas: Tensor) -> None:
    levels = sigmas.tolist()
    corrected = written_out_unipc(noisy(100), levels, corrector=True)
    assert torch.allclose(ends(unipc, sigmas), corrected, rtol=0, atol=1e-12)
    predicted = written_out_unipc(noisy(100), levels, corrector=False)
    assert torch.allclose(ends(dpmpp_2m, sigmas), predicted, rtol=0, atol=1e-12)
    assert not torch.allclose(corrected, predicted, rtol=0, atol=1e-5)


# ---- Exact on polynomials ----


class Moves(Oracle):
    """A denoised image c0 + c1 l + c2 l^2 that depends on the level alone; l = -ln sigma."""

    coefficients = (0.3, -0.7, 0.2)

    def __init__(self) -> None:
        super().__init__(self._best)

    def _best(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        c0, c1, c2 = self.coefficients
        l = -math.log(float(sigma[0]))  # noqa: E741
        return torch.full_like(x, c0 + c1 * l + c2 * l * l)

    def part(self, sigma: float) -> float:
        """int e^l D dl."""
        c0, c1, c2 = self.coefficients
        l = -math.log(sigma)  # noqa: E741
        return (c0 - c1 + 2 * c2 + (c1 - 2 * c2) * l + c2 * l * l) / sigma


class Slopes(Moves):
    """The direction (x - D) / sigma is c0 + c1 sigma + c2 sigma^2, whatever x."""

    def _best(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        c0, c1, c2 = self.coefficients
        s = float(sigma[0])
        return x - s * (c0 + c1 * s + c2 * s * s)


def misses(solver: Integrator, problem: Moves, first: int) -> float:
    """How far each step from number `first` on ends from the exact solution, at most."""
    sigmas, x = grid(8), torch.ones(1, 1, dtype=torch.float64)
    levels = sigmas.tolist()
    states = [State(x, x, 0), *solver(problem, x, sigmas)]
    c0, c1, c2 = problem.coefficients
    worst = 0.0
    for i in range(first, 8):
        a, b, start = levels[i], levels[i + 1], float(states[i].x)
        if isinstance(problem, Slopes):
            moved = c0 * (b - a) + c1 * (b**2 - a**2) / 2 + c2 * (b**3 - a**3) / 3
            exact = start + moved
        else:
            exact = b / a * start + b * (problem.part(b) - problem.part(a))
        worst = max(worst, abs(float(states[i + 1].x) - exact))
    return worst


def test_3m_is_exact_for_parabolas() -> None:
    assert misses(dpmpp_3m, Moves(), 2) < 1e-12
    assert misses(SOLVERS["dpmpp_3m_published"], Moves(), 2) > 1e-3
    assert misses(dpmpp_2m, Moves(), 2) > 1e-3


def test_3m_starts_with_an_exact_line() -> None:
    line = Moves()
    line.coefficients = (0.3, -0.7, 0.0)
    assert misses(dpmpp_3m, line, 1) < 1e-12
    assert misses(SOLVERS["dpmpp_3m_published"], line, 1) < 1e-12
    assert misses(euler, line, 1) > 1e-2


@pytest.mark.parametrize(
    ("name", "first"), [("heun", 0), ("midpoint", 0), ("ralston", 0), ("ab2", 1)]
)
def test_second_order_in_sigma_is_exact_for_slopes_on_a_line(name: str, first: int) -> None:
    line = Slopes()
    line.coefficients = (0.3, -0.7, 0.0)
    assert misses(SOLVERS[name], line, first) < 1e-12
    assert (misses(SOLVERS[name], Slopes(), first) < 1e-12) == (name == "ralston")  # Radau's nodes


def test_2s_takes_the_image_of_the_middle() -> None:
    a, b, x = 3.0, 1.2, noisy(50)
    middle = math.sqrt(a * b)
    half = (middle / a) * x + (1 - middle / a) * TOY(x, a)
    expected = (b / a) * x + (1 - b / a) * TOY(half, middle)
    end = solve(SOLVERS["dpmpp_2s"], TOY, x, torch.tensor([a, b], dtype=torch.float64))
    assert torch.allclose(end, expected, rtol=0, atol=1e-13)
