"""The noise levels at which guidance applies (Kynkaanniemi et al., arXiv 2404.07724)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from patchdiffusion.paths import per_sample


@dataclass(frozen=True)
class Interval:
    """The levels low < sigma <= high, by default all of them."""

    low: float = 0.0
    high: float = math.inf

    @classmethod
    def of(cls, bounds: "tuple[float, float] | Interval | None") -> "Interval":
        """The interval of two bounds; None is all levels. `ValueError` for impossible bounds."""
        if bounds is None:
            return cls()
        if isinstance(bounds, Interval):
            return bounds
        if not 0 <= bounds[0] <= bounds[1] < math.inf:
            raise ValueError(
                "an interval of noise levels needs 0 <= low <= high < inf, not "
                f"{bounds[0]}, {bounds[1]}"
            )
        return cls(*bounds)

    @classmethod
    def of_steps(cls, steps: tuple[int, int], schedule: tuple[float, ...]) -> "Interval":
        """The levels of steps `first` to `last` of a schedule, whose last level is 0.

        Its ends lie a little above the levels of steps `last` + 1 and `first`, so that rounding
        moves no step. Raises `ValueError` for steps that the schedule does not have.
        """
        first, last = steps
        check_steps(steps)
        if last > len(schedule) - 2:
            raise ValueError(
                f"guidance interval_steps must lie in [0, {len(schedule) - 2}] for "
                f"{len(schedule) - 1} steps, not be {first} {last}"
            )
        high = _above(schedule[first], schedule[first - 1]) if first else math.inf
        return cls(_above(schedule[last + 1], schedule[last]), high)

    def excludes(self, sigma: Tensor | float) -> bool:
        """True for a number outside of the interval; False for tensors, which may hold several."""
        return not isinstance(sigma, Tensor) and not self.low < sigma <= self.high

    def choose(self, sigma: Tensor | float, guided: Tensor, plain: Tensor) -> Tensor:
        """`guided` [B, C, *S] for the samples whose level lies inside, `plain` for the others.

        For pixels, if the levels are a map. A number must lie inside, see `excludes`.
        """
        if not isinstance(sigma, Tensor):
            return guided
        inside = (self.low < sigma) & (sigma <= self.high)
        inside = inside if inside.ndim > 1 else inside.expand(len(guided))
        return torch.where(per_sample(inside, guided), guided, plain)

    @property
    def discontinuities(self) -> tuple[float, ...]:
        """Noise levels at which guidance starts or ends."""
        bounds = {self.low, self.high} if self.low < self.high else set()
        return tuple(sorted(bounds - {0.0, math.inf}))


def check_steps(steps: tuple[int, int]) -> None:
    """Raise `ValueError` unless 0 <= first <= last."""
    if not 0 <= steps[0] <= steps[1]:
        raise ValueError(
            f"guidance interval_steps must be a first and a last step, 0 <= first <= last, not "
            f"{steps[0]} {steps[1]}"
        )


def _above(level: float, next_higher: float) -> float:
    """A level a tenth of the way up, in the logarithm; 0 for 0."""
    return level**0.9 * next_higher**0.1
