"""How much an error of the denoised image counts: weights lambda(sigma) on |D - x0|^2.

Each weight turns the loss on the image into the loss on another prediction (arXiv 2510.21890):
what is trained is the product of the weight and the density of the noise law.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Weighting(Protocol):
    """A weight for each noise level: [B] -> [B]."""

    def __call__(self, sigma: Tensor) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class EDMWeight:
    """(sigma^2 + sd^2) / (sigma sd)^2: every noise level counts the same at the start (EDM)."""

    sigma_data: float = 0.5
    """Standard deviation of the data in [-1, 1] units."""

    def __call__(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


@dataclass(frozen=True)
class EpsWeight:
    """1 / sigma^2: the mean squared error of eps (DDPM)."""

    def __call__(self, sigma: Tensor) -> Tensor:
        return sigma**-2


@dataclass(frozen=True)
class VWeight:
    """(1 + sigma^2) / sigma^2: the mean squared error of v."""

    def __call__(self, sigma: Tensor) -> Tensor:
        return (1 + sigma**2) / sigma**2


@dataclass(frozen=True)
class FlowWeight:
    """(1 + sigma)^2 / sigma^2: the mean squared error of the velocity of the straight path."""

    def __call__(self, sigma: Tensor) -> Tensor:
        return (1 + sigma) ** 2 / sigma**2
