"""Noise laws, paths, conversions and grids."""

import itertools
import math
from collections.abc import Callable
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.ddpm import DDPM
from patchdiffusion.noise import (
    PATHS,
    VP,
    LogitNormal,
    LogNormal,
    LogUniform,
    NoiseLaw,
    Part,
    Path,
    Prediction,
    UniformTime,
    convert,
    flow_uniform,
    karras,
    log_uniform,
    time_uniform,
)

LAWS: list[NoiseLaw] = [
    LogNormal(),
    LogNormal(mean=0.5, std=2.0),
    LogitNormal(),
    LogitNormal(mean=-0.4, std=1.2, shift=3.0),
    LogUniform(),
    UniformTime(),
    UniformTime(path="cosine"),
    UniformTime(path="flow"),
    Part(law=LogNormal(), low=0.3, high=0.9, scale=0.5),
]
ALL_PATHS: dict[str, Path] = {**PATHS, "ddpm": DDPM(), "ddpm-cosine": DDPM(schedule="cosine")}
QUANTILES = torch.linspace(0.001, 0.999, 501, dtype=torch.float64)
TIMES = torch.linspace(0.02, 0.95, 40, dtype=torch.float64)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    """Equal up to rounding, relative to the larger values."""
    return float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


# ---- Laws ----


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_level_inverts_draw(law: NoiseLaw) -> None:
    sigma = law.draw(QUANTILES)
    assert bool((sigma.diff() > 0).all()) and bool((sigma > 0).all())
    assert close(law.level(sigma), QUANTILES, 1e-10)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_levels_of_any_sigma_lie_in_0_1(law: NoiseLaw) -> None:
    level = law.level(torch.tensor([1e-8, 1e-3, 1.0, 80.0, 1e6], dtype=torch.float64))
    assert bool(((level >= 0) & (level <= 1)).all())
    assert bool((level.diff() >= 0).all())


def test_parts_of_a_law_are_the_law() -> None:
    law, u = LogNormal(), QUANTILES
    assert torch.equal(Part(law=law).draw(u), law.draw(u))
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    low, high = Part(law=law, low=0.25, high=0.75, scale=0.5).draw(ends).tolist()
    assert [low, high] == (0.5 * law.draw(torch.tensor([0.25, 0.75]).double())).tolist()
    halves = torch.cat([Part(law=law, high=0.5).draw(u), Part(law=law, low=0.5).draw(u)])
    assert close(halves, law.draw(torch.cat([0.5 * u, 0.5 + 0.5 * u])))


def test_log_normal_is_edms() -> None:
    u = rng.uniform(rng.keys(0, "u", 0, torch.arange(1)), 400000)[0]
    log = LogNormal().draw(u).log()
    assert abs(float(log.mean()) + 1.2) < 4 * 1.2 / math.sqrt(400000)
    assert abs(float(log.std()) - 1.2) < 4 * 1.2 / math.sqrt(800000)


def test_log_normal_is_a_logit_normal_flow_time() -> None:
    sigma = LogNormal(mean=0.3, std=0.8).draw(QUANTILES)
    time = PATHS["flow"].time(sigma)
    assert close(time.logit(), 0.3 + 0.8 * torch.special.ndtri(QUANTILES))


def test_the_shift_of_flow_times_multiplies_sigma() -> None:
    """The law of shifted logit-normal times, drawn as it is defined."""
    time = (0.2 + 0.7 * torch.special.ndtri(QUANTILES)).sigmoid()
    shifted = 3 * time / (1 + 2 * time)
    law = LogitNormal(mean=0.2, std=0.7, shift=3.0)
    assert close(PATHS["flow"].time(law.draw(QUANTILES)), shifted)
    assert torch.equal(LogitNormal(mean=0.3, std=0.8).draw(QUANTILES),
                       LogNormal(mean=0.3, std=0.8).draw(QUANTILES))  # fmt: skip


def vp_density(sigma: Tensor) -> Tensor:
    """dt / dsigma with (1 + sigma^2) = exp(B), B' = beta."""
    t = VP().time(sigma)
    return 2 * sigma / ((1 + sigma**2) * (0.1 + 19.9 * t))


@pytest.mark.parametrize(
    ("path", "density"),
    [
        ("flow", lambda sigma: (1 + sigma) ** -2),
        ("cosine", lambda sigma: 2 / math.pi / (1 + sigma**2)),
        ("vp", vp_density),
    ],
)
def test_densities_of_uniform_times(
    path: Literal["flow", "cosine", "vp"], density: Callable[[Tensor], Tensor]
) -> None:
    sigma = torch.tensor([0.01, 0.5, 1.0, 7.0], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(UniformTime(path=path).level(sigma).sum(), sigma)
    assert close(found, density(sigma.detach()), 3e-5)  # the margin


@pytest.mark.parametrize(
    ("law", "low", "high"),
    [
        (LogNormal(), 0, math.inf),
        (LogitNormal(shift=3.0), 0, math.inf),
        (LogUniform(), 0.02, 100),
        (UniformTime(path="flow"), 1e-5, 1e5),
        (UniformTime(path="vp"), 1.0002e-3, 152.0),
    ],
)
def test_the_ends_of_a_law(law: NoiseLaw, low: float, high: float) -> None:
    ends = law.draw(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    assert ends == pytest.approx([low, high], rel=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogNormal(std=0.0), "std > 0"),
        (lambda: LogNormal(mean=math.nan), "finite mean"),
        (lambda: LogNormal(std=math.inf), "std > 0"),
        (lambda: LogitNormal(std=0.0), "LogitNormal needs a finite mean and std > 0"),
        (lambda: LogitNormal(shift=0.0), "finite shift > 0, not 0.0"),
        (lambda: LogUniform(sigma_min=0.0), "0 < sigma_min < sigma_max"),
        (lambda: LogUniform(sigma_min=2.0, sigma_max=1.0), "0 < sigma_min < sigma_max"),
        (lambda: UniformTime(margin=0.5), r"margin in \(0, 0.5\)"),
        (lambda: UniformTime(margin=0.0), r"margin in \(0, 0.5\)"),
        (lambda: karras(0), "at least 1 step, not 0"),
        (lambda: karras(10**30), "at most 1,000,000 steps, not 1000"),
        (lambda: karras(5, rho=0.0), "rho must be positive"),
        (lambda: karras(5, 1.0, 1.0), "0 < sigma_min < sigma_max"),
        (lambda: log_uniform(5, 0.1, math.inf), "0 < sigma_min < sigma_max"),
        (lambda: log_uniform(-1), "at least 1 step, not -1"),
    ],
)
def test_impossible_values_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- Paths ----


@pytest.mark.parametrize("path", ALL_PATHS.values(), ids=ALL_PATHS)
def test_derivatives_are_those_of_autograd(path: Path) -> None:
    t = TIMES.clone().requires_grad_()
    for value, derivative in ((path.a, path.da), (path.s, path.ds)):
        out = value(t)
        expected = torch.autograd.grad(out.sum() + 0 * t.sum(), t)[0]
        assert close(derivative(TIMES), expected)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_time_inverts_sigma(path: Path) -> None:
    t = torch.cat([torch.tensor([1e-6, 1e-4], dtype=torch.float64), TIMES])
    assert float((path.time(path.sigma(t)) / t - 1).abs().max()) < 1e-9
    assert close(path.sigma(TIMES), path.s(TIMES) / path.a(TIMES))


@pytest.mark.parametrize("name", ["vp", "cosine", "ddpm", "ddpm-cosine"])
def test_variance_is_preserved(name: str) -> None:
    path = ALL_PATHS[name]
    assert close(path.a(TIMES) ** 2 + path.s(TIMES) ** 2, torch.ones_like(TIMES))


def test_vp_is_the_published_schedule() -> None:
    t = torch.tensor([1e-5, 1.0], dtype=torch.float64)
    assert close(VP().sigma(t), (torch.exp(0.5 * 19.9 * t**2 + 0.1 * t) - 1).sqrt())
    assert float(VP().sigma(t)[1]) == pytest.approx(152.2, abs=0.1)


def test_vp_time_keeps_its_digits_in_float32() -> None:
    sigma = torch.tensor([1e-4, 2e-3, 0.1, 80.0])
    exact = VP().time(sigma.double())
    assert float((VP().time(sigma) / exact - 1).abs().max()) < 1e-6


# ---- Conversions ----


@pytest.mark.parametrize("path", ALL_PATHS.values(), ids=ALL_PATHS)
@pytest.mark.parametrize(
    ("source", "target"), list(itertools.product(get_args(Prediction), repeat=2))
)
def test_every_cell_of_the_conversion_table(
    source: Prediction, target: Prediction, path: Path
) -> None:
    t = TIMES[:, None]
    z = rng.normal(rng.keys(0, "z", 0, torch.arange(len(TIMES))), (16,), torch.float64)
    x0 = rng.normal(rng.keys(0, "x0", 0, torch.arange(len(TIMES))), (16,), torch.float64)
    a, s = path.a(t), path.s(t)
    eps = (z - a * x0) / s
    known = {
        "x0": x0,
        "eps": eps,
        "score": -eps / s,
        "v": a * eps - s * x0,
        "velocity": path.da(t) * x0 + path.ds(t) * eps,
    }
    there = convert(known[source], z, t, path, source, target)
    assert close(there, known[target])
    assert close(convert(there, z, t, path, target, source), known[source])


def test_velocity_is_the_derivative_along_the_path() -> None:
    x0, eps = torch.tensor([0.7], dtype=torch.float64), torch.tensor([-1.3], dtype=torch.float64)
    for path in PATHS.values():
        t = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad((path.a(t) * x0 + path.s(t) * eps).sum(), t)
        z = path.a(t).detach() * x0 + path.s(t).detach() * eps
        assert close(convert(eps, z, t.detach(), path, "eps", "velocity"), expected)


@pytest.mark.parametrize(("source", "target"), [("noise", "x0"), ("x0", "u")])
def test_unknown_prediction(source: Prediction, target: Prediction) -> None:
    with pytest.raises(ValueError, match=r"unknown prediction '(noise|u)', allowed: .*'x0'"):
        convert(TIMES, TIMES, TIMES, PATHS["vp"], source, target)


# ---- Grids ----


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
    with pytest.raises(ValueError, match=r"shift must be positive and finite, not 0\.0"):
        flow_uniform(3, shift=0.0)
    with pytest.raises(ValueError, match=r"power must be positive, not -1\.0"):
        time_uniform(3, power=-1.0)
    with pytest.raises(ValueError, match=r"the vp path has no room for sigma_max 1e\+200"):
        time_uniform(3, sigma_max=1e200)
    with pytest.raises(ValueError, match=r"the flow path has no room for sigma_max 1e\+20"):
        flow_uniform(3, sigma_max=1e20)
    with pytest.raises(ValueError, match=r"sigma_max 80\.0 or 1e-200"):
        time_uniform(3, 1e-200)
    for grid in (time_uniform, flow_uniform):
        with pytest.raises(ValueError, match="at least 1 step, not 0"):
            grid(0)
        with pytest.raises(ValueError, match="sigma_min < sigma_max"):
            grid(3, 2.0, 1.0)
