"""Flow maps, the solution operators of the probability-flow equation, and how to sample with them.

A flow map takes an image at time t straight to time s (arXiv 2510.21890): what a solver does in
many evaluations of a denoiser, it does in one. Each lives in the frame of its own path, in which
pure noise has a finite time.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import Denoiser, expand_sigma, per_sample
from patchdiffusion.noise import Path
from patchdiffusion.patches import Size, coordinates
from patchdiffusion.solvers import Noise, State


@runtime_checkable
class FlowMap(Protocol):
    """Psi_{t -> s}: z [B, C, *S] at time t to the same shape at s <= t, both [B] or scalars."""

    @property
    def path(self) -> Path:
        """The frame: z_t = a(t) x0 + s(t) eps."""
        ...

    @property
    def gamma(self) -> float:
        """The share of fresh noise it is usually sampled with, see `jump`."""
        ...

    def times(self, steps: int) -> Tensor:
        """The times of a number of jumps, from pure noise to the image: float64 [steps + 1]."""
        ...

    def __call__(
        self, z: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond | None = None
    ) -> Tensor: ...


def jump(
    flow_map: FlowMap,
    z: Tensor,
    times: Tensor,
    *,
    cond: Cond | None = None,
    noise: Noise | None = None,
    gamma: float | None = None,
) -> Iterator[State]:
    """One evaluation from each time to the next; yields a `State` after each.

    Its `denoised` is where the map has landed, a clean image only at the end or with gamma 1.

    A share `gamma` of the noise of each intermediate time is drawn anew: the map goes on to the
    noise level sqrt(1 - gamma^2) sigma, and noise brings it back up (gamma-sampling of CTM, arXiv
    2310.02279). 0 is deterministic (MeanFlow, arXiv 2505.13447, algorithm 2); 1 goes to the end of
    the map every time (consistency models, 2303.01469, algorithm 1). None is what the map prefers.
    Raises `ValueError` without `noise` where some is needed.
    """
    gamma = flow_map.gamma if gamma is None else gamma
    path, moments = flow_map.path, times.tolist()
    for i, (t, s) in enumerate(itertools.pairwise(moments)):
        lands = s if gamma == 0 else _below(path, s, gamma, moments[-1])
        z = landed = flow_map(z, t, lands, cond)
        if lands < s:
            if noise is None:
                raise ValueError("fresh noise is needed: pass noise=, a function of the step index")
            before, after = _sigma(path, lands), _sigma(path, s)
            keep = _scale(path, s) / _scale(path, lands)
            z = keep * z + _scale(path, s) * math.sqrt(after**2 - before**2) * noise(i)
        yield State(z, landed, i + 1)


def _below(path: Path, s: float, gamma: float, end: float) -> float:
    """The time whose noise level is sqrt(1 - gamma^2) of that at s, but not below the end."""
    sigma = math.sqrt(1 - gamma**2) * _sigma(path, s)
    return max(path.time(torch.tensor(sigma, dtype=torch.float64)).item(), end)


def _sigma(path: Path, t: float) -> float:
    return path.sigma(torch.tensor(t, dtype=torch.float64)).item()


def _scale(path: Path, t: float) -> float:
    return path.a(torch.tensor(t, dtype=torch.float64)).item()


class PatchMap:
    """A flow map of a region of a canvas: what `PatchDenoiser` is for a denoiser."""

    def __init__(self, flow_map: FlowMap, canvas: Size, corner: tuple[int, int] = (0, 0)):
        self.flow_map = flow_map
        self.canvas = canvas
        self.corner = corner
        self.path = flow_map.path
        self.gamma = flow_map.gamma

    def times(self, steps: int) -> Tensor:
        """Those of the map."""
        return self.flow_map.times(steps)

    def __call__(
        self, z: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond | None = None
    ) -> Tensor:
        top, left = (torch.full((len(z),), c, device=z.device) for c in self.corner)
        pos = coordinates(top, left, (z.shape[-2], z.shape[-1]), self.canvas)
        return self.flow_map(z, t, s, replace(cond or Cond(), pos=pos))


def heun_step(
    denoiser: Denoiser, x: Tensor, t: Tensor | float, s: Tensor | float, cond: Cond | None = None
) -> Tensor:
    """From noise level t to s > 0 by Heun's rule, each sample between its own levels."""
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

    def at(self, place: Tensor, count: int) -> Tensor:
        """The levels at places 0 ... count - 1 of a grid of `count`: float32, shape of place."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        level = (low + place.double() / (count - 1) * (high - low)) ** self.rho
        return level.clamp(self.sigma_min, self.sigma_max).to(torch.float32)  # the ends exactly

    def place(self, sigma: Tensor, count: int) -> Tensor:
        """Where levels lie on that grid, the inverse of `at`."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (sigma ** (1 / self.rho) - low) / (high - low) * (count - 1)
