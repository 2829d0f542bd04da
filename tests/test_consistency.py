"""Consistency models: the boundary, the schedules, and the loss against closed forms."""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from commands import refuses
from oracles import MEAN, STD, Exact, Little, batch, draws, gaussian, normal
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.losses import Batch
from patchdiffusion.noise import LogNormal, LogUniform
from patchdiffusion.objectives.base import Materials
from patchdiffusion.objectives.consistency import (
    Boundary,
    ConsistencyConfig,
    ConsistencyLoss,
    ConsistencyMap,
    num_levels,
    pseudo_huber,
)
from patchdiffusion.objectives.discrete import Levels
from patchdiffusion.parameterisation import EDM
from patchdiffusion.paths import per_sample
from patchdiffusion.solvers.schedules import karras
from patchdiffusion.train.parallel import LossModule

LAW = LogNormal(mean=-1.1, std=2.0)


def denoiser(seed: int = 0, precond: Boundary | None = None) -> NetDenoiser:
    return NetDenoiser(Little(seed), precond or Boundary())


def crops(x0: Tensor, cond: Cond | None = None, progress: float = 0.0) -> Batch:
    return batch(x0, cond, progress, LAW)


def loss_of(config: ConsistencyConfig, **parts: Any) -> ConsistencyLoss:
    return ConsistencyLoss(config=config, **parts)


# ---- The boundary ----


@pytest.mark.parametrize("sigma_min", [0.002, 0.0123, 0.5])
def test_at_sigma_min_it_is_the_identity(sigma_min: float) -> None:
    x, f = normal(5, (1, 4, 4)).float(), denoiser(precond=Boundary(sigma_min=sigma_min))
    sigma = Levels(sigma_min=sigma_min).at(torch.zeros(5), 18)
    assert torch.equal(f(x, sigma), x)
    assert not torch.allclose(f(x, 2 * sigma), x, atol=1e-4)


def test_without_a_smallest_level_it_is_that_of_edm() -> None:
    sigma = torch.logspace(-2, 2, 9, dtype=torch.float64)
    ours, edm = Boundary(sigma_data=0.7, sigma_min=0.0), EDM(sigma_data=0.7)
    for a, b in zip(ours.scales(sigma), edm.scales(sigma), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-15, atol=0)


def test_the_map_goes_to_sigma_min_only() -> None:
    x, f = normal(3, (1, 2, 2)).float(), denoiser()
    flow_map = ConsistencyMap(f=f)
    assert torch.equal(flow_map(x, 3.0, 0.002), f(x, 3.0))
    with refuses(0.002, 0.5):
        flow_map(x, 3.0, 0.5)


def test_jumps_are_spaced_like_levels() -> None:
    times = ConsistencyMap(f=denoiser(), sigma_min=0.01, sigma_max=50.0).times(3)
    torch.testing.assert_close(times, karras(4, 0.01, 50.0)[:-1], rtol=0, atol=0)


# ---- Schedules ----


def test_the_number_of_levels_doubles() -> None:
    """iCT, table 1: N(k) = min(s0 2^floor(k / K'), s1) + 1, K' = floor(K / (log2(s1/s0) + 1))."""
    total, s0, s1 = 400_000, 10, 1280
    each = math.floor(total / (math.log2(s1 // s0) + 1))
    for k in range(0, total, 997):
        expected = min(s0 * 2 ** math.floor(k / each), s1) + 1
        assert num_levels("doubling", k / total, s0, s1) == expected
    assert {num_levels("doubling", p / 80, 10, 1280) for p in range(81)} == {
        10 * 2**k + 1 for k in range(8)
    }
    assert {num_levels("doubling", p / 80, 17, 17) for p in range(81)} == {18}


def test_the_number_of_levels_grows_as_a_root() -> None:
    """CT, appendix C: N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1."""
    total, s0, s1 = 800_000, 2, 150
    for k in range(0, total, 1999):
        root = math.sqrt(k / total * ((s1 + 1) ** 2 - s0**2) + s0**2)
        assert num_levels("quadratic", k / total, s0, s1) == math.ceil(root - 1) + 1
    assert num_levels("quadratic", 0.0, s0, s1) == 2
    assert num_levels("quadratic", 1.0, s0, s1) == 151


def test_pseudo_huber_is_that_of_the_paper() -> None:
    """sqrt(|d|^2 + c^2) - c with sums over D numbers and c = .00054 sqrt(D)."""
    d = normal(6, (3, 8, 8))
    c = 0.00054 * math.sqrt(192)
    paper = (d.square().flatten(1).sum(1) + c**2).sqrt() - c
    ours = pseudo_huber(d.square().flatten(1).mean(1), 0.00054)
    torch.testing.assert_close(math.sqrt(192) * ours, paper, rtol=1e-12, atol=0)


# ---- Neighboring levels ----


def levels(config: ConsistencyConfig, count: int, progress: float = 0.0) -> tuple[Tensor, Tensor]:
    return ConsistencyLoss(config=config).neighbors(draws(count), progress, LAW)


@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("uniform", [False, True])
def test_neighbors_are_neighbors_on_the_grid(uniform: bool, progress: float) -> None:
    config = ConsistencyConfig(uniform=uniform)
    count = num_levels("doubling", progress, 10, 1280)
    grid = Levels().at(torch.arange(count), count)
    high, low = levels(config, 500, progress)
    places = torch.searchsorted(grid, low)
    assert torch.equal(grid[places], low) and torch.equal(grid[places + 1], high)
    assert high.dtype == torch.float32


def test_levels_follow_the_discrete_law() -> None:
    """p(n) ~ erf((ln t_n+1 - m) / (sqrt 2 s)) - erf((ln t_n - m) / (sqrt 2 s)) (iCT, table 1)."""
    config, count = ConsistencyConfig(), 20_000
    grid = Levels().at(torch.arange(11).double(), 11).double()
    cumulative = torch.erf((grid.log() - LAW.mean) / (math.sqrt(2) * LAW.std))
    expected = cumulative.diff() / cumulative.diff().sum()
    low = levels(config, count)[1]
    found = torch.stack([(low == level.float()).double().mean() for level in grid[:-1]])
    torch.testing.assert_close(found, expected, rtol=0, atol=2 / count)
    even = levels(replace(config, uniform=True), count)[1]
    shares = torch.stack([(even == level.float()).double().mean() for level in grid[:-1]])
    torch.testing.assert_close(shares, torch.full_like(shares, 0.1), rtol=0, atol=2 / count)


def test_a_group_may_have_its_own_law() -> None:
    loss = ConsistencyLoss(config=ConsistencyConfig(first=40, last=40))
    high, low = loss.neighbors(draws(50), 0.0, LogUniform(sigma_min=1.0, sigma_max=2.0))
    assert float(low.min()) > 0.6 and float(high.max()) < 3.0


# ---- The loss ----


def by_hand(
    f: NetDenoiser, x0: Tensor, high: Tensor, low: Tensor, eps: Tensor, cond: Cond
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        goal = f(x0 + per_sample(low, x0) * eps, low, cond)
    return f(x0 + per_sample(high, x0) * eps, high, cond), goal


def test_the_default_is_that_of_ict() -> None:
    f, x0 = denoiser(), normal(8, (1, 4, 4)).float()
    cond, progress = Cond(labels=torch.arange(8) % 3), 0.5
    loss = loss_of(ConsistencyConfig())
    out = loss(f, crops(x0, cond, progress), draws(8))
    high, low = loss.neighbors(draws(8), progress, LAW)
    prediction, goal = by_hand(f, x0, high, low, draws(8).normal("noise", (1, 4, 4)), cond)
    square = (prediction - goal).square().flatten(1).mean(1)
    expected = ((square + 0.00054**2).sqrt() - 0.00054) / (high - low)
    torch.testing.assert_close(out.per_sample, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.scalars["consistency error"], square.detach().mean())
    assert num_levels("doubling", progress, 10, 1280) == 161


def test_gradients_go_into_the_noisier_side_only() -> None:
    f, x0 = denoiser(), normal(8, (1, 4, 4)).float()
    config = ConsistencyConfig(huber=0.0, weighted=False)
    out = loss_of(config)(f, crops(x0), draws(8))
    (found,) = torch.autograd.grad(out.per_sample.sum(), [f.network.get_parameter("mix")])
    high, low = loss_of(config).neighbors(draws(8), 0.0, LAW)
    prediction, goal = by_hand(f, x0, high, low, draws(8).normal("noise", (1, 4, 4)), Cond())
    expected = torch.autograd.grad(
        (prediction - goal).square().flatten(1).mean(1).sum(), [f.network.get_parameter("mix")]
    )[0]
    torch.testing.assert_close(found, expected)


def test_both_sides_have_the_same_dropout_and_label() -> None:
    network = Little()
    loss = loss_of(ConsistencyConfig())
    given = crops(normal(20, (1, 2, 2)).float(), Cond(labels=torch.zeros(20).long()))
    LossModule(NetDenoiser(network, Boundary()), loss, dropout=0.5)(given, draws(20))
    first, second = network.calls
    assert first.seed is not None and second.seed is not None and first.labels is not None
    assert second.labels is not None and torch.equal(first.seed, second.seed)
    assert torch.equal(first.labels, second.labels) and set(first.labels.tolist()) == {-1, 0}


def test_the_target_may_be_an_average() -> None:
    f, average, x0 = denoiser(), denoiser(1), normal(4, (1, 2, 2)).float()
    materials = Materials(network=tiny.NETWORK.build(), average=lambda: average)
    own = ConsistencyConfig().build(materials)
    other = ConsistencyConfig(target="average").build(materials)
    assert own.target is None and other.target is average
    a, b = (loss(f, crops(x0), draws(4)).per_sample for loss in (own, other))
    assert not torch.allclose(a, b)


def test_distillation_follows_the_teacher() -> None:
    network, average, x0 = Little(), denoiser(1), normal(8, (1, 2, 2)).float()
    oracle, seeds = gaussian((1, 2, 2)), []

    def teacher(x: Tensor, sigma: Tensor, cond: Cond | None = None, **_: object) -> Tensor:
        seeds.append(None if cond is None else cond.seed)
        return oracle(x, sigma)

    config = ConsistencyConfig(huber=0.0, weighted=False, uniform=True, target="average")
    loss = loss_of(config, target=average, teacher=teacher)  # type: ignore
    f = NetDenoiser(network, Boundary())
    out = loss(f, crops(x0), draws(8))
    high, low = loss.neighbors(draws(8), 0.0, LAW)
    wide, x = (
        per_sample(low - high, x0),
        x0 + per_sample(high, x0) * draws(8).normal("noise", (1, 2, 2)),
    )
    slope = (x - oracle(x, high)) / per_sample(high, x)
    ahead = x + wide * slope
    below = x + wide * (slope + (ahead - oracle(ahead, low)) / per_sample(low, x)) / 2
    expected = (f(x, high) - average(below, low)).square().flatten(1).mean(1)
    torch.testing.assert_close(out.per_sample, expected, rtol=1e-5, atol=1e-7)
    assert seeds == [None, None]  # a teacher drops nothing


class Scaled:
    """The exact consistency function of the Gaussian, but with one free number."""

    def __init__(self, sigma_min: float, gain: float = 1.0):
        self.gain = torch.tensor(gain, dtype=torch.float64, requires_grad=True)
        self.sigma_min = sigma_min

    def __call__(self, x: Tensor, sigma: Tensor, cond: Cond | None = None, **_: object) -> Tensor:
        exact = Exact()(x, sigma, self.sigma_min)
        # f(x) = x at sigma_min, whatever the gain.
        away = per_sample(sigma - self.sigma_min, x) / per_sample(1 + sigma, x)
        return exact + (self.gain - 1) * away * (exact - MEAN)


def quadrature(loss: ConsistencyLoss, gain: float, level: int) -> Tensor:
    """The gradient of the expected loss in the gain, exactly: it is quadratic in x0 and eps."""
    nodes = torch.tensor([-math.sqrt(3), 0.0, math.sqrt(3)], dtype=torch.float64)
    weights = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
    a, b = (grid.flatten() for grid in torch.meshgrid(nodes, nodes, indexing="ij"))
    x0, eps = (MEAN + STD * a)[:, None], b[:, None]
    count = loss.config.first + 1
    ends = Levels(sigma_min=loss.config.sigma_min, sigma_max=loss.config.sigma_max)
    high, low = (ends.at(torch.full((9,), level + i), count).double() for i in (1, 0))
    f = Scaled(loss.config.sigma_min, gain)
    object.__setattr__(loss, "neighbors", lambda *_: (high, low))
    given = draws(9)
    object.__setattr__(given, "normal", lambda *_: eps)
    out = loss(f, crops(x0), given)  # type: ignore
    weight = (weights[:, None] * weights).flatten()
    return torch.autograd.grad((weight * out.per_sample).sum(), [f.gain])[0]


def test_training_and_distillation_agree_in_the_limit() -> None:
    """2303.01469, theorem 2; the relative difference vanishes with the distance of the levels."""
    differences = []
    for count in (40, 80, 160, 320):
        config = ConsistencyConfig(
            first=count, last=count, huber=0.0, weighted=False, sigma_min=0.1, sigma_max=10.0
        )
        trained, distilled = (
            quadrature(loss_of(config, teacher=teacher), 1.3, count // 2)
            for teacher in (None, gaussian((1,)))
        )
        differences.append(float((trained / distilled - 1).abs()))
    ratios = [a / b for a, b in itertools.pairwise(differences)]
    assert differences[-1] < 0.02 and all(1.95 < r < 2.1 for r in ratios), (differences, ratios)


def test_the_exact_function_is_where_distillation_ends() -> None:
    config = ConsistencyConfig(
        first=160, last=160, huber=0.0, weighted=False, sigma_min=0.1, sigma_max=10.0
    )
    loss = loss_of(config, teacher=gaussian((1,)))
    at, below, above = (float(quadrature(loss, gain, 80)) for gain in (1.0, 0.9, 1.1))
    assert below < 0 < above and abs(at) < 0.01 * min(above, -below)


# ---- Refused ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma_min": 0.0}, "0 < sigma_min < sigma_max < inf, not 0.0, 80.0"),
        ({"sigma_max": math.inf}, "sigma_min < sigma_max < inf"),
        ({"first": 1}, "2 <= first <= last <= 1000000, not 1, 1280"),
        ({"first": 20, "last": 10}, "not 20, 10"),
        ({"huber": -1.0}, "huber >= 0"),
        ({"rho": 0.0}, "rho > 0"),
    ],
)
def test_impossible_settings(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(ConsistencyConfig(), **changes)  # type: ignore
