"""Schedules of the learning rate: a factor as a function of the progress of the run."""

import math
from dataclasses import dataclass
from typing import Literal

from patchdiffusion.system.checks import MOST, fraction, positive


@dataclass(frozen=True, kw_only=True)
class Trapezoid:
    """Linear warmup, a constant part, and linear cooldown to 0 at the end of the run."""

    warmup: float = 0.02
    """Fraction of the run over which the learning rate rises from 0."""
    cooldown: float = 0.2
    """Fraction of the run, at its end, over which the learning rate falls to 0."""

    def __post_init__(self) -> None:
        fraction(self, "warmup", "cooldown")

    def factor(self, progress: float, seen: float) -> float:
        """Factor of the learning rate at a fraction `progress` of the run."""
        rise = min(progress / self.warmup, 1.0) if self.warmup else 1.0
        fall = min((1 - progress) / self.cooldown, 1.0) if self.cooldown else 1.0
        return max(min(rise, fall), 0.0)


@dataclass(frozen=True, kw_only=True)
class InverseSqrt:
    """Linear warmup, a constant part, and decay as 1 / sqrt(time), as in EDM2 (arXiv 2312.02696).

    min(t / warmup, 1) / sqrt(max(t / reference, 1)). In units of the clock it does not depend on
    the length of the run, which may then be extended at any time.
    """

    warmup: float = 0.005
    """Time at which the learning rate has risen to its full value; 0 for no warmup."""
    reference: float = 0.07
    """Time at which the decay starts."""
    unit: Literal["run", "clock"] = "run"
    """Unit of warmup and reference: fractions of the run, or units of its clock."""

    def __post_init__(self) -> None:
        positive(self, "reference")
        if not 0 <= self.warmup < math.inf:
            raise ValueError(f"warmup must be >= 0 and finite, not {self.warmup}")
        longest = 1.0 if self.unit == "run" else MOST
        if self.warmup > longest:
            unit = "run is 1" if self.unit == "run" else "clock counts up to 2^63"
            raise ValueError(f"warmup must end in a run, and the {unit}, not {self.warmup:g}")

    def factor(self, progress: float, seen: float) -> float:
        """Factor of the learning rate at a fraction of the run, with its clock at `seen`."""
        time = progress if self.unit == "run" else seen
        rise = min(time / self.warmup, 1.0) if self.warmup else 1.0
        return rise / math.sqrt(max(time / self.reference, 1.0))


Schedule = Trapezoid | InverseSqrt
"""Family of learning-rate schedules."""
