"""The discrete noise levels of DDPM: their table, the path through it, the law that draws from it.

Step i of T has abar_i = (1 - beta_0) ... (1 - beta_i), that is, sigma_i = sqrt(1 / abar_i - 1).
Ho et al., NeurIPS 2020 (arXiv 2006.11239), section 4: beta linear; Nichol and Dhariwal, ICML 2021
(2102.09672), equation 17: abar the square of a cosine.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

Schedule = Literal["linear", "cosine"]


@lru_cache
def levels(schedule: Schedule, steps: int, device: torch.device) -> Tensor:
    """Every sigma_i, increasing: float64 [steps]."""
    if schedule == "linear":  # the sum of all betas does not depend on their number
        beta = torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000 / steps)
    else:
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        abar = ((time + 0.008) / 1.008 * (math.pi / 2)).cos() ** 2
        beta = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    return torch.expm1(-torch.log1p(-beta).cumsum(0)).sqrt().to(device)


@dataclass(frozen=True, kw_only=True)
class DDPM:
    """The variance-preserving path whose times i / (T - 1) are the discrete steps i.

    Between two steps ln sigma is linear in time, and goes on as straight beyond the table.
    """

    schedule: Schedule = "linear"
    """linear: beta from 1e-4 to .02 if there are 1000 steps; cosine: that of improved DDPM."""
    steps: int = 1000
    """Number of steps T."""

    def __post_init__(self) -> None:
        check_table(self.schedule, self.steps)

    def index(self, sigma: Tensor) -> Tensor:
        """The step of a sigma, with a fraction between two: float64, in the table [0, T - 1]."""
        table = self._logs(sigma)
        log = sigma.double().log()
        above = torch.searchsorted(table, log.contiguous()).clamp(1, self.steps - 1)
        below = above - 1
        part = (log - table[below]) / (table[above] - table[below])
        return below + part

    def time(self, sigma: Tensor) -> Tensor:
        return (self.index(sigma) / (self.steps - 1)).to(sigma.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        below, slope = self._piece(t)
        part = t.double() - below.double() / (self.steps - 1)
        return (self._logs(t)[below] + slope * part).exp().to(t.dtype)

    def a(self, t: Tensor) -> Tensor:
        return (1 + self.sigma(t) ** 2).rsqrt()

    def s(self, t: Tensor) -> Tensor:
        return self.sigma(t) * self.a(t)

    def da(self, t: Tensor) -> Tensor:
        return -self.s(t) * self.ds(t) / self.a(t)  # a^2 + s^2 = 1

    def ds(self, t: Tensor) -> Tensor:
        return self.a(t) ** 2 * self.s(t) * self._piece(t)[1].to(t.dtype)

    def _logs(self, like: Tensor) -> Tensor:
        return levels(self.schedule, self.steps, like.device).log()

    def _piece(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The last step at or before a time, and d ln sigma / dt after it."""
        table = self._logs(t)
        below = (t.detach().double() * (self.steps - 1)).long().clamp(0, self.steps - 2)
        return below, (table[below + 1] - table[below]) * (self.steps - 1)


@dataclass(frozen=True, kw_only=True)
class DDPMSteps:
    """One of the T discrete steps, each as likely as the others (DDPM, algorithm 1)."""

    schedule: Schedule = "linear"
    """linear: beta from 1e-4 to .02 if there are 1000 steps; cosine: that of improved DDPM."""
    steps: int = 1000
    """Number of steps T."""

    def __post_init__(self) -> None:
        check_table(self.schedule, self.steps)

    def draw(self, u: Tensor) -> Tensor:
        """Sigma at the quantiles u."""
        step = (u * self.steps).long().clamp(max=self.steps - 1)
        return levels(self.schedule, self.steps, u.device)[step].to(u.dtype)

    def level(self, sigma: Tensor) -> Tensor:
        """The quantile in the middle of its step, with a fraction between two: in (0, 1)."""
        index = DDPM(schedule=self.schedule, steps=self.steps).index(sigma)
        return ((index.clamp(0, self.steps - 1) + 0.5) / self.steps).to(sigma.dtype)


def check_table(schedule: str, steps: int) -> None:
    """Raise `ValueError` unless there is such a table."""
    if schedule not in get_args(Schedule):
        raise ValueError(f"unknown schedule {schedule!r}, allowed: {get_args(Schedule)}")
    if not 25 <= steps <= 100_000:  # below, a linear beta exceeds 1
        raise ValueError(f"steps must lie in [25, 100000], not {steps}")
