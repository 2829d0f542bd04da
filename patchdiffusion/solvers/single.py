"""Solvers that remember nothing: Euler, the family of Heun, DPM-Solver-2, and churn."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from patchdiffusion.solvers.core import Method, Move, Step, towards


@dataclass(frozen=True, kw_only=True)
class Churn:
    """Noise added and removed again along the way (EDM, algorithm 2)."""

    amount: float = 0.0
    """S_churn, spread over the steps; at most sqrt(2) - 1 of the level is added in a step."""
    sigma_min: float = 0.0
    """Churn only at levels from step ..."""
    sigma_max: float = 1e6
    """... up to step."""
    scale: float = 1.0
    """S_noise, the standard deviation of the added noise; slightly above 1 keeps detail."""

    def __post_init__(self) -> None:
        if not (self.amount >= 0 and self.scale > 0 and self.sigma_min <= self.sigma_max):
            raise ValueError(
                "churn needs amount >= 0, scale > 0 and sigma_min <= sigma_max, not "
                f"{self.amount}, {self.scale}, {self.sigma_min}, {self.sigma_max}"
            )
        if not self.amount and (self.sigma_min, self.sigma_max, self.scale) != (0.0, 1e6, 1.0):
            raise ValueError(
                "sigma_min, sigma_max and scale shape the churn, and amount is 0, which is none"
            )

    def gamma(self, sigma: float, steps: int) -> float:
        """Relative increase of the noise level before a step."""
        inside = self.sigma_min <= sigma <= self.sigma_max
        return min(self.amount / steps, math.sqrt(2) - 1) if inside else 0.0


@dataclass(frozen=True, kw_only=True)
class Euler(Method):
    """First order, n evaluations; the same as DDIM (arXiv 2010.02502) and DPM-Solver++(1)."""

    def move(self, step: Step, x: Tensor) -> Move:
        denoised = step.denoise(x)
        return towards(denoised, x, step.next_sigma / step.sigma), denoised, ()


@dataclass(frozen=True, kw_only=True)
class TwoStages(Method):
    """The second-order methods with stages at a and a + alpha (b - a) (EDM, algorithms 2 and 3)."""

    stages: ClassVar[int] = 2
    alpha: ClassVar[float]
    """Place of the second evaluation in the step."""
    churn: Churn = field(default_factory=Churn)

    def highest(self, sigmas: Tensor) -> float:
        """The largest noise level at which the denoiser is evaluated."""
        return max(s * (1 + self.churn.gamma(s, len(sigmas) - 1)) for s in sigmas.tolist())

    def move(self, step: Step, x: Tensor) -> Move:
        a, b = step.sigma, step.next_sigma
        gamma = self.churn.gamma(a, len(step.sigmas) - 1)
        if gamma > 0:
            raised = a * (1 + gamma)
            x = step.perturb(x, math.sqrt(raised**2 - a**2) * self.churn.scale)
            a = raised
        denoised = step.denoise(x, a)
        slope = (x - denoised) / a
        if b > 0:
            middle = b + (1 - self.alpha) * (a - b)  # exactly b for alpha = 1
            x_middle = x + self.alpha * (b - a) * slope
            denoised = step.denoise(x_middle, middle, stage=1)
            share = 1 / (2 * self.alpha)
            slope = (1 - share) * slope + share * ((x_middle - denoised) / middle)
        return x + (b - a) * slope, denoised, ()


@dataclass(frozen=True, kw_only=True)
class Heun(TwoStages):
    """Second order, 2n - 1 evaluations, optionally stochastic (EDM, algorithms 1 and 2)."""

    alpha: ClassVar[float] = 1.0


@dataclass(frozen=True, kw_only=True)
class Midpoint(TwoStages):
    """As `Heun`, with the second evaluation half way in sigma."""

    alpha: ClassVar[float] = 1 / 2


@dataclass(frozen=True, kw_only=True)
class Ralston(TwoStages):
    """As `Heun`, with the second evaluation at two thirds, where the error bound is least."""

    alpha: ClassVar[float] = 2 / 3


@dataclass(frozen=True, kw_only=True)
class DPMpp2S(Method):
    """Second order, 2n - 1 evaluations: the midpoint in ln sigma (arXiv 2211.01095, algorithm 1).

    There with r = 1/2.
    """

    word: ClassVar[str] = "dpmpp_2s"
    stages: ClassVar[int] = 2

    def move(self, step: Step, x: Tensor) -> Move:
        denoised = step.denoise(x)
        if step.next_sigma > 0:
            middle = math.sqrt(step.sigma * step.next_sigma)
            x_middle = towards(denoised, x, middle / step.sigma)
            denoised = step.denoise(x_middle, middle, stage=1)
        return towards(denoised, x, step.next_sigma / step.sigma), denoised, ()


euler, heun, midpoint, ralston, dpmpp_2s = Euler(), Heun(), Midpoint(), Ralston(), DPMpp2S()
