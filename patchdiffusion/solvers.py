"""Solvers of the probability-flow equation dx/dsigma = (x - D(x, sigma)) / sigma.

A solver is a generator: it yields a `State` after every step and can be continued from any of
them. Plumbing (seeds, batches, precision, progress, saving) belongs to the sampling driver.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from patchdiffusion.cond import Cond, Step
from patchdiffusion.denoiser import Denoiser


@dataclass(frozen=True)
class State:
    """Where a solver stands after a step."""

    x: Tensor
    """[B, C, *S], the noisy image at level sigmas[step]."""
    denoised: Tensor
    """[B, C, *S], the last estimate of the clean image."""
    step: int
    """Number of steps done; pass it as `first`, with x, to go on from here."""
    history: tuple[Tensor, ...] = ()
    """Earlier estimates that a multistep solver needs."""


Noise = Callable[[int], Tensor]  # index of the step -> standard normal [B, C, *S]


class Solver(Protocol):
    """x [B, C, *S] at level sigmas[first]; sigmas decreasing, float64 [n + 1], ending in 0."""

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        *,
        cond: Cond | None = None,
        noise: Noise | None = None,
        first: int = 0,
    ) -> Iterator[State]: ...


@dataclass(frozen=True, kw_only=True)
class Churn:
    """Noise added and removed again along the way (EDM, algorithm 2)."""

    amount: float = 0.0
    """S_churn, spread over the steps; at most sqrt(2) - 1 of the level is added in a step."""
    sigma_min: float = 0.0
    """Churn only at levels from here ..."""
    sigma_max: float = 1e6
    """... up to here."""
    scale: float = 1.0
    """S_noise, the standard deviation of the added noise; slightly above 1 keeps detail."""

    def __post_init__(self) -> None:
        if not (self.amount >= 0 and self.scale > 0 and self.sigma_min <= self.sigma_max):
            raise ValueError(
                "churn needs amount >= 0, scale > 0 and sigma_min <= sigma_max, not "
                f"{self.amount}, {self.scale}, {self.sigma_min}, {self.sigma_max}"
            )

    def gamma(self, sigma: float, steps: int) -> float:
        """Relative increase of the noise level before a step."""
        inside = self.sigma_min <= sigma <= self.sigma_max
        return min(self.amount / steps, math.sqrt(2) - 1) if inside else 0.0


def euler(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    cond: Cond | None = None,
    noise: Noise | None = None,
    first: int = 0,
) -> Iterator[State]:
    """First order, one evaluation a step; the same as DDIM (arXiv 2010.02502) in this frame."""
    levels = tuple(sigmas.tolist())
    for i in range(first, len(levels) - 1):
        step = Step(run=0, index=i, stage=0, sigmas=levels)
        denoised = denoiser(x, levels[i], cond, step=step)
        x = denoised + (levels[i + 1] / levels[i]) * (x - denoised)
        yield State(x, denoised, i + 1)


def heun(
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    cond: Cond | None = None,
    noise: Noise | None = None,
    first: int = 0,
    churn: Churn | None = None,
) -> Iterator[State]:
    """Second order, 2n - 1 evaluations, optionally stochastic (EDM, algorithms 1 and 2)."""
    levels = tuple(sigmas.tolist())
    for i in range(first, len(levels) - 1):
        a, b = levels[i], levels[i + 1]
        gamma = churn.gamma(a, len(levels) - 1) if churn else 0.0
        if churn and gamma > 0:
            if noise is None:
                raise ValueError("churn needs noise: pass noise=, a function of the step index")
            raised = a * (1 + gamma)
            x = x + math.sqrt(raised**2 - a**2) * churn.scale * noise(i)
            a = raised
        denoised = denoiser(x, a, cond, step=Step(run=0, index=i, stage=0, sigmas=levels))
        slope = (x - denoised) / a
        x_next = x + (b - a) * slope
        if b > 0:
            step = Step(run=0, index=i, stage=1, sigmas=levels)
            denoised = denoiser(x_next, b, cond, step=step)
            x_next = x + (b - a) * (slope + (x_next - denoised) / b) / 2
        x = x_next
        yield State(x, denoised, i + 1)


def run(solution: Iterator[State]) -> State:
    """The last state of a solver."""
    state = None
    for state in solution:  # noqa: B007
        pass
    if state is None:
        raise ValueError("the solver has no steps left to do")
    return state


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun}


@torch.no_grad()
def solve(
    solver: Solver,
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    cond: Cond | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """The clean image at the end of a solver, without gradients."""
    return run(solver(denoiser, x, sigmas, cond=cond, noise=noise)).x
