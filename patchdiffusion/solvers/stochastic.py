"""Solvers of the reverse stochastic equation: the same marginals, with fresh noise in each step."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from patchdiffusion.paths import PATHS, Path
from patchdiffusion.solvers.core import Method, Move, Step, towards
from patchdiffusion.solvers.multistep import extrapolated


@Method
def ddim(step: Step, x: Tensor, *, eta: float = 0.0) -> Move:
    """First order, n evaluations: DDIM (arXiv 2010.02502, equation 16), eta in [0, 1].

    eta is the part of the standard deviation of DDPM's posterior; 0 is `euler`.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim needs eta in [0, 1], not {eta}")
    denoised = step.denoise(x)
    up = eta * step.next_sigma * math.sqrt(1 - (step.next_sigma / step.sigma) ** 2)
    down = math.sqrt(step.next_sigma**2 - up**2)
    return step.perturb(towards(denoised, x, down / step.sigma), up), denoised, ()


@Method
def ancestral(step: Step, x: Tensor, *, eta: float = 1.0) -> Move:
    """`ddim` that takes all of the posterior's noise: DDPM (arXiv 2006.11239)."""
    return ddim.rule(step, x, eta=eta)


@Method
def sde_dpmpp_1(step: Step, x: Tensor, *, eta: float = 1.0) -> Move:
    """First order, n evaluations: SDE-DPM-Solver++(1) (arXiv 2211.01095).

    eta is the variance of the noise relative to the reverse diffusion; 1 is `ancestral`, 0 `euler`.
    """
    denoised = step.denoise(x)
    return _exponential(step, x, denoised, eta), denoised, ()


@Method
def sde_dpmpp_2m(step: Step, x: Tensor, *, eta: float = 1.0) -> Move:
    """Second order in the drift, n evaluations: SDE-DPM-Solver++(2M); with eta 0 `dpmpp_2m`."""
    denoised = step.denoise(x)
    return _exponential(step, x, extrapolated(step, denoised), eta), denoised, (denoised,)


def _exponential(step: Step, x: Tensor, denoised: Tensor, eta: float) -> Tensor:
    """The exact step of the stochastic equation if the clean image stays the same."""
    if not eta >= 0:
        raise ValueError(f"eta must be >= 0, not {eta}")
    ratio = step.next_sigma / step.sigma
    x = towards(denoised, x, ratio ** (1 + eta))
    return step.perturb(x, step.next_sigma * math.sqrt(1 - ratio ** (2 * eta)))


@Method
def euler_maruyama(
    step: Step,
    x: Tensor,
    *,
    eta: float = 1.0,
    path: Path = PATHS["flow"],
    diffusion: Callable[[Tensor], Tensor] | None = None,
) -> Move:
    """First order, n evaluations: dz = (u - w S) dt + sqrt(2 w) dW (SiT, arXiv 2401.08740).

    In the frame z = a(t) x of a path, by default the straight one, with w = eta diffusion(t), by
    default eta s(t), and the step to 0 is the denoised image.
    """
    denoised = step.denoise(x)
    if step.next_sigma == 0:
        return denoised, denoised, ()
    t, t_next = (
        path.time(torch.tensor(s, dtype=torch.float64)) for s in (step.sigma, step.next_sigma)
    )
    w = eta * float((diffusion or path.s)(t))
    if not w >= 0:
        raise ValueError(f"eta times the diffusion must be >= 0, not {w} at t = {t:g}")
    dt = float(t_next - t)
    eps = (x - denoised) / step.sigma
    velocity = float(path.da(t)) * denoised + float(path.ds(t)) * eps
    z = float(path.a(t)) * x + dt * (velocity + w / float(path.s(t)) * eps)
    return step.perturb(z, math.sqrt(-2 * w * dt)) / float(path.a(t_next)), denoised, ()
