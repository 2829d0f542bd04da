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
    """The solver of few-step models: `jump` from each time of a flow map to the next."""

    word: ClassVar[str] = "map"
    usual_steps: ClassVar[int] = 2
    gamma: float | None = None
    """Share of the noise that is drawn anew after each jump but the last; None is what suits."""

    def __post_init__(self) -> None:
        if self.gamma is not None and not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must lie in [0, 1], not {self.gamma}")

    def evaluations(self, steps: int) -> int:
        """How often the map is evaluated for a sample."""
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
