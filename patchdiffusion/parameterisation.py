"""Parameterisations: what the network predicts, D = c_skip x + c_out F(c_in x, c_noise).

Each is four functions of sigma (Karras et al., arXiv 2206.00364, equation 7); `OnPath` makes them
for any prediction on any path.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchdiffusion.asymflow import FlowAsym
from patchdiffusion.noise import (
    DDPMSteps,
    Law,
    UniformTime,
    check_sigma_data,
)
from patchdiffusion.paths import (
    DDPM,
    VE,
    VP,
    Path,
    Prediction,
    Table,
    check_table,
    convert,
)
from patchdiffusion.preconditioning import Precond, Scales, Trainable, check_time_scale
from patchdiffusion.straight import FlowMatching, FlowX0
from patchdiffusion.tabled import OnBetas
from patchdiffusion.weighting import (
    EDMWeight,
    EpsWeight,
    LossWeight,
    MinSNRWeight,
    VWeight,
)


@dataclass(frozen=True, kw_only=True)
class EDM(Trainable):
    """Unit-variance inputs and targets, least amplification of errors (EDM, arXiv 2206.00364)."""

    sigma_data: float = 0.5
    """Standard deviation of the data in [-1, 1] units."""

    def __post_init__(self) -> None:
        check_sigma_data(self.sigma_data)

    def scales(self, sigma: Tensor) -> Scales:
        total = sigma**2 + self.sigma_data**2
        out = sigma * self.sigma_data * total.rsqrt()
        return Scales(self.sigma_data**2 / total, out, total.rsqrt(), sigma.log() / 4)

    def default_weighting(self) -> LossWeight:
        return EDMWeight(sigma_data=self.sigma_data)


@dataclass(frozen=True, kw_only=True)
class TrigFlow(Trainable):
    """The network predicts (dz/dt) / sigma_data on z = cos(t) x0 + sin(t) sigma_data eps.

    EDM with the sign of the network flipped and another c_noise (arXiv 2410.11081, section 3).
    With sigma_data 1 it predicts v, which is the velocity of the cosine path (GVP, 2401.08740)
    over pi / 2.
    """

    word: ClassVar[str] = "trigflow"
    sigma_data: float = 0.5
    """Standard deviation of the data in [-1, 1] units."""
    time_scale: float = 1000.0
    """c_noise = time_scale t, t = atan(sigma / sigma_data) up to pi / 2; 1 as published."""

    def __post_init__(self) -> None:
        check_sigma_data(self.sigma_data)
        check_time_scale(self.time_scale)

    def scales(self, sigma: Tensor) -> Scales:
        edm = EDM(sigma_data=self.sigma_data).scales(sigma)
        time = (sigma / self.sigma_data).atan()
        return edm._replace(out=-edm.out, noise=self.time_scale * time)

    @property
    def meaning(self) -> tuple[object, ...]:
        return (type(self), self.time_scale)

    def default_weighting(self) -> LossWeight:
        return EDMWeight(sigma_data=self.sigma_data)


@dataclass(frozen=True, kw_only=True)
class EpsVP(Trainable):
    """The network predicts eps on a VP path: DDPM in continuous time (arXiv 2011.13456)."""

    word: ClassVar[str] = "eps"
    steps: int = 1000
    """c_noise = (steps - 1) t, the time scale of the discrete model."""

    def __post_init__(self) -> None:
        _check_steps(self.steps)

    @property
    def predicts_eps(self) -> bool:
        return True

    def scales(self, sigma: Tensor) -> Scales:
        inner = (sigma**2 + 1).rsqrt()
        return Scales(torch.ones_like(sigma), -sigma, inner, (self.steps - 1) * VP().time(sigma))

    def default_weighting(self) -> LossWeight:
        return EpsWeight()

    def default_noise(self) -> Law:
        return UniformTime(path="vp")


@dataclass(frozen=True, kw_only=True)
class EpsDDPM(Trainable):
    """The network predicts eps, conditioned on the discrete step (DDPM, arXiv 2006.11239)."""

    word: ClassVar[str] = "ddpm"
    table: Table = "linear"
    """linear: beta from 1e-4 to .02 if there are 1000 steps; cosine: that of improved DDPM."""
    steps: int = 1000
    """Number of steps."""
    nearest: bool = False
    """Round the noise argument to the nearest step, instead of interpolating."""

    def __post_init__(self) -> None:
        check_table(self.table, self.steps)

    @property
    def predicts_eps(self) -> bool:
        return True

    def scales(self, sigma: Tensor) -> Scales:
        step = DDPM(table=self.table, steps=self.steps).index(sigma)
        step = step.clamp(0, self.steps - 1).to(sigma.dtype)
        inner = (sigma**2 + 1).rsqrt()
        noise = step.round() if self.nearest else step
        return Scales(torch.ones_like(sigma), -sigma, inner, noise)

    def default_weighting(self) -> LossWeight:
        return EpsWeight()

    def default_noise(self) -> Law:
        return DDPMSteps(table=self.table, steps=self.steps)

    def check_noise(self, law: object) -> None:
        """Raise `ValueError` for the steps of another table."""
        table = (self.table, self.steps)
        if isinstance(law, DDPMSteps) and (law.table, law.steps) != table:
            raise ValueError(
                f"precond.table and precond.steps are {table} and those of noise "
                f"{(law.table, law.steps)}: give both the same"
            )


@dataclass(frozen=True, kw_only=True)
class V(Trainable):
    """The network predicts v = a eps - s x0 on a variance-preserving path (arXiv 2202.00512)."""

    steps: int = 1000
    """c_noise = (steps - 1) t of the VP path."""

    def __post_init__(self) -> None:
        _check_steps(self.steps)

    def scales(self, sigma: Tensor) -> Scales:
        total = sigma**2 + 1
        noise = (self.steps - 1) * VP().time(sigma)
        return Scales(1 / total, -sigma * total.rsqrt(), total.rsqrt(), noise)

    def default_weighting(self) -> LossWeight:
        return VWeight()

    def default_noise(self) -> Law:
        return UniformTime(path="cosine")


@dataclass(frozen=True)
class X0(Trainable):
    """The network predicts the image, from x / sqrt(1 + sigma^2) (arXiv 2202.00512, section 4).

    c_noise = ln(sigma) / 4.
    """

    def scales(self, sigma: Tensor) -> Scales:
        inner = (sigma**2 + 1).rsqrt()
        return Scales(torch.zeros_like(sigma), torch.ones_like(sigma), inner, sigma.log() / 4)

    def default_weighting(self) -> LossWeight:
        return MinSNRWeight()


Parameterisation = (
    EDM | EpsVP | EpsDDPM | V | X0 | FlowMatching | FlowX0 | FlowAsym | TrigFlow | OnBetas
)
"""The parameterisations of `--precond` and of model files."""


@dataclass(frozen=True)
class OnPath(Precond):
    """Any prediction on any path, of data times `data_scale`; c_noise is the time of the path."""

    path: Path
    prediction: Prediction
    data_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.data_scale < math.inf:
            raise ValueError(f"data_scale must be positive and finite, not {self.data_scale}")
        self.scales(torch.ones(1))  # raises for an unknown prediction

    def scales(self, sigma: Tensor) -> Scales:
        # In float64, since 1 - t cancels; x0 is linear in z and in the prediction.
        t = self.path.time(sigma.double() * self.data_scale)
        a, none, one = self.path.a(t), torch.zeros_like(t), torch.ones_like(t)
        skip = a * convert(none, one, t, self.path, self.prediction, "x0")
        out = convert(one, none, t, self.path, self.prediction, "x0") / self.data_scale
        time = t if isinstance(self.path, VE) else t.clamp(0, 1)  # the times of training
        return Scales(*(c.to(sigma.dtype) for c in (skip, out, a * self.data_scale, time)))


def _check_steps(value: int) -> None:
    if not 2 <= value <= 1_000_000:
        raise ValueError(f"steps must lie in [2, 1000000], not {value}")
