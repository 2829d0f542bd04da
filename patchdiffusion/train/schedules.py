"""Schedules of the learning rate: how large a share of it each step of a run has."""

import math
from dataclasses import dataclass
from typing import Literal

from patchdiffusion.system.checks import fraction, positive


@dataclass(frozen=True, kw_only=True)
class Trapezoid:
    """Rises linearly from 0, stays, and falls linearly to 0 at the end of the run."""

    warmup: float = 0.02
    """Share of the run over which the learning rate rises linearly from 0."""
    cooldown: float = 0.2
    """Share of the run, at its end, over which it falls linearly to 0; 0 keeps it constant."""

    def __post_init__(self) -> None:
        fraction(self, "warmup", "cooldown")

    def factor(self, progress: float, seen: float) -> float:
        """Factor of the learning rate when a share `progress` of the run is done."""
        rise = min(progress / self.warmup, 1.0) if self.warmup else 1.0
        fall = min((1 - progress) / self.cooldown, 1.0) if self.cooldown else 1.0
        return max(min(rise, fall), 0.0)


@dataclass(frozen=True, kw_only=True)
class InverseSqrt:
    """Rises linearly from 0, stays, and falls as 1 / sqrt(time): the schedule of EDM2.

    min(t / warmup, 1) / sqrt(max(t / reference, 1)) (arXiv 2312.02696). In units of
    the clock it does not depend on the length of the run, which may then be extended at any time.
    """

    warmup: float = 0.005
    """When the learning rate has risen to its full value; 0 begins with it."""
    reference: float = 0.07
    """When it begins to fall."""
    unit: Literal["run", "clock"] = "run"
    """What both are counted in: shares of the run, or units of its clock (images, crops, steps)."""

    def __post_init__(self) -> None:
        positive(self, "reference")
        if not 0 <= self.warmup < math.inf:
            raise ValueError(f"warmup must be >= 0 and finite, not {self.warmup}")

    def factor(self, progress: float, seen: float) -> float:
        """Factor of the learning rate at a share of the run, when its clock shows `seen`."""
        time = progress if self.unit == "run" else seen
        rise = min(time / self.warmup, 1.0) if self.warmup else 1.0
        return rise / math.sqrt(max(time / self.reference, 1.0))


Schedule = Trapezoid | InverseSqrt
"""Schedules of the learning rate."""
