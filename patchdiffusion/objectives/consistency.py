"""Consistency models: one network that jumps from any noise level to the smallest one.

Song, Dhariwal, Chen, Sutskever, "Consistency Models" (arXiv 2303.01469), with the improvements of
Song and Dhariwal (iCT, 2310.14189). Everything is in the VE frame: time is the noise level.
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import Denoiser, NetDenoiser
from patchdiffusion.losses import Batch, LossOut
from patchdiffusion.noise import LogNormal, NoiseLaw, check_range
from patchdiffusion.objectives.base import C, Distillation, Distilled, Materials, Settings
from patchdiffusion.objectives.discrete import Levels, heun_step
from patchdiffusion.parameterisation import EDM, Parameterisation, Precond, Scales
from patchdiffusion.paths import VE, Path, per_sample
from patchdiffusion.rng import Draws
from patchdiffusion.solvers.schedules import karras

Schedule = Literal["doubling", "quadratic"]


@dataclass(frozen=True, kw_only=True)
class Boundary(Precond):
    """EDM's preconditioner, shifted so that f(x, sigma_min) = x (arXiv 2303.01469, appendix C)."""

    sigma_data: float = 0.5
    """Standard deviation of the data in [-1, 1] units."""
    sigma_min: float = 0.002
    """Noise level that the network jumps to."""

    def scales(self, sigma: Tensor) -> Scales:
        above = sigma - self.sigma_min
        inner = (sigma**2 + self.sigma_data**2).rsqrt()
        skip = self.sigma_data**2 / (above**2 + self.sigma_data**2)
        return Scales(skip, above * self.sigma_data * inner, inner, sigma.log() / 4)


@dataclass(frozen=True, kw_only=True)
class ConsistencyMap:
    """f as a flow map: from any noise level to `sigma_min` only."""

    f: Denoiser
    """The network, preconditioned by `Boundary`."""
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    path: Path = field(default_factory=VE, init=False)
    gamma: float = field(default=1.0, init=False)

    def times(self, steps: int) -> Tensor:
        """Noise levels spaced like those of EDM, the last one sigma_min: float64 [steps + 1]."""
        return karras(steps + 1, self.sigma_min, self.sigma_max)[:-1]

    def __call__(
        self, z: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond | None = None
    ) -> Tensor:
        """z [B, C, *S] at noise level t -> the image; `ValueError` unless s is sigma_min."""
        if not (torch.as_tensor(s) <= self.sigma_min * (1 + 1e-6)).all():
            raise ValueError(
                f"a consistency model jumps to the noise level {self.sigma_min:g}, not to {s}: "
                "sample it with gamma 1"
            )
        return self.f(z, t, cond)


# ---- Schedules, as functions of the share of the run that is done ----


def num_levels(schedule: Schedule, progress: float, first: int, last: int) -> int:
    """N, the number of noise levels of the grid.

    "doubling": min(first 2^floor(k / K'), last) + 1 with K' = K / (log2(last / first) + 1) (iCT,
    table 1). "quadratic": ceil(sqrt(k / K ((last + 1)^2 - first^2) + first^2) - 1) + 1
    (2303.01469, appendix C). "doubling" with `first` = `last` keeps it at first + 1.
    """
    if schedule == "doubling":
        stage = math.floor(progress * (math.log2(last // first) + 1))
        return min(first * 2**stage, last) + 1
    return math.ceil(math.sqrt(progress * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1


def pseudo_huber(square: Tensor, c: float) -> Tensor:
    """sqrt(square + c^2) - c of a mean square: |d| far from 0 and d^2 near it (iCT, table 1).

    The paper has sums over D numbers and c = .00054 sqrt(D), which is sqrt(D) times this.
    """
    return (square + c**2).sqrt() - c


# ---- The objective ----


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig(Distilled):
    """Consistency training, by default as in iCT; distillation with a teacher."""

    sigma_min: float = 0.002
    """Noise level that the network jumps to."""
    sigma_max: float = 80.0
    """Noise level at which sampling starts."""
    rho: float = 7.0
    """Exponent of the spacing of the noise levels."""
    schedule: Schedule = "doubling"
    """Growth of the number of noise levels over the run: doubling (iCT) or quadratic (CT)."""
    first: int = 10
    """Noise levels at the beginning (s0)."""
    last: int = 1280
    """Noise levels at the end (s1)."""
    uniform: bool = False
    """Draw the levels uniformly (CT, distillation) instead of by the noise law (iCT)."""
    huber: float = 0.00054
    """Constant of the pseudo-Huber distance, per pixel; 0 is the squared distance."""
    weighted: bool = True
    """Divide the loss by the distance of the two noise levels (iCT)."""
    target: Literal["self", "average"] = "self"
    """Weights of the target: self, the current ones, or average, those of the EMA."""
    teacher: str | None = None
    """Run or model whose denoiser steps to the next level (distillation); None is training."""

    few_step: ClassVar[bool] = True
    denoises: ClassVar[bool] = False
    shards: ClassVar[bool] = False
    distillation: ClassVar[Distillation | None] = Distillation(lr=0.3, images=0.5)

    def __post_init__(self) -> None:
        check_range(self.sigma_min, self.sigma_max)
        if not 2 <= self.first <= self.last <= 10**6:
            raise ValueError(
                f"consistency needs 2 <= first <= last <= 1000000, not {self.first}, {self.last}"
            )
        if not 0 < self.rho < math.inf or not 0 <= self.huber < math.inf:
            raise ValueError(
                "consistency needs rho > 0 and huber >= 0, both finite, "
                f"not {self.rho}, {self.huber}"
            )
        if self.huber > 2**12:
            raise ValueError(
                "huber must be at most 2^12, as float32 adds no error of an image to its square, "
                f"not {self.huber}"
            )
        Levels(sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho).check(self.last)

    def prefers(self, config: C) -> C:
        """The noise law of iCT, a network of one time, previews in two steps."""
        return replace(
            config,
            objective=self,
            noise=LogNormal(mean=-1.1, std=2.0),
            network=replace(config.network, jump=False),
            preview=replace(config.preview, sample_steps=2),
        )

    def check(self, config: Settings) -> None:
        """Raise `ValueError` for another parameterisation than EDM's."""
        self.precond(config.precond)

    def precond(self, chosen: Parameterisation) -> Boundary:
        """EDM's with a boundary; `ValueError` for any other."""
        if not isinstance(chosen, EDM):
            raise ValueError(
                f"consistency needs the parameterisation EDM, not {chosen}: use --precond edm"
            )
        return Boundary(sigma_data=chosen.sigma_data, sigma_min=self.sigma_min)

    @property
    def passes(self) -> float:
        """One of the target, and two of a teacher."""
        return 1.0 if self.teacher is None else 3.0

    def build(self, materials: Materials) -> "ConsistencyLoss":
        """The loss, with the target's and the teacher's denoisers."""
        return ConsistencyLoss(
            config=self,
            target=materials.average() if self.target == "average" else None,
            teacher=next(iter(materials.teachers), None),
        )

    def product(self, denoiser: NetDenoiser) -> ConsistencyMap:
        """The map to the smallest noise level."""
        return ConsistencyMap(f=denoiser, sigma_min=self.sigma_min, sigma_max=self.sigma_max)


@dataclass(frozen=True, kw_only=True)
class ConsistencyLoss:
    """d(f(x_n+1, t_n+1), sg f(x_n, t_n)) of neighboring levels (2303.01469, algorithms 2 and 3).

    Training uses equal noise for both points, x_n = x0 + t_n eps; with a teacher, x_n is one step
    of Heun's rule from x_n+1 along its ODE. Both sides share dropout.
    """

    config: ConsistencyConfig
    target: Denoiser | None = None
    """Denoiser of the target; None is the network itself."""
    teacher: Denoiser | None = None
    """Estimates E[x0 | x]; None is training without a teacher."""

    def neighbors(self, draws: Draws, progress: float, law: NoiseLaw) -> tuple[Tensor, Tensor]:
        """The noise levels t_n+1 and t_n of each sample: float32 [B] each.

        With the noise law, they are the neighbors on the grid of a level drawn between the ends.
        """
        config = self.config
        count = num_levels(config.schedule, progress, config.first, config.last)
        u = draws.stratified("sigma")
        grid = Levels(sigma_min=config.sigma_min, sigma_max=config.sigma_max, rho=config.rho)
        index = u * (count - 1)
        if not config.uniform:
            ends = (config.sigma_min, config.sigma_max)
            low, high = (law.cdf(u.new_full((1,), end)) for end in ends)
            index = grid.index(law.icdf(low + (high - low) * u), count)
        n = index.floor().clamp(0, count - 2)
        return grid.at(n + 1, count), grid.at(n, count)

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        config = self.config
        high, low = self.neighbors(draws, batch.progress, batch.noise)
        images, cond = batch.images, batch.cond
        noise = draws.normal("noise", tuple(images.shape[1:]))
        above = images + per_sample(high, images) * noise
        with torch.no_grad():
            if self.teacher is None:
                below = images + per_sample(low, images) * noise
            else:
                below = heun_step(self.teacher, above, high, low, replace(cond, seed=None))
            goal = (self.target or denoiser)(below, low, cond)
        square = (denoiser(above, high, cond) - goal).square().flatten(1).mean(1)
        loss = pseudo_huber(square, config.huber) if config.huber else square
        if config.weighted:
            loss = loss / (high - low)
        return LossOut(per_sample=loss, scalars={"consistency error": square.detach().mean()})
