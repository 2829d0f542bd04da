"""Single-step solvers: Euler, Heun's family, DPM-Solver-2, with churn."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from patchdiffusion.solvers.core import Method, Move, Step, towards


@dataclass(frozen=True, kw_only=True)
class Churn:
    """Churn: noise added before each step and removed by it (EDM, algorithm 2)."""

    amount: float = 0.0
    """S_churn, divided over the steps; a step adds at most sqrt(2) - 1 of its level."""
    sigma_min: float = 0.0
    """Lowest noise level with churn."""
    sigma_max: float = 1e6
    """Highest noise level with churn."""
    scale: float = 1.0
    """S_noise, the standard deviation of the added noise; slightly above 1 keeps detail."""

    def __post_init__(self) -> None:
        numbers = (self.amount, self.scale, self.sigma_min, self.sigma_max)
        possible = self.amount >= 0 and self.scale > 0 and self.sigma_min <= self.sigma_max
        if not (possible and all(map(math.isfinite, numbers))):
            raise ValueError(
                "churn needs amount >= 0, scale > 0 and sigma_min <= sigma_max, all finite, not "
                + ", ".join(map(str, numbers))
            )
        if not self.amount and (self.sigma_min, self.sigma_max, self.scale) != (0.0, 1e6, 1.0):
            raise ValueError(
                "sigma_min, sigma_max and scale need churn, but its amount is 0: set an amount"
            )

    def gamma(self, sigma: float, steps: int) -> float:
        """Relative increase of the noise level before a step."""
        inside = self.sigma_min <= sigma <= self.sigma_max
        return min(self.amount / steps, math.sqrt(2) - 1) if inside else 0.0


@dataclass(frozen=True, kw_only=True)
class Euler(Method):
    """First order, n evaluations; equals DDIM (arXiv 2010.02502) and DPM-Solver++(1)."""

    def move(self, step: Step, x: Tensor) -> Move:
        denoised = step.denoise(x)
        return towards(denoised, x, step.next_sigma / step.sigma), denoised, ()


@dataclass(frozen=True, kw_only=True)
class TwoStages(Method):
    """Second-order methods with stages at a and a + alpha (b - a) (EDM, algorithms 2 and 3)."""

    stages: ClassVar[int] = 2
    alpha: ClassVar[float]
    """Position of the second evaluation in the step, in (0, 1]."""
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
    """Second order, 2n - 1 evaluations, optionally stochastic (EDM, arXiv 2206.00364)."""

    alpha: ClassVar[float] = 1.0


@dataclass(frozen=True, kw_only=True)
class Midpoint(TwoStages):
    """`Heun` with the second evaluation half way in sigma (arXiv 2206.00364, algorithm 3)."""

    alpha: ClassVar[float] = 1 / 2


@dataclass(frozen=True, kw_only=True)
class Ralston(TwoStages):
    """`Heun` with the second evaluation at two thirds, the least error bound (2206.00364)."""

    alpha: ClassVar[float] = 2 / 3


@dataclass(frozen=True, kw_only=True)
class DPMpp2S(Method):
    """Second order, 2n - 1 evaluations: the midpoint in ln sigma (arXiv 2211.01095, algorithm 1).

    DPM-Solver++(2S) with r = 1/2.
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


@dataclass(frozen=True, kw_only=True)
class RePaint(Method):
    """First order, each step several times with noise in between (arXiv 2201.09865).

    For `edit`: what is kept and what is made anew come to fit each other. `times` 1 is Euler.
    """

    word: ClassVar[str] = "repaint"
    times: int = 5
    """Repetitions of each step."""

    def __post_init__(self) -> None:
        if self.times < 1:
            raise ValueError(f"times must be at least 1, not {self.times}")

    def evaluations(self, steps: int) -> int:
        return (steps - 1) * self.times + 1

    def move(self, step: Step, x: Tensor) -> Move:
        a, b = step.sigma, step.next_sigma
        denoised = step.denoise(x)
        x = towards(denoised, x, b / a)
        for turn in range(1, self.times if b > 0 else 1):
            x = step.perturb(x, math.sqrt(a**2 - b**2), turn)
            denoised = step.denoise(x, stage=turn)
            x = towards(denoised, x, b / a)
        return x, denoised, ()


euler, heun, midpoint, ralston, dpmpp_2s = Euler(), Heun(), Midpoint(), Ralston(), DPMpp2S()
