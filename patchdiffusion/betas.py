"""Tables of betas of published discrete models, of any kind, and the noise law of their steps.

Step i of T has abar_i = (1 - beta_0) ... (1 - beta_i), that is, sigma_i = sqrt(1 / abar_i - 1).
Sources: Ho et al., NeurIPS 2020 (arXiv 2006.11239): linear; Rombach et al., CVPR 2022 (2112.10752):
scaled-linear, whose square root is linear; Nichol and Dhariwal, ICML 2021 (2102.09672): cosine; Lin
et al., WACV 2024 (2305.08891): no signal at the last step.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from patchdiffusion.paths import table_sigmas

BetaKind = Literal["linear", "scaled-linear", "cosine", "sigmoid", "listed"]
_LEAST_SIGNAL = 2.0**-40  # abar of a last step without signal, whose sigma would be infinite


@dataclass(frozen=True, kw_only=True)
class Betas:
    """A table of betas, whose noise levels are interpolated between steps."""

    kind: BetaKind = "linear"
    """linear, scaled-linear (the square root is linear), sigmoid, cosine, or the listed values."""
    steps: int = 1000
    """Number of steps T."""
    first: float = 1e-4
    """Beta of the first step; not of cosine and listed."""
    last: float = 0.02
    """Beta of the last step; not of cosine and listed."""
    values: tuple[float, ...] = ()
    """Every beta, for listed."""
    silent: bool = False
    """True if the table is scaled so that no signal is left at the last step (zero SNR)."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(BetaKind):
            allowed = ", ".join(get_args(BetaKind))
            raise ValueError(f"kind must be one of {allowed}, not {self.kind!r}")
        if not 2 <= self.steps <= 100_000:
            raise ValueError(f"steps must lie in [2, 100000], not {self.steps}")
        if (self.kind == "listed") != bool(self.values):
            raise ValueError("values are for the kind listed, which needs them")
        betas = self.values or (self.first, self.last)
        if not all(0 < beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in (0, 1), not {min(betas):g} to {max(betas):g}")
        if self.values and len(self.values) != self.steps:
            raise ValueError(f"values must be {self.steps}, one for each step: {len(self.values)}")

    @property
    def sigmas(self) -> Tensor:
        """Noise level of every step, increasing: float64 [T]."""
        return _sigmas(self, torch.device("cpu"))

    def index(self, sigma: Tensor) -> Tensor:
        """The step of a noise level, interpolated in ln sigma, in [0, T - 1]: float64."""
        logs = _sigmas(self, sigma.device).log()
        log = sigma.double().log()
        above = torch.searchsorted(logs, log.contiguous()).clamp(1, self.steps - 1)
        below = above - 1
        part = (log - logs[below]) / (logs[above] - logs[below])
        return (below + part).clamp(0, self.steps - 1)

    def at(self, steps: Tensor) -> Tensor:
        """Noise levels of whole steps, int64 of any shape: float64."""
        return _sigmas(self, steps.device)[steps]


@lru_cache
def _sigmas(table: Betas, device: torch.device) -> Tensor:
    if table.kind == "cosine":
        sigmas = table_sigmas("cosine", table.steps, torch.device("cpu"))
        abar = 1 / (1 + sigmas**2)
    else:
        abar = (-_betas(table)).log1p().cumsum(0).exp()
    if table.silent:
        root = abar.sqrt()
        abar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        abar[-1] = _LEAST_SIGNAL
    return ((1 - abar) / abar).sqrt().to(device)


def _betas(table: Betas) -> Tensor:
    first, last, steps = table.first, table.last, table.steps
    if table.kind == "listed":
        return torch.tensor(table.values, dtype=torch.float64)
    if table.kind == "scaled-linear":
        return torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
    if table.kind == "sigmoid":
        ramp = torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid()
        return ramp * (last - first) + first
    return torch.linspace(first, last, steps, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class BetaSteps:
    """Uniform over the steps of a table of betas (DDPM, arXiv 2006.11239, algorithm 1)."""

    word: ClassVar[str] = "beta-steps"
    betas: Betas = field(default_factory=Betas)

    def icdf(self, u: Tensor) -> Tensor:
        """Sigma at the percentiles u."""
        steps = self.betas.steps
        return self.betas.at((u * steps).long().clamp(max=steps - 1)).to(u.dtype)

    def cdf(self, sigma: Tensor) -> Tensor:
        """The percentile of the middle of its step, interpolated between steps: in (0, 1)."""
        return ((self.betas.index(sigma) + 0.5) / self.betas.steps).to(sigma.dtype)
