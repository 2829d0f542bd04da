"""Weights of the loss, lambda(sigma) on |D - x0|^2.

Each weight turns the loss on the image into the loss on another prediction (arXiv 2510.21890).
Only the product of the weight and the density of the noise law matters. The signal-to-noise ratio
is SNR = 1 / sigma^2.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from patchdiffusion import rng
from patchdiffusion.noise import check_sigma_data
from patchdiffusion.system import families


class Weighting(Protocol):
    """A weight for each noise level: [B] -> [B]."""

    def __call__(self, sigma: Tensor) -> Tensor: ...


# ---- Losses on other predictions ----


@dataclass(frozen=True, kw_only=True)
class EDMWeight:
    """(sigma^2 + sd^2) / (sigma sd)^2: equal loss at all sigma at the start (arXiv 2206.00364)."""

    word: ClassVar[str] = "edm"
    sigma_data: float = 0.5
    """Standard deviation of the data in [-1, 1] units."""

    def __post_init__(self) -> None:
        check_sigma_data(self.sigma_data)

    def inherit(self, old: object, config: Any) -> "EDMWeight":
        """A copy with the sigma_data of the configuration's parameterisation."""
        return families.copy_fields(self, config.precond)

    def __call__(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


@dataclass(frozen=True)
class X0Weight:
    """1: the mean squared error of the image (arXiv 2202.00512)."""

    word: ClassVar[str] = "x0"

    def __call__(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


@dataclass(frozen=True)
class EpsWeight:
    """1 / sigma^2: the mean squared error of eps (DDPM, arXiv 2006.11239)."""

    word: ClassVar[str] = "eps"

    def __call__(self, sigma: Tensor) -> Tensor:
        return sigma**-2


@dataclass(frozen=True)
class VWeight:
    """(1 + sigma^2) / sigma^2: the mean squared error of v (arXiv 2202.00512)."""

    word: ClassVar[str] = "v"

    def __call__(self, sigma: Tensor) -> Tensor:
        return (1 + sigma**2) / sigma**2


@dataclass(frozen=True, kw_only=True)
class FlowWeight:
    """(1 + sigma)^2 / sigma^2: the mean squared error of the flow velocity (arXiv 2210.02747)."""

    word: ClassVar[str] = "flow"
    least_time: float = 0.0
    """Least flow time t = sigma / (1 + sigma) in 1 / t^2; bounds the weight (JiT, 2511.13720)."""

    def __post_init__(self) -> None:
        if not 0 <= self.least_time < 1:
            raise ValueError(f"least_time must lie in [0, 1), not {self.least_time}")

    def __call__(self, sigma: Tensor) -> Tensor:
        if self.least_time == 0:
            return (1 + sigma) ** 2 / sigma**2
        return (sigma / (1 + sigma)).clamp(min=self.least_time) ** -2


@dataclass(frozen=True)
class ScoreWeight:
    """1 / sigma^4: the mean squared error of the score (arXiv 2011.13456)."""

    word: ClassVar[str] = "score"

    def __call__(self, sigma: Tensor) -> Tensor:
        return sigma**-4


# ---- Bounded weights ----


@dataclass(frozen=True, kw_only=True)
class MinSNRWeight:
    """min(SNR, gamma), for eps, v and x0 networks alike (arXiv 2303.09556)."""

    word: ClassVar[str] = "min-snr"
    gamma: float = 5.0
    """Largest weight; smaller values reduce the weight of low noise."""

    def __post_init__(self) -> None:
        _positive(self, "gamma")

    def __call__(self, sigma: Tensor) -> Tensor:
        return (sigma**-2).clamp(max=self.gamma)


@dataclass(frozen=True, kw_only=True)
class SoftMinSNRWeight:
    """SNR gamma / (SNR + gamma), a smooth min(SNR, gamma) (arXiv 2401.11605)."""

    word: ClassVar[str] = "soft-min-snr"
    gamma: float = 4.0
    """Weight at no noise; the published one is 1 / sigma_data^2."""

    def __post_init__(self) -> None:
        _positive(self, "gamma")

    def __call__(self, sigma: Tensor) -> Tensor:
        return 1 / (sigma**2 + 1 / self.gamma)


@dataclass(frozen=True, kw_only=True)
class P2Weight:
    """SNR / (k + SNR)^gamma: the error of eps with less weight on low noise (arXiv 2204.00227)."""

    word: ClassVar[str] = "p2"
    gamma: float = 1.0
    """Exponent of the reduction; 0 is the error of eps itself."""
    k: float = 1.0
    """SNR from which on the weight is reduced."""

    def __post_init__(self) -> None:
        _positive(self, "k")
        if not 0 <= self.gamma < math.inf:
            raise ValueError(f"gamma must be >= 0 and finite, not {self.gamma}")

    def __call__(self, sigma: Tensor) -> Tensor:
        return sigma**-2 / (self.k + sigma**-2) ** self.gamma


def _positive(owner: object, name: str) -> None:
    value = getattr(owner, name)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, not {value}")


LossWeight = (
    EDMWeight
    | X0Weight
    | EpsWeight
    | VWeight
    | FlowWeight
    | ScoreWeight
    | MinSNRWeight
    | SoftMinSNRWeight
    | P2Weight
)


# ---- Learned ----


class LogVariance(nn.Module):
    """u(sigma), a sum of cosines of ln(sigma) / 4 with learned weights (EDM2, arXiv 2312.02696).

    Zero at the start. Frequencies ~ N(0, 1) and phases are fixed, the same in every run.
    """

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int = 128):
        super().__init__()
        key = rng.keys(0, "log variance", 0, torch.arange(channels))
        self.register_buffer("freqs", rng.normal(rng.subkeys(key, "freqs"), ()))
        self.register_buffer("phases", rng.uniform(rng.subkeys(key, "phases"), 1)[:, 0].float())
        self.weight = nn.Parameter(torch.zeros(channels))

    def forward(self, sigma: Tensor) -> Tensor:
        """u(sigma): [B] -> float32 [B]."""
        turns = sigma.float().log()[:, None] / 4 * self.freqs + self.phases
        # Not a matrix product, which autocast would round to its low precision.
        return (math.sqrt(2) * (2 * math.pi * turns).cos() * self.weight).sum(1)
