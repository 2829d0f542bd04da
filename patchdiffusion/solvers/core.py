"""The common part of solvers: their state, the loop over steps, and the arguments of a step.

A solver is the rule of one step, from level a down to level b, under the loop of `Method`, and a
frozen record of its options. Rules are written in the frame x = x0 + sigma eps, where the
probability-flow equation is dx/dsigma = (x - D(x, sigma)) / sigma; in lambda = -ln sigma its exact
solution over a step is x_b = (b / a) x_a + b int e^lambda D dlambda (DPM-Solver++, arXiv
2211.01095, proposition 4.1).
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from patchdiffusion.cond import Call, Cond, Position
from patchdiffusion.denoiser import Denoiser, Wrapper, ask, discontinuities

History = tuple[Tensor, ...]
Noise = Callable[[int], Tensor]  # index of the step -> standard normal [B, C, *S]


@dataclass(frozen=True)
class State:
    """State of a solver after a step."""

    x: Tensor
    """[B, C, *S], the noisy image at level sigmas[step]."""
    denoised: Tensor
    """[B, C, *S], the last estimate of the clean image."""
    step: int
    """Number of steps done; pass it as `first`, with x and history, to continue."""
    history: History = ()
    """Estimates of earlier steps for a multistep solver, the latest first."""


class Integrator(Protocol):
    """A solver as a function from noise to an iterator over states: any `Method`.

    x [B, C, *S] at level sigmas[first]; sigmas decreasing, float64 [n + 1], ending in 0.

    The history is dropped before each step in `resets`, and at discontinuities of the denoiser, see
    `Wrapper.discontinuities`. Every call is a trajectory with its own number.
    """

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        *,
        cond: Cond | None = None,
        noise: Noise | None = None,
        first: int = 0,
        history: History = (),
        resets: Collection[int] = (),
    ) -> Iterator[State]: ...


@dataclass(frozen=True)
class Step:
    """The arguments of the rule of one step."""

    run: int
    """Number of the trajectory."""
    denoiser: Denoiser
    cond: Cond | None
    source: Noise | None
    sigmas: tuple[float, ...]
    index: int
    history: History
    """History of the steps before; empty at the start, after a reset and in the step to 0."""

    @property
    def sigma(self) -> float:
        """Noise level at the start of the step."""
        return self.sigmas[self.index]

    @property
    def next_sigma(self) -> float:
        """Noise level at the end of the step."""
        return self.sigmas[self.index + 1]

    def width(self, back: int = 0) -> float:
        """ln(a / b) of this step, or of `back` steps before; next_sigma must not be 0."""
        return math.log(self.sigmas[self.index - back] / self.sigmas[self.index - back + 1])

    def denoise(self, x: Tensor, sigma: float | None = None, stage: int = 0) -> Tensor:
        """Evaluate the denoiser, by default at the noise level of the start of the step."""
        position = Position(run=self.run, index=self.index, stage=stage, sigmas=self.sigmas)
        level = self.sigma if sigma is None else sigma
        return ask(self.denoiser, x, level, self.cond, Call(position))

    def perturb(self, x: Tensor, std: float, turn: int = 0) -> Tensor:
        """Add noise, once per step and turn; at std 0 no noise source is needed."""
        if std == 0:
            return x
        if self.source is None:
            raise ValueError("this solver needs noise: pass noise=, a function of the step index")
        return x + std * self.source(self.index + turn * _TURN)


_TURN = 2**20  # steps; the noise of further turns is that of steps beyond any schedule
_RUNS = itertools.count()  # numbers trajectories, so that no cache mixes two of them

Move = tuple[Tensor, Tensor, History]  # x at level b, the denoised image, the new history


class Method(ABC):
    """A solver made of the rule of one step; a subclass is a frozen record of its options."""

    stages: ClassVar[int] = 1
    """Evaluations per step; the step to 0 takes one."""
    usual_steps: ClassVar[int] = 18
    """Default number of steps."""

    @abstractmethod
    def move(self, step: Step, x: Tensor) -> Move:
        """The rule of one step."""

    def evaluations(self, steps: int) -> int:
        """Number of evaluations of the denoiser per sample."""
        return steps * self.stages - (self.stages - 1)

    def highest(self, sigmas: Tensor) -> float:
        """The largest noise level at which the denoiser is evaluated."""
        return float(sigmas[0])

    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        sigmas: Tensor,
        *,
        cond: Cond | None = None,
        noise: Noise | None = None,
        first: int = 0,
        history: History = (),
        resets: Collection[int] = (),
    ) -> Iterator[State]:
        """Iterate over the steps from noise to an image, see `Integrator`."""
        trajectory, levels = next(_RUNS), tuple(sigmas.tolist())
        resets = {*resets, *crossings(sigmas, discontinuities(denoiser))}
        for i in range(first, len(levels) - 1):
            if isinstance(denoiser, Wrapper):
                x = denoiser.before_step(x, Position(trajectory, i, 0, levels))
            kept = () if i in resets or levels[i + 1] == 0 else history
            step = Step(trajectory, denoiser, cond, noise, levels, i, kept)
            x, denoised, history = self.move(step, x)
            yield State(x, denoised, i + 1, history)


def towards(denoised: Tensor, x: Tensor, ratio: float) -> Tensor:
    """Shrink the distance of x from a clean image: the exact step if that image is constant."""
    return denoised + ratio * (x - denoised)


def crossings(sigmas: Tensor, jumps: Iterable[float]) -> frozenset[int]:
    """Indices of steps separated from the step before by a discontinuity, for `resets`.

    `jumps` are levels at which the denoiser changes, such as both ends of a guidance interval
    low < sigma <= high. Estimates of different denoisers must not be extrapolated together.
    """
    levels = sigmas.tolist()
    pairs = [(i, levels[i - 1], levels[i]) for i in range(1, len(levels))]
    return frozenset(i for jump in jumps for i, above, level in pairs if level <= jump < above)


def run(solution: Iterator[State]) -> State:
    """Run a solver to its end and return the last state."""
    state = None
    for state in solution:  # noqa: B007
        pass
    if state is None:
        raise ValueError("the solver has no steps left to do")
    return state


@torch.no_grad()
def solve(
    solver: Integrator,
    denoiser: Denoiser,
    x: Tensor,
    sigmas: Tensor,
    *,
    cond: Cond | None = None,
    noise: Noise | None = None,
    resets: Collection[int] = (),
) -> Tensor:
    """Run a solver without gradients and return the clean image."""
    return run(solver(denoiser, x, sigmas, cond=cond, noise=noise, resets=resets)).x
