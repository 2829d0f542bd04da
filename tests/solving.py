"""Problems with known solutions, shared by the tests of the solvers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor

from patchdiffusion import rng
from patchdiffusion.analytic import GaussianMixture
from patchdiffusion.cond import Cond, Position, Tape
from patchdiffusion.denoiser import expand_sigma
from patchdiffusion.paths import per_sample
from patchdiffusion.solvers import SOLVERS, Churn, Noise, Solver, heun, solve
from patchdiffusion.solvers.schedules import karras

TOY = GaussianMixture.toy()
TWO_STAGES = ("heun", "midpoint", "ralston", "dpmpp_2s")
DETERMINISTIC = (*TWO_STAGES, "euler", "dpmpp_2m", "dpmpp_3m", "dpmpp_3m_published", "unipc", "ab2")

# Every solver, and those with options as they are not by default.
ALL: Mapping[str, Solver] = {
    **SOLVERS,
    **{f"churned {n}": partial(SOLVERS[n], churn=Churn(amount=9.0)) for n in TWO_STAGES[:3]},
    "ddim 0.5": partial(SOLVERS["ddim"], eta=0.5),
    "sde_dpmpp_1 0.5": partial(SOLVERS["sde_dpmpp_1"], eta=0.5),
    "sde_dpmpp_2m 0.5": partial(SOLVERS["sde_dpmpp_2m"], eta=0.5),
}


def keys(count: int) -> Tensor:
    return rng.keys(0, "x", 0, torch.arange(count))


def noise_of(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Noise:
    return lambda i: rng.normal(rng.subkeys(key, f"fresh {i}"), shape, dtype)


def grid(steps: int, rho: float = 7.0) -> Tensor:
    """From 10 to 0.05, without the final 0."""
    return karras(steps + 1, 0.05, 10.0, rho)[:-1]


@cache
def noisy(count: int) -> Tensor:
    """Exact samples of the toy mixture at sigma 10: float64 [count, 2]."""
    clean, _ = TOY.sample(keys(count))
    return clean + 10 * rng.normal(keys(count), (2,), torch.float64)


@cache
def reference() -> Tensor:
    """Where `noisy(400)` arrives: Heun's error is a series in squares of the step."""
    some, more = (solve(heun, TOY, noisy(400), grid(n)) for n in (500, 1000))
    return more + (more - some) / 3


@dataclass
class Gaussian:
    """N(mean, std^2) in every pixel, element by element; remembers the steps it was handed."""

    mean: float = 0.3
    std: float = 0.5
    steps: list[Position | None] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        position: Position | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        self.steps.append(position)
        sigma = expand_sigma(sigma, x)
        self.sigmas.append(float(sigma[0]))
        share = self.std**2 / (self.std**2 + sigma**2)
        return self.mean + per_sample(share, x) * (x - self.mean)


def exact_moments(solver: Solver, sigmas: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of what a solver makes of `Gaussian`, without sampling.

    The denoiser is linear, so the end is linear in the start and in the noise of each step: the
    batch holds one unit vector for each of them.
    """
    steps = len(sigmas) - 1
    x = torch.eye(steps + 2, 1, dtype=torch.float64)

    def noise(i: int) -> Tensor:
        unit = torch.zeros(steps + 2, 1, dtype=torch.float64)
        unit[i + 1] = 1
        return unit

    problem = Gaussian()
    end = solve(solver, problem, x, sigmas, noise=noise)[:, 0]
    gain = end[:-1] - end[-1]  # the last row has neither start nor noise
    variance = gain[0] ** 2 * (float(sigmas[0]) ** 2 + problem.std**2) + (gain[1:] ** 2).sum()
    return float(end[-1] + gain[0] * problem.mean), float(variance.sqrt())
