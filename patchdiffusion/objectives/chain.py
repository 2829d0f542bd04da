"""Few steps of Euler's rule (DDIM) as a flow map, for denoisers that are trained for them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import Denoiser, expand_sigma
from patchdiffusion.objectives.discrete import Levels
from patchdiffusion.paths import VE, Path, per_sample


def euler_step(
    denoiser: Denoiser, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond | None = None
) -> Tensor:
    """(s / t) x + (1 - s / t) D(x, t), with levels t > 0 and s for each sample: like x."""
    t, s = expand_sigma(t, x), expand_sigma(s, x)
    keep = per_sample(s / t, x)
    return (keep * x + (1 - keep) * denoiser(x, t, cond)).to(x.dtype)


def grid_levels(levels: Levels, index: Tensor, steps: int | Tensor) -> Tensor:
    """Noise levels at indices 0 ... steps of a sampler, from 0 to sigma_max: float32.

    Those of `levels` at equal distances, but the smallest one is 0.
    """
    share = index.double() / steps
    return torch.where(share > 0, levels.at(share, 2), 0.0)


@dataclass(frozen=True, kw_only=True)
class EulerMap:
    """A jump is one step of Euler's rule by a denoiser."""

    denoiser: Denoiser
    levels: Levels = field(default_factory=Levels)
    path: Path = field(default_factory=VE, init=False)
    gamma: float = field(default=0.0, init=False)

    def times(self, steps: int) -> Tensor:
        """Noise levels from sigma_max to 0: float64 [steps + 1]."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, not {steps}")
        return grid_levels(self.levels, torch.arange(steps, -1, -1), steps).double()

    def __call__(
        self, z: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond | None = None
    ) -> Tensor:
        """z [B, C, *S] at noise level t > 0 to level s, both [B] or scalars."""
        return euler_step(self.denoiser, z, t, s, cond)
