"""Flow maps: solution operators of the probability-flow equation, for sampling in a few steps.

A flow map takes an image at time t straight to time s (arXiv 2510.21890): what a solver does in
many evaluations of a denoiser, it does in one. Each lives in the frame of its own path, in which
pure noise has a finite time.
"""

from dataclasses import replace
from typing import Protocol, runtime_checkable

from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.patches import Region, Size
from patchdiffusion.paths import Path


@runtime_checkable
class FlowMap(Protocol):
    """Psi_{t -> s}: z [B, C, *S] at time t to the same shape at s <= t, both [B] or scalars."""

    @property
    def path(self) -> Path:
        """The frame: z_t = a(t) x0 + s(t) eps."""
        ...

    @property
    def gamma(self) -> float:
        """Default share of fresh noise in sampling, see `jump`."""
        ...

    def times(self, steps: int) -> Tensor:
        """The times of a number of jumps, from pure noise to the image: float64 [steps + 1]."""
        ...

    def __call__(
        self, z: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond | None = None
    ) -> Tensor: ...


class PatchMap:
    """A flow map of a region of the canvas; `PatchDenoiser` is its counterpart for denoisers."""

    def __init__(self, flow_map: FlowMap, canvas: Size, corner: tuple[int, ...] | None = None):
        self.flow_map = flow_map
        self.region = Region.whole(canvas) if corner is None else Region(canvas, corner)
        self.path = flow_map.path
        self.gamma = flow_map.gamma

    def times(self, steps: int) -> Tensor:
        """The times of the wrapped map: float64 [steps + 1]."""
        return self.flow_map.times(steps)

    def __call__(
        self, z: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond | None = None
    ) -> Tensor:
        return self.flow_map(z, t, s, replace(cond or Cond(), pos=self.region.pos(z)))
