"""Flow maps of a Gaussian, which are known exactly, and how they are sampled with."""

import math

import pytest
import torch
from commands import refuses
from oracles import MEAN, STD, Exact, gaussian, normal, spread
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.flowmap import FlowMap, PatchMap
from patchdiffusion.objectives.consistency import ConsistencyMap
from patchdiffusion.objectives.ctm import TrajectoryMap
from patchdiffusion.objectives.discrete import Levels, heun_step
from patchdiffusion.objectives.meanflow import MeanFlowMap
from patchdiffusion.patches import coordinates
from patchdiffusion.paths import VE, Cosine, Flow, Path
from patchdiffusion.solvers import heun, run, solve
from patchdiffusion.solvers.jumps import jump
from patchdiffusion.solvers.schedules import karras

FRAMES = {"ve": Exact(), "flow": Exact(path=Flow(), first=1.0)}
EVEN = torch.linspace(1, 0, 5, dtype=torch.float64)


# ---- The oracle itself ----


def test_the_exact_map_is_what_a_solver_finds() -> None:
    x = 10 * normal(50)
    found = solve(heun, gaussian(), x, karras(2000, 0.05, 10.0)[:-1])
    torch.testing.assert_close(Exact()(x, 10.0, 0.05), found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", [VE(), Flow(), Cosine()])
def test_it_is_a_semigroup(path: Path) -> None:
    exact, z = Exact(path=path), normal(20)
    straight = exact(z, 0.9, 0.2)
    torch.testing.assert_close(exact(exact(z, 0.9, 0.5), 0.5, 0.2), straight, rtol=0, atol=1e-15)
    torch.testing.assert_close(exact(z, 0.9, 0.9), z, rtol=0, atol=1e-15)


# ---- Sampling ----


@pytest.mark.parametrize("frame", FRAMES)
def test_jumps_compose(frame: str) -> None:
    exact, z = FRAMES[frame], normal(20) * (80 if frame == "ve" else 1)
    ends = [run(jump(exact, z, exact.times(n))).x for n in (1, 3, 8)]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("gamma", [0.0, 0.4, 1.0])
def test_fresh_noise_keeps_every_marginal(frame: str, gamma: float) -> None:
    exact, count = FRAMES[frame], 40_000
    times = exact.times(4) if frame == "flow" else karras(4, 0.3)
    first = times[:1]
    z = exact.path.a(first) * MEAN + spread(exact.path, first) * normal(count, (1,))
    states = jump(exact, z, times, noise=lambda i: normal(count, (1,), f"n{i}"), gamma=gamma)
    for state, time in zip(states, times[1:], strict=True):
        std = float(spread(exact.path, time))
        assert float(state.x.mean()) == pytest.approx(
            float(exact.path.a(time)) * MEAN, abs=4 * std / math.sqrt(count)
        )
        assert float(state.x.std()) == pytest.approx(std, rel=4 / math.sqrt(2 * count))
        assert state.step >= 1


def test_fresh_noise_is_fresh() -> None:
    """Independent of where the jumps began, which gamma 0 is a function of."""
    exact, z = Exact(), 80 * normal(5000, (1,))
    times = torch.tensor([80.0, 2.0, 0.0], dtype=torch.float64)
    for gamma, low, high in ((0.0, 0.999, 1.01), (1.0, -0.05, 0.35)):
        end = run(jump(exact, z, times, noise=lambda i: normal(5000, (1,), "f"), gamma=gamma)).x
        assert low < float(torch.corrcoef(torch.stack([z[:, 0], end[:, 0]]))[0, 1]) < high


def test_gamma_sampling_is_that_of_ctm() -> None:
    """Jump to sqrt(1 - gamma^2) t, add gamma t z."""
    exact, z, fresh = Exact(), 80 * normal(10), normal(10, stream="fresh")
    times, gamma = torch.tensor([80.0, 3.0, 0.0], dtype=torch.float64), 0.6
    middle = exact(z, 80.0, 0.8 * 3.0) + gamma * 3.0 * fresh
    found = run(jump(exact, z, times, noise=lambda i: fresh, gamma=gamma)).x
    torch.testing.assert_close(found, exact(middle, 3.0, 0.0), rtol=1e-13, atol=1e-13)


def test_multistep_consistency_sampling() -> None:
    """x <- f(x, t) + sqrt(t^2 - e^2) z, with maps that end at e."""
    e, ends = 0.1, Exact(last=0.1)

    def f(x: Tensor, t: float) -> Tensor:
        return ends(x, t, e)

    consistency = ConsistencyMap(f=lambda x, t, cond=None, **_: f(x, t), sigma_min=e)  # type: ignore
    x, fresh = 80 * normal(10), [normal(10, stream=f"f{i}") for i in range(2)]
    times = torch.tensor([80.0, 5.0, 1.0, e], dtype=torch.float64)
    found = run(jump(consistency, x, times, noise=lambda i: fresh[i])).x
    x = f(x, 80.0) + math.sqrt(5.0**2 - e**2) * fresh[0]
    x = f(x, 5.0) + math.sqrt(1.0**2 - e**2) * fresh[1]
    torch.testing.assert_close(found, f(x, 1.0), rtol=1e-13, atol=1e-13)


def test_where_fresh_noise_comes_from_must_be_said() -> None:
    with refuses("noise"):
        run(jump(Exact(), normal(2), karras(3), gamma=1.0))
    assert len(list(jump(Exact(), normal(2), karras(1), gamma=1.0))) == 1  # the last needs none


# ---- The three maps ----


@pytest.mark.parametrize(
    "flow_map",
    [
        ConsistencyMap(f=gaussian()),
        TrajectoryMap(g=gaussian()),
        MeanFlowMap(network=torch.nn.Identity()),
    ],
)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_times_begin_at_noise_and_end_at_the_image(flow_map: FlowMap, steps: int) -> None:
    times = flow_map.times(steps)
    assert isinstance(flow_map, FlowMap) and not isinstance(gaussian(), FlowMap)
    assert times.dtype == torch.float64 and len(times) == steps + 1
    assert bool((times.diff() < 0).all())
    noise, image = float(flow_map.path.s(times[0])), float(flow_map.path.s(times[-1]))
    assert noise in (80.0, 1.0) and image == pytest.approx(flow_map.gamma * 0.002, rel=1e-12)
    with refuses(1):
        flow_map.times(-1)


def test_a_region_is_told_where_it_lies() -> None:
    seen: list[Cond] = []

    class Spy(Exact):
        def __call__(
            self, z: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond | None = None
        ) -> Tensor:
            seen.append(cond or Cond())
            return z

    placed = PatchMap(Spy(gamma=0.5), (16, 12), (4, 2))
    assert isinstance(placed, FlowMap) and placed.gamma == 0.5 and placed.path == VE()
    assert torch.equal(placed.times(3), Exact().times(3))
    placed(torch.zeros(2, 1, 8, 6), 1.0, 0.5, Cond(labels=torch.tensor([3, 4])))
    corner = torch.tensor([[4, 2], [4, 2]])
    assert seen[0].pos is not None and seen[0].labels is not None
    assert torch.equal(seen[0].pos, coordinates(corner, (8, 6), (16, 12)))
    assert seen[0].labels.tolist() == [3, 4]


# ---- Tools ----


def test_a_heun_step_is_that_of_the_solver() -> None:
    x, denoiser = normal(6), gaussian()
    t = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.2, 3.0], dtype=torch.float64)
    s = t * torch.tensor([0.5, 0.1, 0.9, 0.3, 1.0, 0.7], dtype=torch.float64)
    found = heun_step(denoiser, x, t, s)
    for i in range(6):
        grid = torch.stack([t[i], s[i]])
        torch.testing.assert_close(found[i : i + 1], solve(heun, denoiser, x[i : i + 1], grid))


def test_levels_are_those_of_karras() -> None:
    grid, places = Levels(sigma_min=0.01, sigma_max=50.0, rho=5.0), torch.arange(9)
    levels = karras(9, 0.01, 50.0, 5.0)[:-1].flip(0)
    torch.testing.assert_close(grid.at(places, 9), levels.float(), rtol=1e-6, atol=0)
    assert grid.at(places, 9)[0] == torch.tensor(0.01) and grid.at(places, 9)[-1] == 50
    torch.testing.assert_close(grid.index(levels, 9), places.double(), rtol=0, atol=1e-13)


def test_std_is_not_one() -> None:
    assert STD != 1 and MEAN != 0  # else errors of scale would not show
