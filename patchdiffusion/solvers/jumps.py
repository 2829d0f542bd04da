"""Sampling with a flow map: one evaluation from each time to the next."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.flowmap import FlowMap
from patchdiffusion.paths import Path
from patchdiffusion.solvers.core import Noise, State


@dataclass(frozen=True, kw_only=True)
class Jumps:
    """The solver of few-step models: one evaluation per jump (arXiv 2310.02279)."""

    word: ClassVar[str] = "map"
    usual_steps: ClassVar[int] = 2
    gamma: float | None = None
    """Share of the noise redrawn after each jump but the last; None is the map's default."""

    def __post_init__(self) -> None:
        if self.gamma is not None and not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], not {self.gamma}")

    def evaluations(self, steps: int) -> int:
        """Number of evaluations of the map per sample."""
        return steps


def jump(
    flow_map: FlowMap,
    z: Tensor,
    times: Tensor,
    *,
    cond: Cond | None = None,
    noise: Noise | None = None,
    gamma: float | None = None,
) -> Iterator[State]:
    """Sample with a flow map, one evaluation from each time to the next; yields a `State` each.

    `State.denoised` is the output of the map, a clean image only at the end or with gamma 1.

    A share `gamma` of the noise of each intermediate time is redrawn: the map jumps to the noise
    level sqrt(1 - gamma^2) sigma, and noise is added up to sigma (gamma-sampling of CTM, arXiv
    2310.02279). 0 is deterministic (MeanFlow, arXiv 2505.13447, algorithm 2); 1 jumps to the end of
    the map every time (consistency models, 2303.01469, algorithm 1). None is the default of the
    map. Raises `ValueError` if noise is needed and `noise` is None.
    """
    gamma = flow_map.gamma if gamma is None else gamma
    path, moments = flow_map.path, times.tolist()
    for i, (t, s) in enumerate(itertools.pairwise(moments)):
        end = s if gamma == 0 else _below(path, s, gamma, moments[-1])
        z = mapped = flow_map(z, t, end, cond)
        if end < s:
            if noise is None:
                raise ValueError("fresh noise is needed: pass noise=, a function of the step index")
            before, after = _sigma(path, end), _sigma(path, s)
            keep = _scale(path, s) / _scale(path, end)
            z = keep * z + _scale(path, s) * math.sqrt(after**2 - before**2) * noise(i)
        yield State(z, mapped, i + 1)


def _below(path: Path, s: float, gamma: float, end: float) -> float:
    """The time whose noise level is sqrt(1 - gamma^2) of that at s, but not below the end."""
    sigma = math.sqrt(1 - gamma**2) * _sigma(path, s)
    return max(path.time(torch.tensor(sigma, dtype=torch.float64)).item(), end)


def _sigma(path: Path, t: float) -> float:
    return path.sigma(torch.tensor(t, dtype=torch.float64)).item()


def _scale(path: Path, t: float) -> float:
    return path.a(torch.tensor(t, dtype=torch.float64)).item()
