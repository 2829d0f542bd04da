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
    def of(cls, bounds: tuple[float, float] | None) -> "Interval":
        """From two numbers; None is everywhere. Raises `ValueError` for impossible ones."""
        if bounds is None:
            return cls()
        if not 0 <= bounds[0] <= bounds[1] < math.inf:
            raise ValueError(
                f"a guidance interval needs 0 <= low <= high < inf, not {bounds[0]}, {bounds[1]}"
            )
        return cls(*bounds)

    def excludes(self, sigma: Tensor | float) -> bool:
        """Whether a level lies outside; of a tensor, which may hold several, this is not asked."""
        return not isinstance(sigma, Tensor) and not self.low < sigma <= self.high

    def choose(self, sigma: Tensor | float, guided: Tensor, plain: Tensor) -> Tensor:
        """`guided` [B, C, *S] for the samples whose level lies inside, `plain` for the others.

        A single number must lie inside: `excludes` has been asked before anything was computed.
        """
        if not isinstance(sigma, Tensor):
            return guided
        inside = ((self.low < sigma) & (sigma <= self.high)).expand(len(guided))
        return torch.where(per_sample(inside, guided), guided, plain)

    @property
    def discontinuities(self) -> tuple[float, ...]:
        """Where the field jumps."""
        bounds = {self.low, self.high} if self.low < self.high else set()
        return tuple(sorted(bounds - {0.0, math.inf}))
