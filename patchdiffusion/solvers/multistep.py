"""Solvers that extrapolate from earlier steps: a higher order for one evaluation a step.

All begin with a step of first order, and end with one, to 0.
"""

import math

from torch import Tensor

from patchdiffusion.solvers.core import Here, Method, Move, towards


@Method
def dpmpp_2m(here: Here, x: Tensor) -> Move:
    """Second order, n evaluations: DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2)."""
    denoised = here.denoise(x)
    return towards(extrapolated(here, denoised), x, here.b / here.a), denoised, (denoised,)


def extrapolated(here: Here, denoised: Tensor) -> Tensor:
    """The clean image as it will be half way, in ln sigma, along the line from the last one."""
    if not here.past:
        return denoised
    return denoised + here.width() / (2 * here.width(1)) * (denoised - here.past[0])


@Method
def dpmpp_3m(here: Here, x: Tensor) -> Move:
    """Third order, n evaluations: the exact integral of a parabola through three images.

    DPM-Solver++(3M) as its derivation has it (arXiv 2211.01095).
    """
    return _parabola(here, x, 2.0)


@Method
def dpmpp_3m_published(here: Here, x: Tensor) -> Move:
    """`dpmpp_3m` with half the second-order term, as in the authors' code: not third order."""
    return _parabola(here, x, 1.0)


def _parabola(here: Here, x: Tensor, factor: float) -> Move:
    denoised = here.denoise(x)
    keep = (denoised, *here.past[:1])
    x = towards(denoised, x, here.b / here.a)
    if here.past:
        h, h1 = here.width(), here.width(1)
        phi2 = math.expm1(-h) / h + 1
        slope = (denoised - here.past[0]) * (h / h1)  # divided differences, in units of h
        if len(here.past) == 2:
            h2 = here.width(2)
            earlier = (here.past[0] - here.past[1]) * (h / h2)
            bend = (slope - earlier) * (h / (h1 + h2))
            slope = slope + bend * (h1 / h)
            x = x - factor * (phi2 / h - 1 / 2) * bend
        x = x + phi2 * slope
    return x, denoised, keep


@Method
def unipc(here: Here, x: Tensor) -> Move:
    """Third order, n evaluations: UniPC-2 with its corrector (arXiv 2302.04867, B2(h)).

    The corrector uses the evaluation at the end of a step, which is that of the step after:
    `State.x` is not yet corrected, and the last one, at 0, needs no correction.
    """
    denoised = here.denoise(x)
    if here.past:
        x = x + _correction(here, denoised)
    x = towards(extrapolated(here, denoised), x, here.b / here.a)
    return x, denoised, (denoised, *here.past[:1])


def _correction(here: Here, denoised: Tensor) -> Tensor:
    """The corrector of the step before minus its predictor, given the evaluation at its end."""
    h = here.width(1)
    grown = math.expm1(-h)
    if len(here.past) == 1:
        return -grown / 2 * (denoised - here.past[0])
    phi1 = -grown / h - 1
    phi2 = -phi1 / h - 1 / 2
    ratio = -here.width(2) / h
    both, moment = phi1 / grown, 2 * phi2 / grown  # rho0 + rho1 and ratio rho0 + rho1
    rho0 = (moment - both) / (ratio - 1)
    slope = (here.past[1] - here.past[0]) / ratio
    return -grown * ((rho0 - 1 / 2) * slope + (both - rho0) * (denoised - here.past[0]))


@Method
def ab2(here: Here, x: Tensor) -> Move:
    """Second order, n evaluations: Adams-Bashforth in sigma, the rhoAB1 of DEIS (2204.13902)."""
    a, b = here.a, here.b
    denoised = here.denoise(x)
    slope = (x - denoised) / a
    x = towards(denoised, x, b / a)
    if here.past:
        before = here.levels[here.index - 1]
        x = x + (b - a) ** 2 / (2 * (a - before)) * (slope - here.past[0])
    return x, denoised, (slope,)
