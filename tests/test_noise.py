"""Noise laws, paths and conversions."""

import itertools
import math
from collections.abc import Callable
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.noise import (
    LogitNormal,
    LogNormal,
    LogUniform,
    NoiseLaw,
    Truncated,
    UniformTime,
)
from patchdiffusion.paths import DDPM, PATHS, VP, Path, Prediction, convert

LAWS: list[NoiseLaw] = [
    LogNormal(),
    LogNormal(mean=0.5, std=2.0),
    LogitNormal(),
    LogitNormal(mean=-0.4, std=1.2, shift=3.0),
    LogUniform(),
    UniformTime(),
    UniformTime(path="cosine"),
    UniformTime(path="flow"),
    Truncated(law=LogNormal(), low=0.3, high=0.9, scale=0.5),
]
ALL_PATHS: dict[str, Path] = {**PATHS, "ddpm": DDPM(), "ddpm-cosine": DDPM(table="cosine")}
QUANTILES = torch.linspace(0.001, 0.999, 501, dtype=torch.float64)
TIMES = torch.linspace(0.02, 0.95, 40, dtype=torch.float64)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    """Equal up to rounding, relative to the larger values."""
    return float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


# ---- Laws ----


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_level_inverts_draw(law: NoiseLaw) -> None:
    sigma = law.icdf(QUANTILES)
    assert bool((sigma.diff() > 0).all()) and bool((sigma > 0).all())
    assert close(law.cdf(sigma), QUANTILES, 1e-10)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_levels_of_any_sigma_lie_in_0_1(law: NoiseLaw) -> None:
    level = law.cdf(torch.tensor([1e-8, 1e-3, 1.0, 80.0, 1e6], dtype=torch.float64))
    assert bool(((level >= 0) & (level <= 1)).all())
    assert bool((level.diff() >= 0).all())


def test_parts_of_a_law_are_the_law() -> None:
    law, u = LogNormal(), QUANTILES
    assert torch.equal(Truncated(law=law).icdf(u), law.icdf(u))
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    low, high = Truncated(law=law, low=0.25, high=0.75, scale=0.5).icdf(ends).tolist()
    assert [low, high] == (0.5 * law.icdf(torch.tensor([0.25, 0.75]).double())).tolist()
    halves = torch.cat([Truncated(law=law, high=0.5).icdf(u), Truncated(law=law, low=0.5).icdf(u)])
    assert close(halves, law.icdf(torch.cat([0.5 * u, 0.5 + 0.5 * u])))


def test_log_normal_is_edms() -> None:
    u = rng.uniform(rng.keys(0, "u", 0, torch.arange(1)), 400000)[0]
    log = LogNormal().icdf(u).log()
    assert abs(float(log.mean()) + 1.2) < 4 * 1.2 / math.sqrt(400000)
    assert abs(float(log.std()) - 1.2) < 4 * 1.2 / math.sqrt(800000)


def test_log_normal_is_a_logit_normal_flow_time() -> None:
    sigma = LogNormal(mean=0.3, std=0.8).icdf(QUANTILES)
    time = PATHS["flow"].time(sigma)
    assert close(time.logit(), 0.3 + 0.8 * torch.special.ndtri(QUANTILES))


def test_the_shift_of_flow_times_multiplies_sigma() -> None:
    """The law of shifted logit-normal times, drawn as it is defined."""
    time = (0.2 + 0.7 * torch.special.ndtri(QUANTILES)).sigmoid()
    shifted = 3 * time / (1 + 2 * time)
    law = LogitNormal(mean=0.2, std=0.7, shift=3.0)
    assert close(PATHS["flow"].time(law.icdf(QUANTILES)), shifted)
    assert torch.equal(LogitNormal(mean=0.3, std=0.8).icdf(QUANTILES),
                       LogNormal(mean=0.3, std=0.8).icdf(QUANTILES))  # fmt: skip


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
    (found,) = torch.autograd.grad(UniformTime(path=path).cdf(sigma).sum(), sigma)
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
    ends = law.icdf(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    assert ends == pytest.approx([low, high], rel=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogNormal(std=0.0), "std"),
        (lambda: LogNormal(mean=math.nan), "mean"),
        (lambda: LogNormal(mean=1000.0), "mean"),
        (lambda: LogNormal(std=math.inf), "std"),
        (lambda: LogitNormal(std=0.0), "LogitNormal"),
        (lambda: LogitNormal(shift=0.0), "shift must be positive and finite, or size, not 0.0"),
        (lambda: LogUniform(sigma_min=0.0), "0 < sigma_min < sigma_max"),
        (lambda: LogUniform(sigma_min=2.0, sigma_max=1.0), "0 < sigma_min < sigma_max"),
        (lambda: UniformTime(margin=0.5), "margin"),
        (lambda: UniformTime(margin=0.0), "margin"),
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


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("source", get_args(Prediction))
@pytest.mark.parametrize("target", get_args(Prediction))
def test_conversions_next_to_an_end(source: Prediction, target: Prediction, path: Path) -> None:
    """In float32 as exact as the formula of the table, which may divide by s or a."""
    key = rng.keys(0, "ends", 0, torch.arange(2))
    for time in (1e-4, 1e-3, 0.999):
        t = torch.full((2, 1), time, dtype=torch.float64)
        x0, eps = (rng.normal(rng.subkeys(key, name), (64,), torch.float64) for name in "ab")
        z = path.a(t) * x0 + path.s(t) * eps
        value = convert(eps, z, t, path, "eps", source)
        exact = convert(value, z, t, path, source, target)
        found = convert(value.float(), z.float(), t.float(), path, source, target)
        a, s = float(path.a(t)[0]), float(path.s(t)[0])
        # What the table divides the source by, at most, and what its numbers are.
        size = 1 + max(1 / s if source == "x0" else 1.0, 1 / a if source in ("eps", "score") else 1)
        scale = float(exact.abs().max()) * size * (1 / s if target == "score" else 1)
        assert float((found - exact).abs().max()) < 2e-6 * max(scale, size), (time, scale)


def test_conversions_at_the_ends_themselves() -> None:
    """Nothing is divided that the formula does not divide."""
    z, value = torch.tensor([1.5]), torch.tensor([-1.2])
    start, end = torch.zeros(1), torch.ones(1)
    for path in (PATHS["cosine"], PATHS["flow"]):
        assert convert(value, z, start, path, "v", "eps") == value
        assert convert(value, z, start, path, "eps", "x0") == z
        assert bool(convert(value, z, end, path, "velocity", "x0").isfinite())
    assert convert(value, z, start, PATHS["flow"], "velocity", "eps") == value + z
    assert convert(value, z, end, PATHS["flow"], "score", "eps") == -value


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
