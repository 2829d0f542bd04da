"""Solvers of the probability-flow equation dx/dsigma = (x - D(x, sigma)) / sigma, and of its kin.

A solver is an iterator: it yields a `State` after every step and can be continued from any of
them. Plumbing (seeds, batches, precision, progress, saving) belongs to the sampling driver.
"""

from typing import Literal

from patchdiffusion.solvers.brownian import brownian
from patchdiffusion.solvers.core import (
    History,
    Method,
    Noise,
    Solver,
    State,
    crossings,
    run,
    solve,
)
from patchdiffusion.solvers.multistep import ab2, dpmpp_2m, dpmpp_3m, dpmpp_3m_published, unipc
from patchdiffusion.solvers.single import Churn, dpmpp_2s, euler, heun, midpoint, ralston
from patchdiffusion.solvers.stochastic import (
    ancestral,
    ddim,
    euler_maruyama,
    sde_dpmpp_1,
    sde_dpmpp_2m,
)

SolverName = Literal[
    "heun",
    "midpoint",
    "ralston",
    "dpmpp_2s",
    "euler",
    "dpmpp_2m",
    "dpmpp_3m",
    "dpmpp_3m_published",
    "unipc",
    "ab2",
    "ddim",
    "ancestral",
    "sde_dpmpp_1",
    "sde_dpmpp_2m",
    "euler_maruyama",
]

SOLVERS: dict[str, Method] = {
    "heun": heun,
    "midpoint": midpoint,
    "ralston": ralston,
    "dpmpp_2s": dpmpp_2s,
    "euler": euler,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_3m_published": dpmpp_3m_published,
    "unipc": unipc,
    "ab2": ab2,
    "ddim": ddim,
    "ancestral": ancestral,
    "sde_dpmpp_1": sde_dpmpp_1,
    "sde_dpmpp_2m": sde_dpmpp_2m,
    "euler_maruyama": euler_maruyama,
}

__all__ = ["SOLVERS", "Churn", "History", "Method", "Noise", "Solver", "SolverName", "State", "ab2"]
__all__ += ["ancestral", "brownian", "crossings", "ddim", "dpmpp_2m", "dpmpp_2s", "dpmpp_3m"]
__all__ += ["dpmpp_3m_published", "euler", "euler_maruyama", "heun", "midpoint", "ralston"]
__all__ += ["run", "sde_dpmpp_1", "sde_dpmpp_2m", "solve", "unipc"]
