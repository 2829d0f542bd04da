"""How fast each solver converges, on a mixture and in closed form.

What is known of the errors comes from another implementation, with other samples.
"""

import math
from functools import cache

import pytest
import torch
from oracles import DETERMINISTIC, SOLVERS, TOY, Gaussian, grid, keys, noisy, reference
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.solvers import solve
from patchdiffusion.solvers.schedules import karras


@cache
def distances(name: str, steps: int, rho: float = 7.0) -> Tensor:
    """From the reference, for each of 400 samples."""
    return (solve(SOLVERS[name], TOY, noisy(400), grid(steps, rho)) - reference()).norm(dim=1)


def error(name: str, steps: int, rho: float = 7.0) -> float:
    return float(distances(name, steps, rho).square().mean().sqrt())


def slope(few: float, many: float, ratio: float) -> float:
    return math.log(few / many) / math.log(ratio)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("euler", {9: 0.117, 19: 0.061}),  # then a few samples that change their mode decide
        ("heun", {9: 0.125, 19: 0.025, 35: 0.0065, 79: 0.0013}),
        ("dpmpp_2m", {9: 0.045, 19: 0.0098, 35: 0.0033, 79: 0.0008}),
        ("dpmpp_3m_published", {9: 0.038, 19: 0.0073, 35: 0.0018, 79: 0.0003}),
    ],
)
def test_error_by_evaluations(name: str, known: dict[int, float]) -> None:
    for evaluations, value in known.items():
        steps = (evaluations + 1) // 2 if name == "heun" else evaluations
        assert error(name, steps) == pytest.approx(value, rel=0.2)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("unipc", (6.1e-3, 1.3e-3, 2.2e-4, 3.1e-5, 3.9e-6)),
        ("dpmpp_2m", (1.1e-2, 2.7e-3, 7.7e-4, 2.1e-4, 5.4e-5)),
        ("ab2", (2.5e-2, 5.6e-3, 1.6e-3, 4.3e-4, 1.1e-4)),
        ("dpmpp_2s", (6.9e-3, 1.9e-3, 5.3e-4, 1.4e-4, 3.7e-5)),
    ],
)
def test_error_by_steps(name: str, known: tuple[float, ...]) -> None:
    for doublings, value in enumerate(known):
        tight = 0.4 if doublings == 0 else 0.2  # few steps: a few samples decide
        assert error(name, 20 * 2**doublings) == pytest.approx(value, rel=tight)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("heun", 1.8, 2.2),
        ("midpoint", 1.8, 2.2),
        ("ralston", 1.8, 2.2),
        ("dpmpp_2s", 1.8, 2.2),
        ("dpmpp_2m", 1.8, 2.2),
        ("ab2", 1.8, 2.2),
        ("unipc", 2.5, 3.2),
        ("dpmpp_3m", 2.7, 3.2),
        ("dpmpp_3m_published", 2.1, 2.5),  # the coefficient costs the third order
    ],
)
def test_order(name: str, least: float, most: float) -> None:
    assert least < slope(error(name, 40), error(name, 160), 4) < most


def test_order_of_euler() -> None:
    few, many = (float(distances("euler", n).median()) for n in (40, 160))
    assert 0.95 < slope(few, many, 4) < 1.05


def test_higher_orders_are_better() -> None:
    """At 19 evaluations. A few samples decide the mean, so the third order is left its median."""
    assert error("dpmpp_3m_published", 19) < error("dpmpp_2m", 19) < error("euler", 19)
    three, two = (float(distances(name, 19).median()) for name in ("dpmpp_3m", "dpmpp_2m"))
    assert three < two
    assert error("dpmpp_3m", 35) < error("dpmpp_3m_published", 35) < error("dpmpp_2m", 35)


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_rho_7_beats_rho_1(name: str) -> None:
    assert error(name, 10, 7.0) < error(name, 10, 1.0)


@pytest.mark.parametrize("name", [*DETERMINISTIC, "ddim"])
def test_solution_of_a_gaussian(name: str) -> None:
    """x - m shrinks by sqrt((std^2 + b^2) / (std^2 + a^2)) from level a to b."""
    x = 80 * rng.normal(keys(50), (3,), torch.float64)
    end = solve(SOLVERS[name], Gaussian(), x, karras(1000))
    exact = 0.3 + (x - 0.3) * 0.5 / math.sqrt(0.5**2 + 80**2)
    assert float((end - exact).abs().max()) < (1e-2 if name in ("euler", "ddim") else 1e-4)
