"""Solvers of the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma and of reverse SDEs.

A solver is an iterator: it yields a `State` after every step and can be continued from any of
them. Seeds, batches, precision, progress and saving belong to the sampling driver.
"""

from dataclasses import dataclass
from typing import ClassVar

from patchdiffusion.solvers.brownian import brownian
from patchdiffusion.solvers.core import (
    History,
    Integrator,
    Method,
    Move,
    Noise,
    State,
    Step,
    crossings,
    run,
    solve,
)
from patchdiffusion.solvers.jumps import Jumps
from patchdiffusion.solvers.multistep import (
    AB2,
    DPMpp2M,
    DPMpp3M,
    DPMpp3MPublished,
    UniPC,
    ab2,
    dpmpp_2m,
    dpmpp_3m,
    dpmpp_3m_published,
    unipc,
)
from patchdiffusion.solvers.single import (
    Churn,
    DPMpp2S,
    Euler,
    Heun,
    Midpoint,
    Ralston,
    RePaint,
    dpmpp_2s,
    euler,
    heun,
    midpoint,
    ralston,
)
from patchdiffusion.solvers.stochastic import (
    DDIM,
    Ancestral,
    EulerMaruyama,
    SDEDPMpp1,
    SDEDPMpp2M,
    ancestral,
    ddim,
    euler_maruyama,
    sde_dpmpp_1,
    sde_dpmpp_2m,
)


@dataclass(frozen=True)
class AutoSolver:
    """map for few-step models, sde_dpmpp_2m for eps, else heun (twice the evaluations)."""

    word: ClassVar[str] = "auto"
    usual_steps: ClassVar[int] = 18


Solver = (
    AutoSolver
    | Heun
    | Midpoint
    | Ralston
    | DPMpp2S
    | Euler
    | DPMpp2M
    | DPMpp3M
    | DPMpp3MPublished
    | UniPC
    | AB2
    | DDIM
    | Ancestral
    | SDEDPMpp1
    | SDEDPMpp2M
    | EulerMaruyama
    | RePaint
    | Jumps
)
"""The solvers of `--solver`; a new member is a `Method`, see `solvers.core`."""

__all__ = ["AB2", "AutoSolver", "Ancestral", "Churn", "DDIM", "DPMpp2M", "DPMpp2S", "DPMpp3M"]
__all__ += ["DPMpp3MPublished", "Euler", "EulerMaruyama", "Heun", "History", "Integrator", "Jumps"]
__all__ += [
    "Method",
    "Midpoint",
    "Move",
    "Noise",
    "Ralston",
    "RePaint",
    "SDEDPMpp1",
    "SDEDPMpp2M",
    "Solver",
]
__all__ += ["State", "Step", "UniPC", "ab2", "ancestral", "brownian", "crossings", "ddim"]
__all__ += ["dpmpp_2m", "dpmpp_2s", "dpmpp_3m", "dpmpp_3m_published", "euler", "euler_maruyama"]
__all__ += ["heun", "midpoint", "ralston", "run", "sde_dpmpp_1", "sde_dpmpp_2m", "solve", "unipc"]
