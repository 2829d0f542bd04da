"""What all solvers share: the state, the loop over the steps, and what a rule sees of a step.

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
from patchdiffusion.denoiser import Denoiser, ask, discontinuities

History = tuple[Tensor, ...]
Noise = Callable[[int], Tensor]  # index of the step -> standard normal [B, C, *S]


@dataclass(frozen=True)
class State:
    """Where a solver stands after a step."""

    x: Tensor
    """[B, C, *S], the noisy image at level sigmas[step]."""
    denoised: Tensor
    """[B, C, *S], the last estimate of the clean image."""
    step: int
    """Number of steps done; pass it as `first`, with x and history, to go on from step."""
    history: History = ()
    """What a multistep solver remembers of earlier steps, the latest first."""


class Integrator(Protocol):
    """Walks from noise to an image: any `Method`, and what is made of one.

    x [B, C, *S] at level sigmas[first]; sigmas decreasing, float64 [n + 1], ending in 0.

    The history is dropped before each step in `resets`, and where the denoiser says that it jumps:
    see `Wrapper.discontinuities`. Every call is a trajectory with a number of its own.
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
    """One step of a solver, as its rule sees it."""

    run: int
    """Number of the trajectory."""
    denoiser: Denoiser
    cond: Cond | None
    source: Noise | None
    sigmas: tuple[float, ...]
    index: int
    history: History
    """What the rule kept of the steps before; empty at the start, after a reset and before 0."""

    @property
    def sigma(self) -> float:
        """The noise level the step begins at."""
        return self.sigmas[self.index]

    @property
    def next_sigma(self) -> float:
        """The noise level it ends at."""
        return self.sigmas[self.index + 1]

    def width(self, back: int = 0) -> float:
        """ln(a / b) of this step, or of one further back; next_sigma must not be 0."""
        return math.log(self.sigmas[self.index - back] / self.sigmas[self.index - back + 1])

    def denoise(self, x: Tensor, sigma: float | None = None, stage: int = 0) -> Tensor:
        """Evaluate the denoiser, at `sigma` if it is given, else where the step begins."""
        position = Position(run=self.run, index=self.index, stage=stage, sigmas=self.sigmas)
        level = self.sigma if sigma is None else sigma
        return ask(self.denoiser, x, level, self.cond, Call(position))

    def perturb(self, x: Tensor, std: float) -> Tensor:
        """Add noise, at most once a step; 0 adds none and needs none."""
        if std == 0:
            return x
        if self.source is None:
            raise ValueError("this solver needs noise: pass noise=, a function of the step index")
        return x + std * self.source(self.index)


_RUNS = itertools.count()  # numbers trajectories, so that no cache mixes two of them

Move = tuple[Tensor, Tensor, History]  # x at level b, the denoised image, what to remember


class Method(ABC):
    """A solver made of the rule of one step; a subclass is a frozen record of its options."""

    stages: ClassVar[int] = 1
    """Evaluations of a step; the step to 0 takes one."""
    usual_steps: ClassVar[int] = 18
    """Number of steps where none is given."""

    @abstractmethod
    def move(self, step: Step, x: Tensor) -> Move:
        """The rule of one step."""

    def evaluations(self, steps: int) -> int:
        """How often the denoiser is evaluated for a sample."""
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
        """As an `Integrator`."""
        number, levels = next(_RUNS), tuple(sigmas.tolist())
        resets = {*resets, *crossings(sigmas, discontinuities(denoiser))}
        for i in range(first, len(levels) - 1):
            memory = () if i in resets or levels[i + 1] == 0 else history
            step = Step(number, denoiser, cond, noise, levels, i, memory)
            x, denoised, history = self.move(step, x)
            yield State(x, denoised, i + 1, history)


def towards(denoised: Tensor, x: Tensor, ratio: float) -> Tensor:
    """Shrink the distance of x from a clean image: the exact step if that image stays the same."""
    return denoised + ratio * (x - denoised)


def crossings(sigmas: Tensor, jumps: Iterable[float]) -> frozenset[int]:
    """Steps that begin across a jump from the step before: what to pass as `resets`.

    `jumps` are levels at which the denoiser changes, such as both ends of a guidance interval
    low < sigma <= high. Estimates of different denoisers must not be extrapolated together.
    """
    levels = sigmas.tolist()
    pairs = [(i, levels[i - 1], levels[i]) for i in range(1, len(levels))]
    return frozenset(i for jump in jumps for i, above, level in pairs if level <= jump < above)


def run(solution: Iterator[State]) -> State:
    """The last state of a solver."""
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
    """The clean image at the end of a solver, without gradients."""
    return run(solver(denoiser, x, sigmas, cond=cond, noise=noise, resets=resets)).x
