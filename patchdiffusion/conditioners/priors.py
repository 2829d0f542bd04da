"""Laws of latent vectors in sampling: standard normal, or a mixture fitted to encoded images.

A normal law misses the aggregate posterior of a variational autoencoder; a mixture of Gaussians
that is fitted after training is closer (Ex-PDE in DiffuseVAE, arXiv 2201.00308). Draws are a
function of seeds. Shapes: B samples, N latents of images, d their dimensions, K components.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from patchdiffusion import rng

FEWEST = 4
"""Least number of images per dimension of each component."""
MOST = 20_000
"""Number of encoded images, unless a mixture needs more."""
ITERATIONS = 100
"""Most steps of expectation and maximization."""

Fitted = Mapping[str, Tensor]
"""Tensors of a fitted prior, by name; empty for one that needs none."""


class Prior(ABC):
    """Base of priors of latent vectors."""

    def needs(self, dims: int) -> int:
        """Number of encoded images to fit it to; 0 for one that is not fitted."""
        return 0

    def fit(self, z: Tensor) -> Fitted:
        """Tensors that describe latents of images: [N, d]."""
        return {}

    def center(self, dims: int, fitted: Fitted) -> Tensor:
        """Mean of the latents: [d]."""
        return torch.zeros(dims)

    @abstractmethod
    def draw(self, seeds: Tensor, dims: int, fitted: Fitted) -> Tensor:
        """A latent for each seed, int64 [B] -> float32 [B, d]."""


@dataclass(frozen=True, kw_only=True)
class Normal(Prior):
    """Standard normal, the prior of the autoencoder's loss."""

    word: ClassVar[str] = "normal"

    def draw(self, seeds: Tensor, dims: int, fitted: Fitted) -> Tensor:
        return rng.normal(rng.keys(0, "latent", 0, seeds), (dims,))


@dataclass(frozen=True, kw_only=True)
class Mixture(Prior):
    """Mixture of Gaussians with full covariances, fitted to encoded training images."""

    word: ClassVar[str] = "gmm"

    components: int = 10
    """Number of Gaussians; 1 has the moments of the encoded images."""

    def __post_init__(self) -> None:
        if not 1 <= self.components <= 1000:
            raise ValueError(f"components must lie in [1, 1000], not {self.components}")

    def needs(self, dims: int) -> int:
        return max(MOST, self._least(dims))

    def _least(self, dims: int) -> int:
        return FEWEST * dims * self.components

    def fit(self, z: Tensor) -> Fitted:
        """Raise `ValueError` for fewer than four images per dimension of each component."""
        if len(z) < (least := self._least(z.shape[1])):
            most = len(z) // (FEWEST * z.shape[1])
            hint = f"use at most {most} components" if most else "use the prior normal"
            raise ValueError(
                f"a mixture of {self.components} components in {z.shape[1]} dimensions needs at "
                f"least {least:,} images, not {len(z):,}; {hint}"
            )
        return fit_mixture(z.double(), self.components)

    def center(self, dims: int, fitted: Fitted) -> Tensor:
        return (fitted["weights"] @ fitted["means"]).float()

    def draw(self, seeds: Tensor, dims: int, fitted: Fitted) -> Tensor:
        weights, means, roots = (fitted[name] for name in ("weights", "means", "roots"))
        u = rng.uniform(rng.keys(0, "component", 0, seeds), 1)[:, 0]
        edges = weights.cumsum(0).to(u)
        which = torch.searchsorted(edges, u * edges[-1]).clamp(max=len(weights) - 1)
        eps = rng.normal(rng.keys(0, "latent", 0, seeds), (dims,)).to(u)
        roots, means = roots.to(u)[which], means.to(u)[which]
        return (means + (roots @ eps[..., None])[..., 0]).float()


PriorUnion = Normal | Mixture
"""The priors of latent vectors."""


# ---- Fitting a mixture ----


def fit_mixture(z: Tensor, count: int) -> Fitted:
    """Mixture of `count` Gaussians of greatest likelihood, by EM from k-means: z float64 [N, d].

    weights [K], means [K, d], and roots [K, d, d]: Cholesky factors of the covariances. One
    component has the empirical moments exactly, divided by N.
    """
    shares = _clusters(z, count)
    before = -math.inf
    for _ in range(ITERATIONS):
        mixture = _maximized(z, shares)
        if count == 1:
            return mixture
        logs = _log_densities(z, mixture) + mixture["weights"].log()
        total = logs.logsumexp(1, keepdim=True)
        shares = (logs - total).exp()
        mean = total.mean().item()
        if mean - before < 1e-6 * abs(mean):
            break
        before = mean
    return _maximized(z, shares)


def _maximized(z: Tensor, shares: Tensor) -> dict[str, Tensor]:
    """Weights, means and roots of the components for shares [N, K] of each latent in them."""
    weights = shares.mean(0)
    means, covariances = [], []
    for share in shares.T / shares.sum(0)[:, None].clamp(min=1e-300):
        mean = share @ z
        centered = z - mean
        means.append(mean)
        covariances.append((share[:, None] * centered).T @ centered)
    covariance = torch.stack(covariances)
    if len(weights) > 1:  # a component of few latents is singular without
        floor = 1e-6 * z.var(0).mean()
        covariance = covariance + floor * torch.eye(z.shape[1]).to(covariance)
    roots, wrong = torch.linalg.cholesky_ex(covariance)
    if wrong.any():
        raise ValueError(
            "the encoded images lie in fewer dimensions than the latent has, so a mixture cannot "
            "be fitted; use the prior normal"
        )
    return {"weights": weights, "means": torch.stack(means), "roots": roots.contiguous()}


def _log_densities(z: Tensor, mixture: Fitted) -> Tensor:
    """Log-density of each latent under each component: [N, K]."""
    logs = []
    for mean, root in zip(mixture["means"], mixture["roots"], strict=True):
        scaled = torch.linalg.solve_triangular(root, (z - mean).T, upper=False)
        volume = root.diagonal().log().sum() + 0.5 * len(mean) * math.log(2 * math.pi)
        logs.append(-0.5 * scaled.square().sum(0) - volume)
    return torch.stack(logs, dim=1)


def _clusters(z: Tensor, count: int, rounds: int = 20) -> Tensor:
    """Clusters by k-means from distant centers: 1 for the cluster of each latent, [N, K]."""
    centers = z[:1]
    for number in range(1, count):  # k-means++
        distance = torch.cdist(z, centers).amin(1).square()
        u = rng.uniform(rng.keys(0, "centers", number, torch.zeros(1, dtype=torch.int64)), 1)
        edges = distance.cumsum(0)
        chosen = torch.searchsorted(edges, u[0].to(edges) * edges[-1]).clamp(max=len(z) - 1)
        centers = torch.cat([centers, z[chosen]])
    shares = torch.zeros(len(z), count, dtype=z.dtype, device=z.device)
    for _ in range(rounds):
        nearest = torch.cdist(z, centers).argmin(1)
        shares = torch.nn.functional.one_hot(nearest, count).to(z)
        sizes = shares.sum(0)[:, None]
        centers = torch.where(sizes > 0, shares.T @ z / sizes.clamp(min=1), centers)
    return shares
