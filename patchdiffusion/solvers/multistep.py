"""Multistep solvers: a higher order by extrapolation from earlier steps, at one evaluation a step.

The first step and the last one, to 0, are of first order.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from patchdiffusion.solvers.core import Method, Move, Step, towards


@dataclass(frozen=True, kw_only=True)
class DPMpp2M(Method):
    """Second order, n evaluations: DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2)."""

    word: ClassVar[str] = "dpmpp_2m"

    def move(self, step: Step, x: Tensor) -> Move:
        denoised = step.denoise(x)
        ahead = extrapolated(step, denoised)
        return towards(ahead, x, step.next_sigma / step.sigma), denoised, (denoised,)


def extrapolated(step: Step, denoised: Tensor) -> Tensor:
    """Linear extrapolation in ln sigma of the clean image to the middle of the step."""
    if not step.history:
        return denoised
    return denoised + step.width() / (2 * step.width(1)) * (denoised - step.history[0])


@dataclass(frozen=True, kw_only=True)
class DPMpp3M(Method):
    """Third order, n evaluations: the exact integral of a parabola through three images.

    DPM-Solver++(3M) with the term of its derivation (arXiv 2211.01095).
    """

    word: ClassVar[str] = "dpmpp_3m"

    def move(self, step: Step, x: Tensor) -> Move:
        return _parabola(step, x, 2.0)


@dataclass(frozen=True, kw_only=True)
class DPMpp3MPublished(Method):
    """`DPMpp3M` with half the second-order term, as in the authors' code (arXiv 2211.01095)."""

    word: ClassVar[str] = "dpmpp_3m_published"

    def move(self, step: Step, x: Tensor) -> Move:
        return _parabola(step, x, 1.0)


def _parabola(step: Step, x: Tensor, factor: float) -> Move:
    denoised = step.denoise(x)
    history = (denoised, *step.history[:1])
    x = towards(denoised, x, step.next_sigma / step.sigma)
    if step.history:
        h, h1 = step.width(), step.width(1)
        phi2 = math.expm1(-h) / h + 1
        slope = (denoised - step.history[0]) * (h / h1)  # divided differences, in units of h
        if len(step.history) == 2:
            h2 = step.width(2)
            earlier = (step.history[0] - step.history[1]) * (h / h2)
            bend = (slope - earlier) * (h / (h1 + h2))
            slope = slope + bend * (h1 / h)
            x = x - factor * (phi2 / h - 1 / 2) * bend
        x = x + phi2 * slope
    return x, denoised, history


@dataclass(frozen=True, kw_only=True)
class UniPC(Method):
    """Third order, n evaluations: UniPC-2 with its corrector (arXiv 2302.04867, B2(h)).

    The corrector uses the evaluation at the end of a step, which is that of the step after:
    `State.x` is not yet corrected, and the last one, at 0, needs no correction.
    """

    word: ClassVar[str] = "unipc"

    def move(self, step: Step, x: Tensor) -> Move:
        denoised = step.denoise(x)
        if step.history:
            x = x + _correction(step, denoised)
        x = towards(extrapolated(step, denoised), x, step.next_sigma / step.sigma)
        return x, denoised, (denoised, *step.history[:1])


def _correction(step: Step, denoised: Tensor) -> Tensor:
    """The corrector of the step before minus its predictor, given the evaluation at its end."""
    h = step.width(1)
    grown = math.expm1(-h)
    if len(step.history) == 1:
        return -grown / 2 * (denoised - step.history[0])
    phi1 = -grown / h - 1
    phi2 = -phi1 / h - 1 / 2
    ratio = -step.width(2) / h
    both, moment = phi1 / grown, 2 * phi2 / grown  # rho0 + rho1 and ratio rho0 + rho1
    rho0 = (moment - both) / (ratio - 1)
    slope = (step.history[1] - step.history[0]) / ratio
    return -grown * ((rho0 - 1 / 2) * slope + (both - rho0) * (denoised - step.history[0]))


@dataclass(frozen=True, kw_only=True)
class AB2(Method):
    """Second order, n evaluations: Adams-Bashforth in sigma, the rhoAB1 of DEIS (2204.13902)."""

    word: ClassVar[str] = "ab2"

    def move(self, step: Step, x: Tensor) -> Move:
        a, b = step.sigma, step.next_sigma
        denoised = step.denoise(x)
        slope = (x - denoised) / a
        x = towards(denoised, x, b / a)
        if step.history:
            before = step.sigmas[step.index - 1]
            x = x + (b - a) ** 2 / (2 * (a - before)) * (slope - step.history[0])
        return x, denoised, (slope,)


dpmpp_2m, dpmpp_3m, dpmpp_3m_published = DPMpp2M(), DPMpp3M(), DPMpp3MPublished()
unipc, ab2 = UniPC(), AB2()
