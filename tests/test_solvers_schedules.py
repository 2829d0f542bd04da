"""Grids of noise levels: their spacing, their exact ends, what is refused."""

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from commands import refuses
from torch import Tensor

from patchdiffusion.paths import DDPM, PATHS
from patchdiffusion.solvers.schedules import (
    ddpm_table,
    flow_uniform,
    karras,
    log_uniform,
    time_uniform,
)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return float(((a - b).abs() / b.abs().clamp(min=1)).max()) <= tolerance


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: karras(0), "steps must be at least 1, not 0"),
        (lambda: karras(10**30), "steps must be at most 1,000,000, not 1000"),
        (lambda: karras(5, rho=0.0), "rho"),
        (lambda: karras(5, 1.0, 1.0), "0 < sigma_min < sigma_max"),
        (lambda: log_uniform(5, 0.1, math.inf), "0 < sigma_min < sigma_max"),
        (lambda: log_uniform(-1), "steps must be at least 1, not -1"),
    ],
)
def test_impossible_values_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("ends", [(0.002, 80.0), (0.002, 10.0), (0.05, 3.0), (0.0123, 45.6)])
def test_ends_are_exact(ends: tuple[float, float]) -> None:
    for make in (karras, log_uniform, time_uniform, flow_uniform):
        for steps in (2, 18, 40):
            grid = make(steps, *ends).tolist()
            assert (grid[-2], grid[0], grid[-1]) == (*ends, 0.0)
    assert flow_uniform(9, *ends, shift=3.0)[[0, -2]].tolist() == [ends[1], ends[0]]
    assert time_uniform(9, *ends, power=2.0)[[0, -2]].tolist() == [ends[1], ends[0]]


def test_karras_grid() -> None:
    grid = karras(18)
    assert grid.dtype == torch.float64 and grid.shape == (19,)
    assert grid[0].item() == pytest.approx(80) and grid[-2].item() == pytest.approx(0.002)
    assert grid[-1] == 0 and bool((grid.diff() < 0).all())
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    expected = [(high + i / 17 * (low - high)) ** 7 for i in range(18)]
    assert grid[:-1].tolist() == pytest.approx(expected, rel=1e-12)


def test_log_uniform_grid_is_the_limit_of_karras() -> None:
    grid = log_uniform(10, 0.05, 10)
    assert grid[:-1].log().diff().tolist() == pytest.approx([math.log(0.05 / 10) / 9] * 9)
    assert grid[-1] == 0
    assert close(karras(10, 0.05, 10, rho=1e6), grid, 1e-4)


@pytest.mark.parametrize("path", ["vp", "cosine", "flow"])
def test_time_uniform_grid(path: Literal["vp", "cosine", "flow"]) -> None:
    for power in (1.0, 2.0):
        grid = time_uniform(9, 0.05, 10, path=path, power=power)
        assert grid[[0, -2, -1]].tolist() == pytest.approx([10, 0.05, 0], rel=1e-12)
        steps = (PATHS[path].time(grid[:-1]) ** (1 / power)).diff()
        assert steps.tolist() == pytest.approx([float(steps.mean())] * 8, rel=1e-9)
        assert float(steps.mean()) < 0


def test_quadratic_grid() -> None:
    """The middle is at the square of the mean root of the ends: more steps at small times."""
    middle, even = (PATHS["vp"].time(time_uniform(9, power=p)[4]) for p in (2.0, 1.0))
    low, high = (PATHS["vp"].time(torch.tensor(s, dtype=torch.float64)) for s in (0.002, 80.0))
    assert float(middle) == pytest.approx(float((low.sqrt() + high.sqrt()) ** 2 / 4))
    assert float(even) == pytest.approx(float(low + high) / 2)


def test_flow_uniform_grid() -> None:
    assert close(flow_uniform(9), time_uniform(9, path="flow"), 1e-14)
    for shift in (0.3, 3.0):
        grid = flow_uniform(9, 0.05, 10, shift)
        assert grid[[0, -2, -1]].tolist() == pytest.approx([10, 0.05, 0], rel=1e-12)
        shifted = PATHS["flow"].time(grid[:-1])
        tau = shifted / (shift - (shift - 1) * shifted)  # undo tau' = k tau / (1 + (k - 1) tau)
        assert tau.diff().tolist() == pytest.approx([float(tau.diff().mean())] * 8, rel=1e-9)
    assert bool((flow_uniform(9, shift=3.0) > flow_uniform(9))[1:-2].all())


def test_one_step_starts_at_the_top() -> None:
    for grid in (karras, log_uniform, time_uniform, flow_uniform):
        assert grid(1).tolist() == pytest.approx([80, 0])


def test_impossible_grids_are_refused() -> None:
    with refuses("shift", 0.0):
        flow_uniform(3, shift=0.0)
    with refuses("power", -1.0):
        time_uniform(3, power=-1.0)
    with refuses("flow", "sigma_max", "1e+18"):
        flow_uniform(3, sigma_max=1e18)
    for ends in ((0.002, 1e200), (0.002, 1e20), (1e-200, 80.0)):
        with refuses("2^-63", "sigma_min", "sigma_max", "2^63", *ends):
            time_uniform(3, *ends)
    for grid in (time_uniform, flow_uniform):
        with refuses(1, 0):
            grid(0)
        with refuses("sigma_min", "sigma_max"):
            grid(3, 2.0, 1.0)


@pytest.mark.parametrize("table", [DDPM(), DDPM(table="cosine", steps=200)])
def test_levels_of_a_ddpm_table(table: DDPM) -> None:
    """Between the ends only levels of the table are visited, at evenly spaced steps."""
    low, high = (float(table.sigma(torch.tensor(t).double())) for t in (0.0, 1.0))
    sigmas = ddpm_table(10, low, high, table=table)
    steps = table.index(sigmas[:-1])
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-6)
    assert float((steps.diff() + (table.steps - 1) / 9).abs().max()) <= 1
    assert sigmas[[0, -2, -1]].tolist() == [high, low, 0]
    every = ddpm_table(table.steps, low, high, table=table)
    torch.testing.assert_close(table.index(every[:-1]), torch.arange(table.steps).flip(0).double())
    with refuses("steps"):
        ddpm_table(table.steps + 1, low, high, table=table)
