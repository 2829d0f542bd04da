"""A grid of noise levels, and one step of Heun's rule between two of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import Denoiser, expand_sigma
from patchdiffusion.paths import per_sample


def heun_step(
    denoiser: Denoiser, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond | None = None
) -> Tensor:
    """One step of Heun's rule from noise level t to s > 0, with levels for each sample."""
    t, s = expand_sigma(t, x), expand_sigma(s, x)
    step = per_sample(s - t, x)
    slope = (x - denoiser(x, t, cond)) / per_sample(t, x)
    ahead = x + step * slope
    return x + step * (slope + (ahead - denoiser(ahead, s, cond)) / per_sample(s, x)) / 2


@dataclass(frozen=True, kw_only=True)
class Levels:
    """Noise levels evenly spaced in sigma^(1/rho), increasing (EDM, equation 5)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def check(self, count: int) -> None:
        """Raise `ValueError` unless `count` levels differ in float32."""
        try:
            different = bool((self.at(torch.arange(count), count).diff() > 0).all())
        except OverflowError:
            different = False
        if not different:
            raise ValueError(
                f"rho {self.rho:g} gives no {count} different noise levels from "
                f"{self.sigma_min:g} to {self.sigma_max:g}; 7 is usual"
            )

    def at(self, index: Tensor, count: int) -> Tensor:
        """The levels at indices 0 ... count - 1 of a grid of `count`: float32, shape of index."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        level = (low + index.double() / (count - 1) * (high - low)) ** self.rho
        return level.clamp(self.sigma_min, self.sigma_max).to(torch.float32)  # the ends exactly

    def index(self, sigma: Tensor, count: int) -> Tensor:
        """Fractional indices of levels on a grid of `count`, the inverse of `at`."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (sigma ** (1 / self.rho) - low) / (high - low) * (count - 1)
