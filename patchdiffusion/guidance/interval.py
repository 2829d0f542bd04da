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
        """The interval of two bounds; None is all levels. `ValueError` for impossible bounds."""
        if bounds is None:
            return cls()
        if not 0 <= bounds[0] <= bounds[1] < math.inf:
            raise ValueError(
                f"a guidance interval needs 0 <= low <= high < inf, not {bounds[0]}, {bounds[1]}"
            )
        return cls(*bounds)

    def excludes(self, sigma: Tensor | float) -> bool:
        """True for a number outside of the interval; False for tensors, which may hold several."""
        return not isinstance(sigma, Tensor) and not self.low < sigma <= self.high

    def choose(self, sigma: Tensor | float, guided: Tensor, plain: Tensor) -> Tensor:
        """`guided` [B, C, *S] for the samples whose level lies inside, `plain` for the others.

        A number must lie inside, see `excludes`.
        """
        if not isinstance(sigma, Tensor):
            return guided
        inside = ((self.low < sigma) & (sigma <= self.high)).expand(len(guided))
        return torch.where(per_sample(inside, guided), guided, plain)

    @property
    def discontinuities(self) -> tuple[float, ...]:
        """Noise levels at which guidance starts or ends."""
        bounds = {self.low, self.high} if self.low < self.high else set()
        return tuple(sorted(bounds - {0.0, math.inf}))
