"""Stochastic solvers, of the reverse SDE: equal marginals, with fresh noise in each step."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from patchdiffusion.paths import PATHS
from patchdiffusion.solvers.core import Method, Move, Step, towards
from patchdiffusion.solvers.multistep import extrapolated


@dataclass(frozen=True, kw_only=True)
class DDIM(Method):
    """First order, n evaluations: DDIM (arXiv 2010.02502, equation 16); `Euler` without noise."""

    eta: float = 0.0
    """Share of the standard deviation of DDPM's posterior, in [0, 1]; 0 adds no noise."""

    def __post_init__(self) -> None:
        check_eta(self.eta, 1.0)

    def move(self, step: Step, x: Tensor) -> Move:
        return _posterior(step, x, self.eta)


@dataclass(frozen=True, kw_only=True)
class Ancestral(Method):
    """`DDIM` with all of the posterior's noise: DDPM (arXiv 2006.11239)."""

    eta: float = 1.0
    """Share of the standard deviation of DDPM's posterior, in [0, 1]."""

    def __post_init__(self) -> None:
        check_eta(self.eta, 1.0)

    def move(self, step: Step, x: Tensor) -> Move:
        return _posterior(step, x, self.eta)


def _posterior(step: Step, x: Tensor, eta: float) -> Move:
    denoised = step.denoise(x)
    up = eta * step.next_sigma * math.sqrt(1 - (step.next_sigma / step.sigma) ** 2)
    down = math.sqrt(step.next_sigma**2 - up**2)
    return step.perturb(towards(denoised, x, down / step.sigma), up), denoised, ()


@dataclass(frozen=True, kw_only=True)
class SDEDPMpp1(Method):
    """First order, n evaluations: SDE-DPM-Solver++(1) (arXiv 2211.01095).

    With eta 1 it is `Ancestral`, with 0 `Euler`.
    """

    word: ClassVar[str] = "sde_dpmpp_1"
    eta: float = 1.0
    """Variance of the noise relative to the reverse diffusion, in [0, 100]."""

    def __post_init__(self) -> None:
        check_eta(self.eta)

    def move(self, step: Step, x: Tensor) -> Move:
        denoised = step.denoise(x)
        return _exponential(step, x, denoised, self.eta), denoised, ()


@dataclass(frozen=True, kw_only=True)
class SDEDPMpp2M(Method):
    """Second order in the drift, n evaluations: SDE-DPM-Solver++(2M) (arXiv 2211.01095).

    With eta 0 it is `DPMpp2M`.
    """

    word: ClassVar[str] = "sde_dpmpp_2m"
    eta: float = 1.0
    """Variance of the noise relative to the reverse diffusion, in [0, 100]."""

    def __post_init__(self) -> None:
        check_eta(self.eta)

    def move(self, step: Step, x: Tensor) -> Move:
        denoised = step.denoise(x)
        ahead = extrapolated(step, denoised)
        return _exponential(step, x, ahead, self.eta), denoised, (denoised,)


def _exponential(step: Step, x: Tensor, denoised: Tensor, eta: float) -> Tensor:
    """The exact step of the reverse SDE if the clean image is constant."""
    ratio = step.next_sigma / step.sigma
    x = towards(denoised, x, ratio ** (1 + eta))
    return step.perturb(x, step.next_sigma * math.sqrt(1 - ratio ** (2 * eta)))


@dataclass(frozen=True, kw_only=True)
class EulerMaruyama(Method):
    """First order, n evaluations: dz = (u - w S) dt + sqrt(2 w) dW (SiT, arXiv 2401.08740).

    In the frame z = a(t) x of a path with w = eta s(t) or eta; the step to 0 is the denoised image.
    """

    word: ClassVar[str] = "euler_maruyama"
    eta: float = 1.0
    """Factor on the noise w, in [0, 100]."""
    path: Literal["flow", "vp", "cosine", "ve"] = "flow"
    """The frame in which the steps are straight."""
    diffusion: Literal["s", "constant"] = "s"
    """s: w = eta s(t), which falls with the noise; constant: w = eta."""

    def __post_init__(self) -> None:
        check_eta(self.eta)

    def move(self, step: Step, x: Tensor) -> Move:
        denoised = step.denoise(x)
        if step.next_sigma == 0:
            return denoised, denoised, ()
        path = PATHS[self.path]
        t, t_next = (
            path.time(torch.tensor(s, dtype=torch.float64)) for s in (step.sigma, step.next_sigma)
        )
        w = self.eta * (float(path.s(t)) if self.diffusion == "s" else 1.0)
        dt = float(t_next - t)
        eps = (x - denoised) / step.sigma
        velocity = float(path.da(t)) * denoised + float(path.ds(t)) * eps
        z = float(path.a(t)) * x + dt * (velocity + w / float(path.s(t)) * eps)
        return step.perturb(z, math.sqrt(-2 * w * dt)) / float(path.a(t_next)), denoised, ()


def check_eta(eta: float, most: float = 100.0) -> None:
    """Raise `ValueError` unless eta lies in [0, most]."""
    if not 0 <= eta <= most:
        raise ValueError(f"eta must be in [0, {most:g}], not {eta}")


ddim, ancestral, euler_maruyama = DDIM(), Ancestral(), EulerMaruyama()
sde_dpmpp_1, sde_dpmpp_2m = SDEDPMpp1(), SDEDPMpp2M()
