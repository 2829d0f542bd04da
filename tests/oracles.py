"""Problems with known solutions, and stand-ins that remember how they were called."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from patchdiffusion import rng
from patchdiffusion.analytic import GaussianMixture
from patchdiffusion.cond import Cond, Position, Tape
from patchdiffusion.denoiser import expand_sigma
from patchdiffusion.losses import Batch
from patchdiffusion.noise import LogNormal, NoiseLaw
from patchdiffusion.paths import VE, Path, per_sample
from patchdiffusion.solvers import (
    DDIM,
    Churn,
    Heun,
    Integrator,
    Method,
    Midpoint,
    Noise,
    Ralston,
    SDEDPMpp1,
    SDEDPMpp2M,
    Solver,
    heun,
    solve,
)
from patchdiffusion.solvers.schedules import karras
from patchdiffusion.system.families import words

TOY = GaussianMixture.toy()
MEAN, STD = 0.3, 0.6
"""Of `gaussian`, in every pixel."""

# ---- Draws ----


def keys(count: int, stream: str = "x") -> Tensor:
    return rng.keys(0, stream, 0, torch.arange(count))


def normal(count: int, shape: tuple[int, ...] = (2,), stream: str = "noise") -> Tensor:
    """float64 [count, *shape]."""
    return rng.normal(keys(count, stream), shape, torch.float64)


def noise_of(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Noise:
    """The fresh noise of a solver."""
    return lambda i: rng.normal(rng.subkeys(key, f"fresh {i}"), shape, dtype)


def draws(count: int, step: int = 0) -> rng.Draws:
    """Of a training step with one group."""
    index = torch.arange(count)
    return rng.Draws(seed=0, step=step, index=index, rank=index, count=count)


def batch(
    images: Tensor,
    cond: Cond | None = None,
    progress: float = 0.0,
    noise: NoiseLaw | None = None,
) -> Batch:
    """Whole images of a training step."""
    box = torch.tensor([0] * len(images.shape[2:]) + list(images.shape[2:]))
    index = torch.arange(len(images))
    still = torch.zeros(len(images), dtype=torch.bool)
    return Batch(
        images,
        cond or Cond(),
        index,
        box.expand(len(images), -1),
        still,
        noise or LogNormal(),
        progress,
    )


def inputs(count: int = 12) -> tuple[Tensor, Tensor, Cond]:
    """x float64 [B, 2], a level for each and three classes in turn."""
    sigma = 10 ** rng.uniform(keys(count), 1)[:, 0]
    x = rng.normal(keys(count), (2,), torch.float64) * (1 + sigma[:, None])
    return x, sigma, Cond(labels=torch.arange(count) % 3)


def images(channels: int = 4, count: int = 3) -> tuple[Tensor, Cond]:
    """x float64 [B, C, 5, 6] and classes."""
    x = rng.normal(keys(count, "images"), (channels, 5, 6), torch.float64)
    return x + 0.3, Cond(labels=torch.arange(count))


# ---- Denoisers ----


class Oracle:
    """A denoiser that is a function of an input, one level for each sample, and the condition.

    Remembers its calls, and the arguments of the last one.
    """

    x: Tensor
    sigma: Tensor
    cond: Cond

    def __init__(self, best: Callable[[Tensor, Tensor, Cond], Tensor]):
        self.best = best
        self.batches: list[int] = []
        self.given: list[Tensor | float] = []
        """Levels as they came, numbers or one for each sample."""
        self.steps: list[Position | None] = []
        self.tapes: list[Tape | None] = []

    @property
    def sigmas(self) -> list[float]:
        """The level of the first sample in each call."""
        return [float(torch.as_tensor(sigma).flatten()[0]) for sigma in self.given]

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor | float,
        cond: Cond | None = None,
        *,
        position: Position | None = None,
        tape: Tape | None = None,
    ) -> Tensor:
        self.batches.append(len(x))
        self.given.append(sigma)
        self.steps.append(position)
        self.tapes.append(tape)
        if tape is not None:
            tape.put("x", x)
        self.x, self.sigma, self.cond = x, expand_sigma(sigma, x), cond or Cond()
        return self.best(x, self.sigma, self.cond)


class Gaussian(Oracle):
    """N(mean, std^2) in every pixel, element by element."""

    def __init__(self, mean: float = 0.3, std: float = 0.5):
        super().__init__(self._best)
        self.mean = mean
        self.std = std

    def _best(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        share = self.std**2 / (self.std**2 + sigma**2)
        return self.mean + per_sample(share, x) * (x - self.mean)


class Two(Oracle):
    """N(0, std^2) by label: any class narrow, no class wide."""

    def __init__(self, conditional: float = 0.5, unconditional: float = 1.0):
        super().__init__(self._best)
        self.conditional = conditional
        self.unconditional = unconditional

    def _best(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        assert cond.labels is not None
        var = torch.where(cond.labels < 0, self.unconditional**2, self.conditional**2)
        return per_sample(var / (var + sigma**2), x).to(x) * x


# ---- Flow maps ----


def gaussian(shape: tuple[int, ...] = (2,)) -> GaussianMixture:
    """N(MEAN, STD^2) in every pixel."""
    means = torch.full((1, *shape), MEAN, dtype=torch.float64)
    return GaussianMixture(means, STD**2 * torch.eye(means.numel()).double()[None])


def spread(path: Path, t: Tensor) -> Tensor:
    """Standard deviation of z_t."""
    return (path.a(t) ** 2 * STD**2 + path.s(t) ** 2).sqrt()


@dataclass(frozen=True)
class Exact:
    """The solution operator of that Gaussian in the frame of any path, float64."""

    path: Path = field(default_factory=VE)
    gamma: float = 0.0
    first: float = 80.0
    last: float = 0.0

    def times(self, steps: int) -> Tensor:
        return torch.linspace(self.first, self.last, steps + 1, dtype=torch.float64)

    def __call__(
        self, z: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond | None = None
    ) -> Tensor:
        t, s = (per_sample(torch.as_tensor(x).double().expand(len(z)), z) for x in (t, s))
        scale = spread(self.path, s) / spread(self.path, t)
        return self.path.a(s) * MEAN + (z - self.path.a(t) * MEAN) * scale


class Little(nn.Module):
    """A network of few weights in which everything it is told has an effect."""

    def __init__(self, seed: int = 0, channels: int = 1):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mix = nn.Parameter(torch.randn(5, channels, generator=generator) * 0.5)
        self.calls: list[Cond] = []

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, *, tape: Tape | None = None) -> Tensor:
        self.calls.append(cond)
        span = torch.zeros_like(noise) if cond.jump is None else cond.jump
        label = -torch.ones(len(x)) if cond.labels is None else cond.labels
        told = torch.stack([noise.sin(), span.cos(), noise * span, label.to(noise)], dim=1)
        shift = told @ self.mix[:4].to(noise)  # [B, C]
        return (self.mix[4] * x.movedim(1, -1)).movedim(-1, 1).tanh() + shift.reshape(
            *shift.shape, *[1] * (x.ndim - 2)
        )


# ---- Solvers ----

TWO_STAGES = ("heun", "midpoint", "ralston", "dpmpp_2s")
DETERMINISTIC = (*TWO_STAGES, "euler", "dpmpp_2m", "dpmpp_3m", "dpmpp_3m_published", "unipc", "ab2")

SOLVERS: Mapping[str, Any] = {
    name: member() for name, member in words(Solver).items() if issubclass(member, Method)
}

# Every solver, and those with options as they are not by default.
ALL: Mapping[str, Integrator] = {
    **SOLVERS,
    "churned heun": Heun(churn=Churn(amount=9.0)),
    "churned midpoint": Midpoint(churn=Churn(amount=9.0)),
    "churned ralston": Ralston(churn=Churn(amount=9.0)),
    "ddim 0.5": DDIM(eta=0.5),
    "sde_dpmpp_1 0.5": SDEDPMpp1(eta=0.5),
    "sde_dpmpp_2m 0.5": SDEDPMpp2M(eta=0.5),
}


def grid(steps: int, rho: float = 7.0) -> Tensor:
    """From 10 to 0.05, without the final 0."""
    return karras(steps + 1, 0.05, 10.0, rho)[:-1]


@cache
def noisy(count: int) -> Tensor:
    """Exact samples of the toy mixture at sigma 10: float64 [count, 2]."""
    clean, _ = TOY.sample(keys(count))
    return clean + 10 * normal(count, stream="x")


@cache
def reference() -> Tensor:
    """Where `noisy(400)` arrives: Heun's error is a series in squares of the step."""
    some, more = (solve(heun, TOY, noisy(400), grid(n)) for n in (500, 1000))
    return more + (more - some) / 3


def exact_moments(solver: Integrator, sigmas: Tensor) -> tuple[float, float]:
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
